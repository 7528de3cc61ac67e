"""What Triton compiles of the INT8 GEMM with scales, bias and cast in its epilogue.

Two kernels that differ in how they read: pointers (sm_80 to sm_120), and TMA in persistent programs (sm_90; gluon_gemm has more of those).
W is read as [BN, BK] and transposed on its way to the tensor cores: with the usual [BK, BN] tile of pointers Triton >= 3.8 spills 3 KB a
thread on sm_80/86/89.
"""
from __future__ import annotations

import triton
import triton.language as tl

# ADDED, what becomes of a product, see reference.Added: the residual is added; before that a gate multiplies, one row of it a tile of y, or
# each row its own.
RESIDUAL, GATED_TILES, GATED_ROWS = (tl.constexpr(i) for i in (1, 2, 3))
# Values of a tile that is stored at once where a residual is read: of more, half by half, or they would not fit into registers.
MOST_ADDED = tl.constexpr(128 * 64)


@triton.jit
def _raster(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """The (row, column) of a tile of y, GROUP_M rows at a time."""
    grid_m = tl.cdiv(M, BM)
    width = GROUP_M * tl.cdiv(N, BN)
    first = tile // width * GROUP_M
    rows = min(grid_m - first, GROUP_M)
    return first + tile % width % rows, tile % width // rows


@triton.jit
def _part_of_k(part, K, BK: tl.constexpr, SPLIT_K: tl.constexpr):
    """The steps of BK along K, from and to, of one of SPLIT_K parts."""
    steps = tl.cdiv(K, BK)
    share = tl.cdiv(steps, SPLIT_K)
    return part * share, min(steps, (part + 1) * share)


@triton.jit
def _store(acc, y_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M, N,
           RAW: tl.constexpr, SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """acc [BM, BN] int32 to y at (first_m, first_n): as it is if RAW, else scaled, biased, ADDED to and cast. gate_rows: rows of y that
    share a row of the gate."""
    offs_m = tl.arange(0, BM)
    offs_n = tl.arange(0, BN)
    mask_m = first_m + offs_m < M
    mask_n = first_n + offs_n < N
    if RAW:
        y = acc
    else:
        y = acc.to(tl.float32) * tl.load(s_ptr + first_m + offs_m, mask=mask_m, other=0.0)[:, None]
        if SCALAR_WS:
            y *= tl.load(ws_ptr)
        else:
            y *= tl.load(ws_ptr + first_n + offs_n, mask=mask_n, other=0.0)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ADDED == GATED_TILES:
        image = (first_m // gate_rows).to(tl.int64)
        y *= tl.load(gate_ptr + image * gate_stride + first_n + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ADDED == GATED_ROWS:
        images = ((first_m + offs_m) // gate_rows).to(tl.int64)
        gate = gate_ptr + first_n + images[:, None] * gate_stride + offs_n[None, :]
        y *= tl.load(gate, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    if ADDED:
        residual = residual_ptr + first_m.to(tl.int64) * N + first_n + offs_m[:, None] * N + offs_n[None, :]
        y += tl.load(residual, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    y_tile = y_ptr + first_m.to(tl.int64) * N + first_n
    tl.store(y_tile + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The columns of acc [BM, BN], the left and the right [BM, BN // 2]."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _pointer_tile(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
                  EVEN_K: tl.constexpr, SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, SPLIT_K: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr):
    pid_m, pid_n = _raster(tl.program_id(0), M, N, BM, BN, GROUP_M)
    part = tl.program_id(1)
    begin, end = _part_of_k(part, K, BK, SPLIT_K)
    first_m = pid_m * BM
    first_n = pid_n * BN
    offs_m = tl.arange(0, BM)
    offs_n = tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    mask_q = (first_m + offs_m < M)[:, None]
    mask_w = (first_n + offs_n < N)[:, None]
    q_tile = q_ptr + first_m.to(tl.int64) * K + begin * BK + offs_m[:, None] * K + offs_k[None, :]
    w_tile = w_ptr + first_n.to(tl.int64) * K + begin * BK + offs_n[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(begin, end):
        if EVEN_K:
            q = tl.load(q_tile, mask=mask_q, other=0)
            w = tl.load(w_tile, mask=mask_w, other=0)
        else:
            mask_k = (step * BK + offs_k < K)[None, :]
            q = tl.load(q_tile, mask=mask_q & mask_k, other=0)
            w = tl.load(w_tile, mask=mask_w & mask_k, other=0)
        acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
        q_tile += BK
        w_tile += BK
    if SPLIT_K > 1:
        y_ptr += part.to(tl.int64) * M * N
    if ADDED and BM * BN > MOST_ADDED:
        left, right = _halves(acc, BM, BN)
        _store(left, y_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M, N, False,
               SCALAR_WS, HAS_BIAS, ADDED, BM, BN // 2)
        _store(right, y_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n + BN // 2, M, N,
               False, SCALAR_WS, HAS_BIAS, ADDED, BM, BN // 2)
    else:
        _store(acc, y_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M, N, SPLIT_K > 1,
               SCALAR_WS, HAS_BIAS, ADDED, BM, BN)


# M changes with every prompt and nothing in a kernel gains from its divisibility.
@triton.jit(do_not_specialize=["M"])
def pointer_kernel(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, EVEN_K: tl.constexpr, SCALAR_WS: tl.constexpr,
                   HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   GROUP_M: tl.constexpr):
    """y [M, N] = (q [M, K] @ w [N, K].T) * s [M] * ws [N] + bias [N], all contiguous.

    If SPLIT_K > 1, y is int32 [SPLIT_K, M, N] and gets sums of products. Edges are masked; offsets of whole tiles are 64-bit, those inside
    a tile 32-bit.
    """
    _pointer_tile(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, y_ptr, y_ptr, M, N, K, 0, 1, EVEN_K, SCALAR_WS, HAS_BIAS, 0, SPLIT_K, BM,
                  BN, BK, GROUP_M)


@triton.jit(do_not_specialize=["M", "gate_rows"])
def adding_pointer_kernel(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
                          EVEN_K: tl.constexpr, SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr,
                          BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr):
    """pointer_kernel, unsplit, ADDED to residual [M, N], contiguous as y."""
    _pointer_tile(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows, EVEN_K, SCALAR_WS,
                  HAS_BIAS, ADDED, 1, BM, BN, BK, GROUP_M)


@triton.jit
def _tma_tiles(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
               SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr):
    grid = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), grid * SPLIT_K, tl.num_programs(0), flatten=True):
        part = index // grid
        pid_m, pid_n = _raster(index % grid, M, N, BM, BN, GROUP_M)
        # Triton fuses the two loops, so that loads run ahead into the next tile, only where the inner one has the same bounds each time.
        if SPLIT_K == 1:
            begin, end = 0, tl.cdiv(K, BK)
        else:
            begin, end = _part_of_k(part, K, BK, SPLIT_K)
        first_m = pid_m * BM
        first_n = pid_n * BN
        acc = tl.zeros((BM, BN), tl.int32)
        for step in range(begin, end):
            q = q_desc.load([first_m, step * BK])
            w = w_desc.load([first_n, step * BK])
            acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
        part_ptr = y_ptr + part.to(tl.int64) * M * N if SPLIT_K > 1 else y_ptr
        # A part of the tile at a time: what a store needs of shared memory would otherwise cost a stage. Half of it in two bytes a value.
        left, right = _halves(acc, BM, BN)
        if y_ptr.dtype.element_ty.primitive_bitwidth > 16:
            QUARTER: tl.constexpr = BN // 4
            one, two = _halves(left, BM, BN // 2)
            three, four = _halves(right, BM, BN // 2)
            _store(one, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M,
                   N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, QUARTER)
            _store(two, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n + QUARTER, M,
                   N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, QUARTER)
            _store(three, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n + 2 * QUARTER,
                   M, N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, QUARTER)
            _store(four, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n + 3 * QUARTER,
                   M, N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, QUARTER)
        else:
            _store(left, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M,
                   N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, BN // 2)
            _store(right, part_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n + BN // 2, M,
                   N, SPLIT_K > 1, SCALAR_WS, HAS_BIAS, ADDED, BM, BN // 2)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K, SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr,
               SPLIT_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr):
    """As pointer_kernel, reading through descriptors of [BM, BK] and [BN, BK] that fill edges with zeros. A program takes one tile after
    another, so that the loads of the next start while the last is stored."""
    _tma_tiles(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, y_ptr, y_ptr, M, N, K, 0, 1, SCALAR_WS, HAS_BIAS, 0, SPLIT_K, BM, BN, BK,
               GROUP_M)


@triton.jit(do_not_specialize=["M", "gate_rows"])
def adding_tma_kernel(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows,
                      SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      BK: tl.constexpr, GROUP_M: tl.constexpr):
    """As adding_pointer_kernel."""
    _tma_tiles(q_desc, w_desc, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, K, gate_stride, gate_rows, SCALAR_WS, HAS_BIAS,
               ADDED, 1, BM, BN, BK, GROUP_M)


@triton.jit
def _sum_tile(parts_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, gate_stride, gate_rows, SCALAR_WS: tl.constexpr,
              HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    first_m = tl.program_id(0) * BM
    first_n = tl.program_id(1) * BN
    offs_m = tl.arange(0, BM)
    offs_n = tl.arange(0, BN)
    mask = (first_m + offs_m < M)[:, None] & (first_n + offs_n < N)[None, :]
    tile = parts_ptr + first_m.to(tl.int64) * N + first_n + offs_m[:, None] * N + offs_n[None, :]
    size = M.to(tl.int64) * N
    acc = tl.zeros((BM, BN), tl.int32)
    for part in range(SPLIT_K):
        acc += tl.load(tile + part * size, mask=mask, other=0)
    _store(acc, y_ptr, s_ptr, ws_ptr, bias_ptr, residual_ptr, gate_ptr, gate_stride, gate_rows, first_m, first_n, M, N, False, SCALAR_WS,
           HAS_BIAS, ADDED, BM, BN)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(parts_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr,
               SPLIT_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y [M, N] = the sum of parts int32 [SPLIT_K, M, N], exact, then as pointer_kernel."""
    _sum_tile(parts_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, y_ptr, y_ptr, M, N, 0, 1, SCALAR_WS, HAS_BIAS, 0, SPLIT_K, BM, BN)


@triton.jit(do_not_specialize=["M", "gate_rows"])
def adding_sum_kernel(parts_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, gate_stride, gate_rows,
                      SCALAR_WS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDED: tl.constexpr, SPLIT_K: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr):
    """As adding_pointer_kernel."""
    _sum_tile(parts_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, residual_ptr, gate_ptr, M, N, gate_stride, gate_rows, SCALAR_WS, HAS_BIAS, ADDED,
              SPLIT_K, BM, BN)
