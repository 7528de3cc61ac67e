"""Whether a kernel computes on this machine what it should: seen at its first call with a shape in a process, on the layer's own operands.

A sample of its result, rows and columns that meet every tile's row and column, is compared with the product in exact arithmetic, or with
the reference's quantization. A kernel that is wrong is out for its device, and the next one runs.
"""
from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping

import torch

from . import reference
from .tuning import bucket

logger = logging.getLogger(__name__)

SAMPLES = 16  # rows, and columns
EXACT_SUM = 1024  # products of INT8 that fp32 adds without rounding: 128 * 128 * 1024 is 2**24
WORKING_VALUES = 1 << 24  # fp32 values that the check holds at a time
RETRY = 60.0  # seconds, where there was no memory to look
RELATIVE = 2.0 ** -24  # of one rounding in fp32
# Of a row's scale and of a step of its quantization: fp32's roundings in a rotation and an activation, many times over.
SCALE_TOLERANCE, STEP_TOLERANCE = 1e-4, 0.02
LARGEST_SCALE = 1e34  # beyond it fp32 may overflow in between

# (operation, kernel asked for, device) -> {name: what can do it}, in the order in which they are tried.
Functions = Callable[[str, str, torch.device], Mapping[str, Callable]]
disabled: Callable[[], bool] = bool
# Keeps what was wrong for whoever mends it: (kernel, device, what). What it returns says where, empty where it does not.
record: Callable[[str, torch.device, str], str] | None = None
# Why a kernel is out, by device and name.
_WRONG: dict[tuple[torch.device, str], str] = {}
# What runs, by operation, kernel asked for, device, dtypes and shape.
_RIGHT: dict[tuple, Callable] = {}
_not_before: dict[torch.device, float] = {}


class WrongResult(RuntimeError):
    """A kernel's result is not the exact one: how."""


def is_wrong(device: torch.device, kernel: str) -> bool:
    return (device, kernel) in _WRONG


def looked_at() -> tuple[int, dict[str, str]]:
    """(with how many shapes kernels were seen right, {kernel: what was wrong with it})"""
    return len(_RIGHT), {f"{kernel} on {device}": what for (device, kernel), what in _WRONG.items()}


