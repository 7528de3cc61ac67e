"""Which layers become INT8 when not all of them may: by the noise that each adds for every byte that it saves."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FLOAT = "float"


@dataclass(frozen=True)
class Item:
    """Layers that are decided together. methods: {layer: INT8 method}. noise: the sum of their noise powers relative to their outputs.
    saved: bytes less than in float."""

    methods: Mapping[str, str]
    noise: float
    saved: int


def relative_noise(db: float) -> float:
    """Noise power relative to the signal's, of an SQNR in dB."""
    return 10 ** (-db / 10)


def choose_precision(measured: Mapping[str, Mapping[str, float]], saved: Mapping[str, int], must_save: int | None = None,
                     min_sqnr_db: float = 0.0, together: Sequence[Sequence[str]] | None = None) -> dict[str, str]:
    """{layer: "float" or the INT8 method of highest SQNR}.

    measured: {layer: {method: SQNR of its output in dB}}; a layer without any stays float. saved: bytes that each saves as INT8.
    min_sqnr_db: no layer may be below. must_save: bytes to save in all, with the least noise; None: every layer that may be INT8 is.
    together: layers that share one decision, each layer in one group; None: each by itself.

    Raises ValueError where must_save cannot be reached.

    With must_save this is the 0-1 min-knapsack problem. What is added up is noise power, not dB: the errors of layers are independent in
    first order, so their powers add, while float's infinite dB could not be added at all. The greedy order by noise per byte is within a
    factor of two of the least noise (Csirik, Frenk, Labbe, Zhang: Heuristics for the 0-1 min-knapsack problem, 1991) and within 1 % in
    the mean for models' layers, of which none dominates; an exact solution would gain less than the measurements are exact to.
    """
    items = [item for group in together or [[name] for name in measured]
             if (item := _item(group, measured, saved, min_sqnr_db)) is not None]
    chosen = items if must_save is None else _least_noise(items, must_save)
    methods = {name: method for item in chosen for name, method in item.methods.items()}
    return {name: methods.get(name, FLOAT) for name in measured}


def _item(group: Sequence[str], measured, saved, min_sqnr_db: float) -> Item | None:
    names = [name for name in group if measured.get(name)]
    if not names:
        return None
    if len(names) == 1:
        methods = {names[0]: max(measured[names[0]], key=measured[names[0]].get)}
    else:  # one method for all, so that equal blocks stay equal
        common = [m for m in measured[names[0]] if all(m in measured[name] for name in names)]
        if not common:
            return None
        methods = dict.fromkeys(names, min(common, key=lambda m: sum(relative_noise(measured[name][m]) for name in names)))
    if any(measured[name][method] < min_sqnr_db for name, method in methods.items()):
        return None
    return Item(methods, sum(relative_noise(measured[n][m]) for n, m in methods.items()), sum(saved[n] for n in names))


def _least_noise(items: list[Item], must_save: int) -> list[Item]:
    if must_save <= 0:
        return []
    items = sorted((item for item in items if item.saved > 0), key=lambda item: item.noise / item.saved)
    most = sum(item.saved for item in items)
    if most < must_save:
        raise ValueError(f"only {most} of the {must_save} bytes can be saved")
    best, kept, total = None, [], 0
    for item in items:
        if total + item.saved < must_save:
            kept.append(item)
            total += item.saved
        else:  # closes the gap: a solution; the search goes on without it, for a less noisy one
            candidate = _without_needless([*kept, item], must_save)
            if best is None or _noise(candidate) < _noise(best):
                best = candidate
    return best


def _without_needless(items: list[Item], must_save: int) -> list[Item]:
    spare = sum(item.saved for item in items) - must_save
    needed = []
    for item in sorted(items, key=lambda item: -item.noise):
        if item.saved <= spare:
            spare -= item.saved
        else:
            needed.append(item)
    return needed


def _noise(items: list[Item]) -> float:
    return sum(item.noise for item in items)
