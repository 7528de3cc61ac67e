"""Whether compiling pays: uncompiled calls of a model beside compiled ones."""
from __future__ import annotations

import math
import statistics
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from .gain import COMPILED, EAGER, KEPT, MOST_KEPT, Call, typical

ENOUGH = 0.5  # seconds of uncompiled calls, with KEPT pairs or more; MOST_KEPT pairs are enough without
MOST_PARTS = 64


@dataclass(frozen=True)
class Pairs:
    """Uncompiled calls beside compiled ones. image: that of the first. eager, compiled: seconds of one. count: of that of which there are
    fewer. is_reversed: an uncompiled one came first."""

    image: int
    size: str
    eager: float
    compiled: float
    count: int
    is_reversed: bool

    @classmethod
    def of(cls, calls: list[Call]) -> Pairs | None:
        """None where one of the two is missing."""
        eager, compiled = ([call.seconds for call in calls if call.kind == kind] for kind in (EAGER, COMPILED))
        if not eager or not compiled:
            return None
        first = calls[0]
        return cls(first.image, first.size, typical(eager), typical(compiled), min(len(eager), len(compiled)), first.kind == EAGER)


class Comparison:
    """What part of an uncompiled call's time a compiled one takes, over many sizes, weights and images. Calls of the same size, weights and
    image are compared, since minutes later the machine may have other work; of images with one call each two of the same size.
    Calls that left blocks out, as cache nodes do, count where no others are."""

    def __init__(self):
        self._parts: OrderedDict[tuple, list[Call]] = OrderedDict()
        self._image = -1  # the last one
        self._images = 0
        self._turns: Counter[tuple] = Counter()  # of that image, calls of each size and weights
        self._lead = 0  # uncompiled calls, less compiled ones

    def is_uncompiled_turn(self, image: int, size: str, weights: Hashable) -> bool:
        """Whether the next call is to be an uncompiled one: in the order of Thue and Morse, so that of each two calls, and of the first of
        each two images, one is, and neither kind has what comes with every second call alone. Not where no compiled ones are counted."""
        self._begin(image)
        return self._lead < MOST_KEPT and _is_odd(self._turns[size, weights]) != _is_odd(self._images - 1)

    def count(self, image: int, size: str, weights: Hashable, kind: str) -> None:
        """A call has been made. Its seconds come now or later."""
        self._begin(image)
        self._turns[size, weights] += 1
        self._lead += 1 if kind == EAGER else -1

    def _begin(self, image: int) -> None:
        if image != self._image:
            self._image = image
            self._images += 1
            self._turns.clear()
        elif len(self._turns) > MOST_PARTS:
            self._turns.clear()

    def add(self, calls: Iterable[Call]) -> None:
        for call in calls:
            key = call.image, call.size, call.weights, call.blocks
            part = self._parts.setdefault(key, [])
            self._parts.move_to_end(key)
            if len(part) < 2 * MOST_KEPT:
                part.append(call)
        while len(self._parts) > MOST_PARTS:
            self._parts.popitem(last=False)

    def clear(self) -> None:
        self._parts.clear()
        self._lead = 0

    def _whole_parts(self) -> list[list[Call]]:
        """Without those whose calls left blocks out."""
        most = max((blocks for _, _, _, blocks in self._parts), default=0)
        return [calls for (_, _, _, blocks), calls in self._parts.items() if blocks == most]

    def _pairs(self) -> list[Pairs]:
        within, across = [], []
        alone: dict[str, list[Call]] = {}
        for calls in self._whole_parts():
            size = calls[0].size
            if pairs := Pairs.of(calls):
                within.append(pairs)
            elif pairs := Pairs.of(before := alone.pop(size, []) + calls):
                across.append(pairs)
            else:
                alone[size] = before
        return within or across

    @property
    def is_enough(self) -> bool:
        """Of one image, or of some that begin with either kind: a first call may take longer."""
        pairs = self._pairs()
        of_images: dict[int, list[Pairs]] = {}
        for each in pairs:
            of_images.setdefault(each.image, []).append(each)
        groups = _by_order(pairs)
        return any(map(_is_enough, of_images.values())) or (
            _is_enough(pairs) and len(groups) == 2 and all(_count(group) >= KEPT for group in groups))

    @property
    def ratio(self) -> float:
        """The middle one of those that began with either kind, each as often as it has calls of both; between the two."""
        groups = _by_order(self._pairs())
        groups = [group for group in groups if _count(group) >= KEPT] or groups
        ratios = [[each.compiled / each.eager for each in group for _ in range(each.count)] for group in groups]
        return math.exp(statistics.fmean(math.log(statistics.median(group)) for group in ratios))

    def eager(self, size: str) -> tuple[str, float]:
        """(size, seconds of an uncompiled call); of the last calls' size where none was of that one."""
        pairs = self._pairs()
        if all(each.size != size for each in pairs):
            size = pairs[-1].size
        return size, typical([each.eager for each in pairs if each.size == size])

    @property
    def steps(self) -> int:
        """How many of each kind are compared."""
        return _count(self._pairs())

    def uncompiled(self) -> tuple[str, float, int] | None:
        """(size, seconds of a call, how many) of the last calls' size, where nothing was compiled; None as long as these are too few."""
        calls = [call for part in self._whole_parts() for call in part if call.kind == EAGER]
        seconds = [call.seconds for call in calls if call.size == calls[-1].size]
        return (calls[-1].size, typical(seconds), len(seconds)) if _are_enough(len(seconds), sum(seconds)) else None


def _by_order(pairs: list[Pairs]) -> list[list[Pairs]]:
    groups = ([each for each in pairs if each.is_reversed == is_reversed] for is_reversed in (False, True))
    return [group for group in groups if group]


def _count(pairs: list[Pairs]) -> int:
    return sum(each.count for each in pairs)


def _is_enough(pairs: list[Pairs]) -> bool:
    return _are_enough(_count(pairs), sum(each.count * each.eager for each in pairs))


def _are_enough(count: int, seconds: float) -> bool:
    return count >= MOST_KEPT or (count >= KEPT and seconds >= ENOUGH)


def _is_odd(number: int) -> bool:
    """Whether it has an odd number of ones in binary, as in the sequence of Thue and Morse."""
    return number.bit_count() % 2 == 1
