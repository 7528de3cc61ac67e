"""How far what was compiled is from eager, and how far it may be."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of the whole result's norm; float32: what another order of additions makes of it in a block. Half types: a unit in the last place.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}
# Where layers round to INT8: a value that falls on the other side of a half moves by a whole step.
_QUANTIZED = 2e-2
_ROW = 8  # times as much in one row
_DECIDED = 0.05  # of a result's rows, which may be others where the block chooses between near ties
_UNKNOWN = 4  # times as much where a block cannot be computed more exactly


@dataclass(frozen=True)
class Difference:
    """total: the norm of the difference over that of the expected. worst: the same of the row (along the last dimension) that is
    farthest off, over its own norm or a middle row's. Infinite where shapes or dtypes differ, or it is not finite where the expected
    is; what is finite where the expected is not (a half type that overflows between two operations) is no difference."""

    total: float
    worst: float

    def within(self, tolerance: float, allowed: Difference | None = None) -> bool:
        """Whether it is at most tolerance; beyond it, twice allowed."""
        total, worst = (2 * allowed.total, 2 * allowed.worst) if allowed else (0.0, 0.0)
        return self.total <= tolerance + total and self.worst <= _ROW * tolerance + worst


_LARGEST = 1e30  # of finite results
_NONE, _INFINITE = Difference(0.0, 0.0), Difference(float("inf"), float("inf"))


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], same_dtype: bool = True, decides: bool = False) -> Difference:
    """The largest of each tensor's. same_dtype: of another dtype it is another result. decides: see state.Trace; the few rows that are
    farthest off do not count."""
    if len(found) != len(expected):
        return _INFINITE
    all_ = [_difference(*pair, same_dtype, decides) for pair in zip(found, expected)]
    return Difference(max((one.total for one in all_), default=0.0), max((one.worst for one in all_), default=0.0))


def _difference(found: Tensor, expected: Tensor, same_dtype: bool, decides: bool) -> Difference:
    if found is expected:
        return _NONE
    if found.shape != expected.shape or (same_dtype and found.dtype != expected.dtype):
        return _INFINITE
    if found.dtype == expected.dtype and torch.equal(found, expected):
        return _NONE
    if not (expected.is_floating_point() or expected.is_complex()):
        return _NONE if decides and (found != expected).float().mean() <= _DECIDED else _INFINITE
    exact = torch.float64 if torch.float64 in (found.dtype, expected.dtype) else torch.float32
    found, expected = (_real(tensor).to(exact) for tensor in (found, expected))
    finite = expected.isfinite()
    if not found.isfinite()[finite].all():
        return _INFINITE
    if not finite.all():
        ours, eagers = found[~finite], expected[~finite]
        if not (ours.isfinite() | (ours == eagers) | (ours.isnan() & eagers.isnan())).all():
            return _INFINITE
        found, expected = found.where(finite, 0.0), expected.where(finite, 0.0)
    # Squares of large numbers are beyond the dtype, those of small ones below it; where all is zero the difference is merely large.
    largest = expected.abs().amax().clamp_min(torch.finfo(exact).tiny) if expected.numel() else 1.0
    found, expected = found / largest, expected / largest
    rows, of_rows = (torch.linalg.vector_norm(tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1), dim=1)
                     for tensor in (found - expected, expected))
    norm = torch.linalg.vector_norm(of_rows).clamp_min(torch.finfo(exact).eps)
    # One row may be many times as large as all others, and most may be nothing.
    relative = rows / torch.maximum(of_rows, of_rows.median().clamp_min(1e-3 * norm / len(of_rows) ** 0.5))
    if decides:
        kept = relative.argsort()[:len(rows) - math.ceil(_DECIDED * len(rows))]
        rows, relative = rows[kept], relative[kept]
    total = torch.linalg.vector_norm(rows) / norm
    worst = relative.max() if len(relative) else total
    return Difference(*(min(value, _LARGEST) if value == value else _LARGEST for value in (total.item(), worst.item())))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def own_rounding(dtype: torch.dtype) -> float:
    """Half a unit in the last place, of a number's size."""
    return torch.finfo(dtype).eps / 2


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The floating-point dtype with the fewest bits; None where there is none."""
    return max((dtype for dtype in dtypes if dtype in _TOLERANCES), key=lambda dtype: torch.finfo(dtype).eps, default=None)


def is_right(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, quantized: bool,
             compute_exactly: Callable[[], Sequence[Tensor] | None], decides: bool = False) -> tuple[bool, Difference]:
    """(whether found is as right as expected, which eager computed, their difference). dtype: the coarsest that they were computed in.
    decides: see difference.
    compute_exactly: the same in more digits, asked where they differ by more than rounding explains at once; None: it cannot be. There
    found may be twice as far from it as expected is."""
    tolerance = max(_TOLERANCES[dtype], _QUANTIZED if quantized else 0.0)
    apart = difference(found, expected, decides=decides)
    if apart.within(tolerance):
        return True, apart
    if apart.total == float("inf"):
        return False, apart
    exact = compute_exactly()
    if exact is None:
        return apart.within(_UNKNOWN * tolerance), apart
    return difference(found, exact, False, decides).within(tolerance, difference(expected, exact, False, decides)), apart
