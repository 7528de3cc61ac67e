"""Gluon (triton.experimental.gluon, Triton >= 3.6): the INT8 GEMM of sm_90 with one product in flight while the next is issued.

Triton waits for every INT8 wgmma before the next step along K; in Gluon the kernel says what is waited for. Both kernels read q and w by
TMA into a ring of STAGES buffers. Their programs are persistent and count their steps along K through all their tiles: step i is in buffer
i % STAGES, as the (i // STAGES)th that is there. They differ in who loads: the threads that multiply, or a warp of its own.

Why neither can hang. ready[b] completes once a load: it takes one arrival and all bytes of two boxes, and TMA counts what it fills with
zeros too. Loads and products go through the same tiles and steps in the same order, so the product of step i waits for completion
i // STAGES of ready[i % STAGES]. That load needs nothing but the end of product i - STAGES, which is waited for at step i - STAGES + 1
at the latest, before anything that waits for load i. A parity cannot be mistaken for the one after the next: the load that completes that
one is issued only after every thread has passed the wait. All that is loaded is waited for, so no copy outlives its program.
"""
from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bound import Bound
from .triton_configs import GemmConfig
from .triton_gemm_jit import GATED_ROWS, GATED_TILES, RESIDUAL, _raster

KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")  # Tritons
# Of the warp that loads, a thread; the least that there is. What it leaves goes to those that multiply.
LOADER_REGISTERS = gl.constexpr(24)
# A thread of the kernel with a loading warp, as it starts, by warps (those that multiply and 4 for the one that loads: registers are given
# out by four): 65,536 an SM, of which triton_configs.resident programs have their share.
STARTING_REGISTERS = {12: 168, 8: 128}

