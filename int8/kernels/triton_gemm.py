"""Launches of triton_gemm_jit's kernels: which tile for which operands, whether it can run here, and its result."""
from __future__ import annotations

import functools
import logging
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from . import torch_mm
from .bound import Bound
from .reference import Added
from .triton_configs import GLUON, GemmConfig, configs, resident, tiles
from .triton_gemm_jit import (
    GATED_ROWS,
    GATED_TILES,
    RESIDUAL,
    adding_pointer_kernel,
    adding_sum_kernel,
    adding_tma_kernel,
    pointer_kernel,
    sum_kernel,
    tma_kernel,
)

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton < 3.4
    TensorDescriptor = None

# Rows of tiles whose programs run together and share q and w in L2.
GROUP_M = 8
# Bytes that rows of q and w are a multiple of: what a TMA descriptor needs, and an asynchronous copy at its widest.
POINTER_ALIGNMENT = 16
SUM_BM, SUM_BN = 4, 256
# (device, tile) that did not launch: a driver or a Triton that cannot run it will not at the next call either.
_BROKEN: set[tuple[torch.device, GemmConfig]] = set()
# Those that launch, but not with an epilogue that adds: it takes more registers.
_ADD_APART: set[tuple[torch.device, GemmConfig]] = set()

logger = logging.getLogger(__name__)


@functools.cache
def card(device: torch.device) -> tuple[int, int | None]:
    """(architecture, multiprocessors) of a device as triton_configs.configs takes them."""
    if device.type != "cuda":
        return 80, None  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    arch = 0 if torch.version.hip else properties.major * 10 + properties.minor
    return arch, properties.multi_processor_count