def quant_rows(kernel: str, functions: Functions, x: torch.Tensor, group: int, act: str,
               pre_quant_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows. kernel: what was asked for."""
    key = "quant_rows", kernel, x.device, x.dtype, bucket(x.shape[0]), x.shape[1], group, act, pre_quant_scale is None
    right = _RIGHT.get(key)
    if right is not None:
        return right(x, group, act, pre_quant_scale)
    arguments = x, group, act, pre_quant_scale
    found = functions("quant_rows", kernel, x.device)
    return _first(key, x, found, arguments, lambda result: rows_error(*arguments, *result), reference.quant_rows)


def norm_quant_rows(kernel: str, functions: Functions, x: torch.Tensor, normed: reference.Normed, group: int,
                    pre_quant_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.norm_quant_rows. kernel: what was asked for."""
    key = ("norm_quant_rows", kernel, x.device, x.dtype, bucket(x.shape[0]), x.shape[1], group, pre_quant_scale is None,
           *(None if t is None else t.dtype for t in normed[:6]), normed.plus_one, *(sharing(t, x) for t in normed[4:6]))
    right = _RIGHT.get(key)
    if right is not None:
        return right(x, normed, group, pre_quant_scale)
    arguments = x, normed, group, pre_quant_scale
    found = functions("norm_quant_rows", kernel, x.device)
    return _first(key, x, found, arguments, lambda result: norm_rows_error(*arguments, *result), reference.norm_quant_rows)


def int8_gemm(kernel: str, functions: Functions, q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: reference.Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm. kernel: what was asked for."""
    key = ("int8_gemm", kernel, q.device, out_dtype, bucket(q.shape[0]), q.shape[1], qweight.shape[0], weight_scale.numel(),
           None if bias is None else bias.dtype, None if added is None else sharing(added.gate, q))
    arguments = (q, s, qweight, weight_scale, bias, out_dtype, *(() if added is None else (added,)))
    right = _RIGHT.get(key)
    if right is not None:
        return right(*arguments)
    return _first(key, q, functions("int8_gemm", kernel, q.device), arguments, Product(arguments).error, reference.int8_gemm)


def sharing(each: torch.Tensor | None, x: torch.Tensor) -> str:
    """How the rows of x share those of each: a kernel may be right for one image and wrong for two."""
    if each is None:
        return "nothing"
    return "one" if len(each) == 1 else "own" if len(each) == len(x) else "some"


def _first(key: tuple, x: torch.Tensor, found: Mapping[str, Callable], arguments: tuple, error: Callable[..., str], last: Callable):
    """The result of the first of found that is right; of last, where none is."""
    for name, run in found.items():
        if is_wrong(x.device, name):
            continue
        result = run(*arguments)
        what = "" if run is last else fault(name, x, functools.partial(error, result))
        if what is None:
            return result
        if not what:
            _RIGHT[key] = run
            return result
    _RIGHT[key] = last
    return last(*arguments)


def fault(kernel: str, x: torch.Tensor, error: Callable[[], str]) -> str | None:
    """What is wrong with kernel's result, empty where nothing is; None where it cannot be told now. A kernel that is wrong is not used on
    x's device from now on, which is said once. x: one of its operands."""
    if disabled():
        return ""
    if not x.numel() or (x.is_cuda and torch.cuda.is_current_stream_capturing()) or time.monotonic() < _not_before.get(x.device, 0.0):
        return None
    try:
        what = error()
    except (torch.cuda.OutOfMemoryError, MemoryError):
        _not_before[x.device] = time.monotonic() + RETRY
        logger.info("INT8: there was no memory to check a kernel against the exact product: tried again later.")
        return None
    if what and not is_wrong(x.device, kernel):
        _WRONG[x.device, kernel] = what
        where = record(kernel, x.device, what) if record else ""
        logger.warning("INT8: %s computes wrong results on %s and is not used there (%s). Please report it%s.", kernel, x.device, what,
                       f" with what is in {where}" if where else "")
    return what


def _spread(size: int, device: torch.device) -> torch.Tensor:
    """SAMPLES indices below size, the first and the last among them; all if there are no more."""
    return torch.linspace(0, size - 1, min(size, SAMPLES), dtype=torch.float64, device=device).round().long()


class Product:
    """What int8_gemm has to give for its arguments, computed when it is first asked for."""

    def __init__(self, arguments: tuple):
        self._arguments = arguments

    def error(self, y: torch.Tensor) -> str:
        """How y [M, N] differs by more than the last bit of its dtype; empty if it does not."""
        sums = self._sums
        what = self._compare(y, sums)
        # Tensor cores may add fp32 with fewer digits where a user allows it.
        return what and self._compare(y, self._computed(torch.float64))

    @functools.cached_property
    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._computed(torch.float32)

    @functools.cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, _, qweight, *_ = self._arguments
        return _spread(q.shape[0], q.device), _spread(qweight.shape[0], q.device)

    def _computed(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of products in float64: of some rows with all columns [R, N], of all rows with some columns [C, M]."""
        q, _, qweight, *_ = self._arguments
        rows, columns = self._places
        return _exact(q[rows], qweight, dtype), _exact(qweight[columns], q, dtype)

    def _compare(self, y: torch.Tensor, sums: tuple[torch.Tensor, torch.Tensor]) -> str:
        _, s, _, weight_scale, bias, out_dtype, *added = self._arguments
        rows, columns = self._places
        ws = weight_scale.reshape(-1).double().expand(y.shape[1])
        b = torch.zeros_like(ws) if bias is None else bias.double()
        s, m = s.double(), y.shape[0]
        products = sums[0] * s[rows, None] * ws, sums[1].t() * s[:, None] * ws[columns]
        if not added:
            return _beyond(y[rows], products[0], (b,), out_dtype) or _beyond(y[:, columns], products[1], (b[columns],), out_dtype)
        some, whole = added[0].of_rows(rows, m), added[0].of_rows(slice(None), m)
        some_gate, gate = (1.0, 1.0) if some.gate is None else (some.gate.double(), whole.gate[:, columns].double())
        # Where it is added after the epilogue, the product has been rounded by itself.
        return (_beyond(y[rows], products[0] * some_gate, (b * some_gate, some.residual.double()), out_dtype, 2)
                or _beyond(y[:, columns], products[1] * gate, (b[columns] * gate, whole.residual[:, columns].double()), out_dtype, 2))


def _exact(few: torch.Tensor, many: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """few [R, K] @ many [N, K].T in float64 [R, N], of INT8; dtype multiplies."""
    total = torch.zeros(few.shape[0], many.shape[0], dtype=torch.float64, device=few.device)
    step = max(64, min(EXACT_SUM, WORKING_VALUES // many.shape[0]))
    for i in range(0, few.shape[1], step):
        total += few[:, i:i + step].to(dtype) @ many[:, i:i + step].to(dtype).t()
    return total


def _beyond(y: torch.Tensor, product: torch.Tensor, added: tuple[torch.Tensor, ...], dtype: torch.dtype,
            roundings: int = 1) -> str:
    """product: scaled, in float64. added: to it, in that order, in float64. roundings: to dtype."""
    limits = torch.finfo(torch.float32 if dtype is torch.float64 else dtype)  # which kernels compute in
    expected = sum(added, product)
    allowed = limits.eps * sum((each.abs() for each in added), expected.abs()) + 8 * RELATIVE * product.abs() + limits.tiny
    allowed += (roundings - 1) * limits.eps * product.abs()
    difference = (y.double() - expected).abs()
    must_be_finite = expected.isfinite() & (expected.abs() + allowed < limits.max)
    wrong = must_be_finite & ~(difference <= allowed)
    if not wrong.any():
        return ""
    ratio = torch.where(wrong, difference / allowed, 0).nan_to_num(nan=torch.inf).max().item()
    return (f"{int(wrong.sum())} of {wrong.numel()} values of a product in {str(dtype).removeprefix('torch.')}, by {ratio:.1e} times "
            "what is allowed")


def rows_error(x: torch.Tensor, group: int, act: str, pre_quant_scale: torch.Tensor | None, q: torch.Tensor, s: torch.Tensor) -> str:
    """How q [M, K] and s [M], x's quantization (see reference.quant_rows), differ by more than fp32's rounding in some rows; empty if they
    do not."""
    rows = _spread(x.shape[0], x.device)
    x = x[rows].double()
    # 1 + tanh loses fp32's digits where all that is left of a row is its negative tail.
    noise = 8 * RELATIVE * x.abs().amax(dim=-1) if act == "gelu_tanh" else torch.zeros_like(x[:, 0])
    return _rows_error(x, noise, group, act, pre_quant_scale, q[rows].double(), s[rows].double())


def norm_rows_error(x: torch.Tensor, normed: reference.Normed, group: int, pre_quant_scale: torch.Tensor | None, q: torch.Tensor,
                    s: torch.Tensor) -> str:
    """rows_error, of reference.norm_quant_rows."""
    rows = _spread(x.shape[0], x.device)
    normed, x = normed.of_rows(rows, x.shape[0]), x[rows].double()
    # What cancels leaves the rounding of what it was.
    sizes = reference.Normed(*(value.abs() if isinstance(value, torch.Tensor) else value for value in normed))
    if normed.mean is not None:
        sizes = sizes._replace(mean=-normed.mean.abs())
    noise = 8 * RELATIVE * reference.modulated(x.abs(), sizes).amax(dim=-1)
    return _rows_error(reference.modulated(x, normed), noise, group, "none", pre_quant_scale, q[rows].double(), s[rows].double())


def _rows_error(x: torch.Tensor, noise: torch.Tensor, group: int, act: str, pre_quant_scale: torch.Tensor | None, q: torch.Tensor,
                s: torch.Tensor) -> str:
    """noise: [M], what the values of x may be off by rounding. All float64."""
    values = reference.prepared(x, group, act, pre_quant_scale)
    scale = reference.row_scale(values)
    known = scale < LARGEST_SCALE  # the others are the model's own
    if pre_quant_scale is not None:
        noise = noise * pre_quant_scale.abs().max()
    noise = noise * max(1, group) ** 0.5
    if bool((known & ~((s - scale).abs() <= SCALE_TOLERANCE * scale + noise)).any()):
        return "the scale of a row"
    apart = known[:, None] & ((q * s[:, None] - values).abs() > ((0.5 + STEP_TOLERANCE) * scale + noise)[:, None])
    return f"{int(apart.sum())} of {apart.numel()} quantized values" if bool(apart.any()) else ""