# As they are called in Triton 3.8, and in 3.6.
_wait_for_all_threads = getattr(gl, "barrier", None) or gl.thread_barrier
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.constexpr_function
def _accumulator(bn, warps):
    """The layout of y's tile [BM, bn] as wgmma leaves it: 16 rows a warp, at most 128 columns an instruction (Triton knows no INT8 one of
    256)."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, min(bn, 128), 32])


@gluon.constexpr_function
def _rows_of_8(bm, bn, warps):
    """The layout of [bm, bn] in which a thread has 8 neighbours of a row, which are one store. Each warp has the rows that it has in
    _accumulator, so that values change places by shuffles, without shared memory."""
    columns = [[0, bit] for bit in (32, 64, 128) if bit < bn]
    warp_bits = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    more_rows = [[bit, 0] for bit in (64, 128) if 16 * warps <= bit < bm]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *columns, *more_rows], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=warp_bits, block_bases=[], shape=[bm, bn])


@gluon.jit
def _corner(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP_M: gl.constexpr):
    """The first row and column of a tile of y."""
    pid_m, pid_n = _raster(tile, M, N, BM, BN, GROUP_M)
    return pid_m * BM, pid_n * BN


@gluon.jit
def _load(descs, rings, ready, stage, first_m, first_n, k, needed):
    """Starts the copies of q [BM, BK] and w [BN, BK] into buffer stage, of which ready[stage] will tell; nothing if not needed."""
    bar = ready.index(stage)
    mbarrier.expect(bar, descs[0].block_type.nbytes + descs[1].block_type.nbytes, needed)
    _copy(descs[0], [first_m, k], bar, rings[0].index(stage), needed)
    _copy(descs[1], [first_n, k], bar, rings[1].index(stage), needed)


@gluon.jit
def _multiply_add(acc, rings, ready, step, STAGES: gl.constexpr):
    """acc with the product of a step along K on its way, and the one before it done in all threads of a warp group."""
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    acc = warpgroup_mma(rings[0].index(stage), rings[1].index(stage).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _store_part(acc, pointers, added, first_m, first_n, M, N, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr):
    """acc int32 to y at (first_m, first_n), scaled, biased, ADDED to (see triton_gemm_jit) and cast."""
    s_ptr, ws_ptr, bias_ptr, y_ptr = pointers
    residual_ptr, gate_ptr, gate_stride, gate_rows = added
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    GIVEN: gl.constexpr = acc.type.layout
    offs_m = gl.arange(0, BM, layout=gl.SliceLayout(1, GIVEN))
    offs_n = gl.arange(0, BN, layout=gl.SliceLayout(0, GIVEN))
    mask_n = first_n + offs_n < N
    y = acc.to(gl.float32) * gl.load(s_ptr + first_m + offs_m, mask=first_m + offs_m < M, other=0.0)[:, None]
    if SCALAR_WS:
        y *= gl.load(ws_ptr)
    else:
        y *= gl.load(ws_ptr + first_n + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += gl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(gl.float32)[None, :]
    STORED: gl.constexpr = _rows_of_8(BM, BN, gl.num_warps())
    if ADDED == GATED_TILES:
        image = (first_m // gate_rows).to(gl.int64)
        y *= gl.load(gate_ptr + image * gate_stride + first_n + offs_n, mask=mask_n, other=0.0).to(gl.float32)[None, :]
    y = gl.convert_layout(y if ADDED else y.to(y_ptr.dtype.element_ty), STORED)
    offs_m = gl.arange(0, BM, layout=gl.SliceLayout(1, STORED))
    offs_n = gl.arange(0, BN, layout=gl.SliceLayout(0, STORED))
    if ADDED:
        mask = (first_m + offs_m < M)[:, None] & (first_n + offs_n < N)[None, :]
        if ADDED == GATED_ROWS:
            images = ((first_m + offs_m) // gate_rows).to(gl.int64)
            y *= gl.load(gate_ptr + first_n + images[:, None] * gate_stride + offs_n[None, :], mask=mask, other=0.0).to(gl.float32)
        residual = residual_ptr + first_m.to(gl.int64) * N + first_n + offs_m[:, None] * N + offs_n[None, :]
        y = (y + gl.load(residual, mask=mask, other=0.0).to(gl.float32)).to(y_ptr.dtype.element_ty)
    y_tile = y_ptr + first_m.to(gl.int64) * N + first_n
    gl.store(y_tile + offs_m[:, None] * N + offs_n[None, :], y, mask=(first_m + offs_m < M)[:, None] & (first_n + offs_n < N)[None, :])


@gluon.jit
def _store(acc, pointers, added, first_m, first_n, M, N, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr):
    """_store_part, half of the columns at a time, with a gate a quarter: scales, bias and offsets of all would not fit into registers
    beside acc."""
    BM: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1] // 2
    halves = acc.reshape([BM, 2, HALF]).permute((0, 2, 1)).split()
    for i in gl.static_range(2):
        if ADDED > RESIDUAL:  # GATED_TILES or GATED_ROWS
            quarters = halves[i].reshape([BM, 2, HALF // 2]).permute((0, 2, 1)).split()
            _store_part(quarters[0], pointers, added, first_m, first_n + i * HALF, M, N, SCALAR_WS, HAS_BIAS, ADDED)
            _store_part(quarters[1], pointers, added, first_m, first_n + i * HALF + HALF // 2, M, N, SCALAR_WS, HAS_BIAS, ADDED)
        else:
            _store_part(halves[i], pointers, added, first_m, first_n + i * HALF, M, N, SCALAR_WS, HAS_BIAS, ADDED)


@gluon.jit
def _tiles(q_desc, w_desc, pointers, added, M, N, K, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr,
           BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    rings = (gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], q_desc.layout),
             gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w_desc.layout))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    _wait_for_all_threads()
    descs = (q_desc, w_desc)
    programs = gl.num_programs(0)
    tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
    # What is loaded next.
    next_tile = gl.program_id(0)
    next_k = 0
    next_m, next_n = _corner(next_tile, M, N, BM, BN, GROUP_M)
    for i in gl.static_range(STAGES - 1):
        _load(descs, rings, ready, i, next_m, next_n, next_k, next_tile < tiles)
        next_k += BK
        if next_k >= K:
            next_k = 0
            next_tile += programs
            next_m, next_n = _corner(min(next_tile, tiles - 1), M, N, BM, BN, GROUP_M)
    step = 0
    for tile in range(gl.program_id(0), tiles, programs):
        acc = gl.zeros((BM, BN), gl.int32, _accumulator(BN, gl.num_warps()))
        for _ in range(0, K, BK):
            acc = _multiply_add(acc, rings, ready, step, STAGES)
            # Each group of warps has waited for its own products only.
            _wait_for_all_threads()
            _load(descs, rings, ready, (step + STAGES - 1) % STAGES, next_m, next_n, next_k, next_tile < tiles)
            next_k += BK
            if next_k >= K:
                next_k = 0
                next_tile += programs
                next_m, next_n = _corner(min(next_tile, tiles - 1), M, N, BM, BN, GROUP_M)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        first_m, first_n = _corner(tile, M, N, BM, BN, GROUP_M)
        _store(acc, pointers, added, first_m, first_n, M, N, SCALAR_WS, HAS_BIAS, ADDED)


@gluon.jit(do_not_specialize=["M"])
def kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, BM: gl.constexpr,
           BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """As triton_gemm_jit.tma_kernel, unsplit. While a product is under way, what the one before has read is loaded anew: the loads are
    STAGES - 1 steps ahead, also beyond the end of a tile."""
    _tiles(q_desc, w_desc, (s_ptr, ws_ptr, bias_ptr, y_ptr), (y_ptr, y_ptr, 0, 1), M, N, K, SCALAR_WS, HAS_BIAS, 0, BM, BN, BK, GROUP_M,
           STAGES)


@gluon.jit(do_not_specialize=["M", "gate_rows"])
def adding_kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
                  SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                  BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """As triton_gemm_jit.adding_pointer_kernel."""
    _tiles(q_desc, w_desc, (s_ptr, ws_ptr, bias_ptr, y_ptr), (residual_ptr, gate_ptr, gate_stride, gate_rows), M, N, K, SCALAR_WS, HAS_BIAS,
           ADDED, BM, BN, BK, GROUP_M, STAGES)


@gluon.jit
def _loader(descs, rings, ready, free, M, N, K, GROUP_M: gl.constexpr):
    """Fills the ring: one warp."""
    STAGES: gl.constexpr = rings[0].shape[0]
    BM: gl.constexpr = rings[0].shape[1]
    BN: gl.constexpr = rings[1].shape[1]
    BK: gl.constexpr = rings[0].shape[2]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        first_m, first_n = _corner(tile, M, N, BM, BN, GROUP_M)
        for k in range(0, K, BK):
            # The first time round, the parity of before the first completion: nothing is waited for.
            mbarrier.wait(free.index(step % STAGES), step // STAGES & 1 ^ 1)
            _load(descs, rings, ready, step % STAGES, first_m, first_n, k, True)
            step += 1


@gluon.jit
def _multiplier(rings, ready, free, pointers, added, M, N, K, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr,
                GROUP_M: gl.constexpr):
    """Empties the ring: all other warps."""
    STAGES: gl.constexpr = rings[0].shape[0]
    BM: gl.constexpr = rings[0].shape[1]
    BN: gl.constexpr = rings[1].shape[1]
    BK: gl.constexpr = rings[0].shape[2]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        acc = gl.zeros((BM, BN), gl.int32, _accumulator(BN, gl.num_warps()))
        for _ in range(0, K, BK):
            acc = _multiply_add(acc, rings, ready, step, STAGES)
            # Each group of warps has waited for its own products only.
            _wait_for_all_threads()
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        first_m, first_n = _corner(tile, M, N, BM, BN, GROUP_M)
        _store(acc, pointers, added, first_m, first_n, M, N, SCALAR_WS, HAS_BIAS, ADDED)


@gluon.jit
def _specialized_tiles(q_desc, w_desc, pointers, added, M, N, K, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr,
                       BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    rings = (gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], q_desc.layout),
             gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w_desc.layout))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    _wait_for_all_threads()
    gl.warp_specialize([
        (_multiplier, (rings, ready, free, pointers, added, M, N, K, SCALAR_WS, HAS_BIAS, ADDED, GROUP_M)),
        (_loader, ((q_desc, w_desc), rings, ready, free, M, N, K, GROUP_M)),
    ], [1], [LOADER_REGISTERS])


@gluon.jit(do_not_specialize=["M"])
def specialized_kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr,
                       BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """As kernel, with one more warp that does nothing but load. free[b] completes once the product that has read buffer b is done."""
    _specialized_tiles(q_desc, w_desc, (s_ptr, ws_ptr, bias_ptr, y_ptr), (y_ptr, y_ptr, 0, 1), M, N, K, SCALAR_WS, HAS_BIAS, 0, BM, BN, BK,
                       GROUP_M, STAGES)


@gluon.jit(do_not_specialize=["M", "gate_rows"])
def adding_specialized_kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
                              SCALAR_WS: gl.constexpr, HAS_BIAS: gl.constexpr, ADDED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                              BK: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """As triton_gemm_jit.adding_pointer_kernel."""
    _specialized_tiles(q_desc, w_desc, (s_ptr, ws_ptr, bias_ptr, y_ptr), (residual_ptr, gate_ptr, gate_stride, gate_rows), M, N, K,
                       SCALAR_WS, HAS_BIAS, ADDED, BM, BN, BK, GROUP_M, STAGES)


# By name, and whether it adds.
KERNELS = {("gluon", False): kernel, ("gluon", True): adding_kernel, ("gluon_specialized", False): specialized_kernel,
           ("gluon_specialized", True): adding_specialized_kernel}


def layout(rows: int, bk: int):
    """Of [rows, bk] int8 in shared memory, as TMA writes and wgmma reads it."""
    return gl.NVMMASharedLayout.get_default_for([rows, bk], gl.int8)


def options(config: GemmConfig) -> dict:
    """What the compiler takes beside the constants."""
    if config.kernel == "gluon":
        return dict(num_warps=config.warps)
    return dict(num_warps=config.warps, maxnreg=STARTING_REGISTERS[config.warps + 4])


def is_known() -> bool:
    """Whether this Gluon is one in which the kernels were seen to wait for what comes: what they load, wait for, multiply is, instruction
    for instruction, the same in Triton 3.8 and 3.9, and in 3.6 but for the thread that is chosen. Another may mean something else."""
    return triton.__version__.startswith(KNOWN)


def describe_box(t: torch.Tensor, box: list[int], layout):
    """The descriptor of a matrix that is read box by box into shared memory of this layout."""
    return TensorDescriptor.from_tensor(t, box, layout)


def bound(config: GemmConfig, constants: dict) -> Bound:
    """config's kernel, the one that adds where constants have ADDED. K is in one part whatever its split_k."""
    describe = tuple(functools.partial(describe_box, box=[rows, config.bk], layout=layout(rows, config.bk))
                     for rows in (config.bm, config.bn))
    return Bound(KERNELS[config.kernel, "ADDED" in constants], dict(constants, STAGES=config.stages, **options(config)), describe)