def dense(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it, contiguous and at an address that vectors and TMA can read. (A weight that was copied once and kept would be
    stale after a LoRA has been written into it.) Without that Triton compiles each kernel once more, with spills of kilobytes."""
    return t if t.is_contiguous() and t.data_ptr() % POINTER_ALIGNMENT == 0 else t.clone(memory_format=torch.contiguous_format)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """dense(t) with zeros after each row, up to a multiple of POINTER_ALIGNMENT. No model has such rows; a kernel that reads them byte by
    byte would spill."""
    pad = -t.shape[1] % POINTER_ALIGNMENT
    return F.pad(t, (0, pad)) if pad else dense(t)


@functools.cache
def has_gluon() -> bool:
    """Whether this Triton compiles gluon_gemm's kernels: its interpreter runs none, and an older or newer Gluon may lack what they use."""
    if not isinstance(tma_kernel, triton.JITFunction):
        return False
    try:
        from . import gluon_gemm
    except (ImportError, AttributeError) as error:
        logger.debug("INT8: no Gluon: %s", error)
        return False
    return gluon_gemm.is_known()


def candidates(q: torch.Tensor, qweight: torch.Tensor) -> tuple[GemmConfig, ...]:
    """What int8_gemm may run these operands with, the one predicted fastest first."""
    arch, sms = card(q.device)
    found = configs(arch, q.shape[0], qweight.shape[0], q.shape[1], TensorDescriptor is not None, sms, arch == 90 and has_gluon())
    if not _BROKEN:
        return found
    return tuple(config for config in found if (q.device, config._replace(split_k=1)) not in _BROKEN) or found[-1:]


def ships(name: str, device: torch.device) -> bool:
    """Whether name is that of a tile for device, for some number of rows."""
    tile = name.rpartition(" split ")[0]
    arch = card(device)[0]
    gluon = arch == 90 and has_gluon()
    return any(str(config).rpartition(" split ")[0] == tile for tma in (True, False) for config in tiles(arch, tma, gluon=gluon))


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None,
              out_dtype: torch.dtype, config: GemmConfig | None = None, added: Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm. config: one of candidates(q, qweight); if None the first of them that can be launched."""
    if config is not None:
        return _multiply(q, s, qweight, weight_scale, bias, out_dtype, added, config)
    found = candidates(q, qweight)
    for config in found[:-1]:
        try:
            return _multiply(q, s, qweight, weight_scale, bias, out_dtype, added, config)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            is_broken(q.device, config, error)
    return _multiply(q, s, qweight, weight_scale, bias, out_dtype, added, found[-1])


def is_broken(device: torch.device, config: GemmConfig, error: Exception) -> None:
    """Leaves a tile out from now on."""
    _BROKEN.add((device, config._replace(split_k=1)))
    logger.warning("INT8: the tile %s cannot run on %s and is left out (%s: %s).", config, device, type(error).__name__,
                   str(error).partition("\n")[0])


class Launch(NamedTuple):
    """A tile for operands of one kind. columns: of tiles. programs: at most so many; None for one a tile of y and part of K."""
    bound: Bound
    columns: int
    programs: int | None


class Addition(NamedTuple):
    """reference.Added as a kernel takes it. kind: its ADDED. numbers: gate_stride and gate_rows."""
    kind: int
    operands: tuple[torch.Tensor, torch.Tensor]
    numbers: tuple[int, int]

    @property
    def compiled(self) -> tuple:
        """What Triton compiles apart."""
        return self.kind, self.numbers[0], *(operand.dtype for operand in self.operands)


def addition(added: Added, m: int, bm: int) -> Addition:
    """For m rows in tiles of bm."""
    residual, gate = dense(added.residual), added.gate
    if gate is None:
        return Addition(RESIDUAL.value, (residual, residual), (0, 1))
    if gate.stride(1) != 1 or gate.data_ptr() % POINTER_ALIGNMENT:
        gate = gate.clone(memory_format=torch.contiguous_format)
    images = len(gate)
    rows = m // images
    kind = GATED_TILES if images == 1 or rows % bm == 0 else GATED_ROWS
    return Addition(kind.value, (residual, gate), (gate.stride(0) if images > 1 else 0, rows))


@functools.lru_cache(4096)
def launch(device: torch.device, config: GemmConfig, n: int, k: int, dtypes: tuple, scalar_ws: bool, added: tuple = ()) -> Launch:
    """What Triton compiles apart, but for m, which it does not look at. dtypes: of all operands and of y, None without a bias. added:
    Addition.compiled; config is unsplit then."""
    flags = dict(SCALAR_WS=scalar_ws, HAS_BIAS=dtypes[4] is not None, **(dict(ADDED=added[0]) if added else {}))
    tile = dict(BM=config.bm, BN=config.bn, BK=config.bk, GROUP_M=GROUP_M)
    programs = (card(device)[1] or sys.maxsize) * resident(config)
    if config.kernel in GLUON:
        from . import gluon_gemm

        return Launch(gluon_gemm.bound(config, {**flags, **tile}), -(-n // config.bn), programs)
    constants = dict(flags, **tile, num_warps=config.warps, num_stages=config.stages, **({} if added else dict(SPLIT_K=config.split_k)))
    if config.kernel == "tma":
        describe = tuple(functools.partial(describe_box, box=[rows, config.bk]) for rows in (config.bm, config.bn))
        bound = Bound(adding_tma_kernel if added else tma_kernel, constants, describe)
    else:
        bound = Bound(adding_pointer_kernel if added else pointer_kernel, dict(constants, EVEN_K=k % config.bk == 0))
        programs = None
    return Launch(bound, -(-n // config.bn), programs)


def describe_box(t: torch.Tensor, box: list[int]):
    """The descriptor of a matrix that is read box by box."""
    return TensorDescriptor.from_tensor(t, box)


@functools.lru_cache(4096)
def verified(device: torch.device, config: GemmConfig, n: int, k: int, dtypes: tuple, scalar_ws: bool) -> Launch:
    """launch of a tile that has been tried on device. Raises RuntimeError for one that reads through TMA and whose products are not exact:
    these kernels synchronise by barriers, which another Triton, driver or card may take otherwise. Not tried while a CUDA graph is
    captured: nothing can be read then."""
    tried = config.kernel != "pointer" and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    if tried and not _is_exact(device, config, dtypes[4], dtypes[5], scalar_ws):
        raise RuntimeError("its products are wrong here")
    return launch(device, config, n, k, dtypes, scalar_ws)


@functools.lru_cache(4096)
def _is_exact(device: torch.device, config: GemmConfig, bias_dtype: torch.dtype | None, out_dtype: torch.dtype, scalar_ws: bool) -> bool:
    m, n, k = config.bm + 5, 2 * config.bn + 16, 5 * config.bk + 16
    generator = torch.Generator(device).manual_seed(0)  # a user's own is left as it is
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device, generator=generator) for rows in (m, n))
    s, ws = torch.ones(m, device=device), torch.ones(1 if scalar_ws else n, device=device)
    bias = None if bias_dtype is None else torch.zeros(n, dtype=bias_dtype, device=device)
    y = _multiply(q, s, w, ws, bias, out_dtype, None, config, launch)
    return torch.equal(y, (q.double() @ w.double().t()).float().to(out_dtype))


def _multiply(q, s, qweight, weight_scale, bias, out_dtype, added: Added | None, config: GemmConfig, launch=verified) -> torch.Tensor:
    q, qweight, s, weight_scale = aligned(q), aligned(qweight), dense(s), dense(weight_scale)
    (m, k), n, device = q.shape, qweight.shape[0], q.device
    y = torch.empty_strided((m, n), (n, 1), dtype=out_dtype, device=device)
    if not m:
        return y
    split = 1 if config.kernel in GLUON else config.split_k
    parts = y if split == 1 else torch.empty((split, m, n), dtype=torch.int32, device=device)
    bias_dtype = None if bias is None else bias.dtype
    bias = s if bias is None else dense(bias)
    scalar = weight_scale.numel() == 1
    key = device, config, n, k, (q.dtype, s.dtype, qweight.dtype, weight_scale.dtype, bias_dtype, out_dtype), scalar
    bound, columns, programs = launch(*key)
    tiles = -(-m // config.bm) * columns
    grid = (tiles, split, 1) if programs is None else (min(tiles * split, programs), 1, 1)
    operands = q, qweight, s, weight_scale, bias, parts
    if added is not None and split == 1:
        if _launched_adding(key, grid, operands, added, (m, n, k)):
            return y
        bound(grid, operands, m, n, k)
        return torch_mm.add(y, added)
    bound(grid, operands, m, n, k)
    if split > 1:
        _sum(parts, s, weight_scale, bias, y, split, bias_dtype is not None, added)
    return y


def _launched_adding(key: tuple, grid: tuple, operands: tuple, added: Added, sizes: tuple[int, int, int]) -> bool:
    """Whether a tile has been launched with the epilogue that adds. key: of launch."""
    device, config = key[:2]
    if (device, config) in _ADD_APART:
        return False
    try:
        what = addition(added, sizes[0], config.bm)
        launch(*key, what.compiled).bound(grid, operands + what.operands, *sizes, *what.numbers)
        return True
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        _ADD_APART.add((device, config))
        logger.warning("INT8: the tile %s cannot add on %s, which is done after it (%s: %s).", config, device, type(error).__name__,
                       str(error).partition("\n")[0])
        return False


@functools.lru_cache(4096)
def _sum_kernel(device: torch.device, n: int, dtypes: tuple, split: int, scalar_ws: bool, has_bias: bool, added: tuple = ()) -> Bound:
    constants = dict(SCALAR_WS=scalar_ws, HAS_BIAS=has_bias, SPLIT_K=split, BM=SUM_BM, BN=SUM_BN)
    return Bound(adding_sum_kernel, dict(constants, ADDED=added[0])) if added else Bound(sum_kernel, constants)


def _sum(parts, s, weight_scale, bias, y, split: int, has_bias: bool, added: Added | None) -> None:
    """sum_kernel of dense operands. bias: anything where there is none."""
    m, n = y.shape
    operands = parts, s, weight_scale, bias, y
    key = y.device, n, tuple(operand.dtype for operand in operands), split, weight_scale.numel() == 1, has_bias
    grid = -(-m // SUM_BM), -(-n // SUM_BN), 1
    if added is None:
        _sum_kernel(*key)(grid, operands, m, n)
    else:
        what = addition(added, m, SUM_BM)
        _sum_kernel(*key, what.compiled)(grid, operands + what.operands, m, n, *what.numbers)


def int_mm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None,
           out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm. By torch._int_mm (cuBLASLt), with the epilogue in one pass: it reads 4 bytes of an element and writes
    those of the result, where torch_mm's moves about 38."""
    m, n = q.shape[0], qweight.shape[0]
    q, qweight = dense(q), dense(qweight)
    y = torch.empty((m, n), dtype=out_dtype, device=q.device)
    s, weight_scale, has_bias = dense(s), dense(weight_scale), bias is not None
    bias = dense(bias) if has_bias else s
    for begin, acc in torch_mm.products(q, qweight):
        end = begin + acc.shape[0]
        _sum(acc.contiguous(), s[begin:], weight_scale, bias, y[begin:end], 1, has_bias,
             None if added is None else added.of_rows(slice(begin, end), m))
    return y
