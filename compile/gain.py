"""What a model gains: how long its calls take, by what ran them."""
from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

# What ran a call: the model as it came into the chain of nodes; with the chain's layers, uncompiled; compiled.
WITHOUT, EAGER, COMPILED = "without", "eager", "compiled"
BESIDE = "beside"  # as EAGER, but in the moments of WITHOUT: the others come minutes later, when a machine may have other times
KEPT, ENOUGH = 3, 0.5  # calls of a kind, and seconds of them, that are enough; MOST_KEPT calls are without these seconds
MOST_KEPT = 25  # the last, of compiled ones the first: what they are compared with was timed just before
MOST_SIZES = 64  # with other weights each counts anew
MAX_PENDING = 64  # calls that a GPU has not finished, or that no Comparison has asked for; more are not timed, or forgotten
SLOWER = "slower than without: bypass this node"
NOISE = 0.03  # of a call's time: less is no difference


@dataclass(frozen=True)
class Gain:
    """Seconds of a call of the model, without the nodes and now. size: of what it was called with. calls: how many were timed, of each.
    then: both were measured in an earlier start."""

    size: str
    without: float
    now: float
    calls: tuple[int, int] = (0, 0)
    then: bool = False

    @property
    def ratio(self) -> float:
        return self.without / self.now

    @property
    def is_slower(self) -> bool:
        """With two steps timed of each: one may have been disturbed."""
        return self.ratio < 1 - NOISE and min(self.calls) >= 2

    def differs_from(self, other: Gain | None) -> bool:
        """Whether it is worth saying after other."""
        return other is None or other.size != self.size or abs(self.ratio / other.ratio - 1) > NOISE / 2 or (
            self.is_slower != other.is_slower)

    def text(self) -> str:
        times = f"{self.ratio:.2f}x: {number(self.without)} -> {number(self.now)} s a step"
        few = ", of one step each" if max(self.calls) == 1 else ""
        return times + few + (f" ({SLOWER})" if self.is_slower else "") + (" when measured" if self.then else "")

    def to_dict(self) -> dict:
        return {"ratio": round(self.ratio, 3), "seconds_without": self.without, "seconds": self.now, "size": self.size,
                "steps_timed": list(self.calls)}


def number(seconds: float) -> str:
    """Three digits, zeros too, without an exponent."""
    return f"{seconds:#.3g}".rstrip(".") if 1e-4 < seconds < 999.5 else f"{seconds:.0f}" if seconds > 1 else f"{seconds:.5f}"


def _typical(seconds: Sequence[float]) -> float:
    """The lower quartile, since other work on the machine only adds; 0 of none."""
    return sorted(seconds)[(len(seconds) - 1) // 4] if seconds else 0.0


class CallTimes:
    """Seconds of the last calls of each kind, of the first compiled ones, by size and, but for WITHOUT, weights (a LoRA that is added while
    a layer runs takes its time). On CUDA by the device's own clock, read when the device has come so far: nothing waits for it."""

    _numbers = itertools.count()

    def __init__(self):
        self._number = next(self._numbers)
        self._seconds: dict[tuple, dict[str, deque[float]]] = {}
        self._pending: deque[tuple] = deque()
        self._new: deque[tuple[tuple, str, float]] = deque(maxlen=MAX_PENDING)  # what of an image, kind, seconds
        self._turns: Counter[tuple] = Counter()  # of this image, calls of each size and weights
        self._image = 0
        self._weights: Hashable = None
        self._of_trial: Hashable = None  # weights with which BESIDE was timed

    def begin(self, device: torch.device):
        """What end takes."""
        if device.type != "cuda":
            return time.perf_counter()
        self._read()
        start = torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        return start, device

    def end(self, begun, size: str, kind: str) -> None:
        """kind: empty for a call that says nothing: something was compiled in it."""
        if not kind:
            return
        if isinstance(begun, float):
            self.add(size, kind, time.perf_counter() - begun)
        elif len(self._pending) < MAX_PENDING:
            start, device = begun
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(device))
            self._pending.append((start, end, self._counted(size, kind), kind))
            self._read()

    def add(self, size: str, kind: str, seconds: float) -> None:
        self._add(self._counted(size, kind), kind, seconds)

    def _read(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, end, counted, kind = self._pending.popleft()
            self._add(counted, kind, start.elapsed_time(end) / 1e3)

    def _key(self, size: str, kind: str = COMPILED) -> tuple:
        """What calls are counted together."""
        return (size, kind) if kind in (WITHOUT, BESIDE) else (size, None, self._weights)

    def _counted(self, size: str, kind: str) -> tuple[tuple, int]:
        """(what a call is counted with, of which image)."""
        key = self._key(size, kind)
        if kind in (EAGER, COMPILED):
            self._turns[key] += 1
        return key, self._image

    def _add(self, counted: tuple[tuple, int], kind: str, seconds: float) -> None:
        key, image = counted
        kinds = self._seconds.pop(key, {})
        self._seconds[key] = kinds  # the last used is last
        kept = kinds.setdefault(kind, deque(maxlen=None if kind == COMPILED else MOST_KEPT))
        if kind != COMPILED or len(kept) < MOST_KEPT:
            kept.append(seconds)
        while len(self._seconds) > MOST_SIZES:
            del self._seconds[next(iter(self._seconds))]
        if kind in (EAGER, COMPILED):
            self._new.append(((self._number, image, *key), kind, seconds))

    def take_new(self) -> list[tuple[tuple, str, float]]:
        """Calls since the last time, for Comparison."""
        new = list(self._new)
        self._new.clear()
        return new

    def new_image(self) -> None:
        """The next calls are another image's. One with a single call, which is compared with nothing, is counted with the next."""
        if max(self._turns.values(), default=0) > 1:
            self._turns.clear()
            self._image += 1

    def is_uncompiled_turn(self, size: str) -> bool:
        """Whether the next call is to be an uncompiled one, for a Comparison: as Thue and Morse, so that each two have one, whatever
        comes and goes with every second, third, ... call. Each second image begins with one."""
        return (self._turns[self._key(size)].bit_count() + self._image) % 2 == 1

    def of_weights(self, identity: Hashable) -> None:
        """Of what weights the next calls are."""
        if self._of_trial is None:
            self._of_trial = identity
        self._weights = identity

    def count(self, size: str, kind: str) -> int:
        return len(self._seconds.get(self._key(size, kind), {}).get(kind, ()))

    def seconds(self, size: str, kind: str) -> float:
        """Of a call; 0 where none is kept."""
        return _typical(self._seconds.get(self._key(size, kind), {}).get(kind, ()))

    def without(self, size: str) -> float:
        """Seconds of WITHOUT, in the minutes of EAGER if that can be told."""
        then, now = self.seconds(size, BESIDE), self.seconds(size, EAGER)
        return self.seconds(size, WITHOUT) * (now / then if then and now and self._weights == self._of_trial else 1.0)

    def gain(self, size: str) -> Gain | None:
        """None while one of the two is not known."""
        before = WITHOUT if self.count(size, WITHOUT) else EAGER
        if not self.count(size, before) or not self.count(size, COMPILED):
            return None
        seconds = self.without(size) or self.seconds(size, EAGER)
        return Gain(size, seconds, self.seconds(size, COMPILED), (self.count(size, before), self.count(size, COMPILED)))


class Comparison:
    """What part of an uncompiled call's time a compiled one takes, over many sizes, weights and images. Calls of
    the same size, weights and image are compared: minutes later the machine may have other work."""

    def __init__(self):
        self._parts: OrderedDict[tuple, dict[str, list[float]]] = OrderedDict()

    def add(self, calls: Iterable[tuple[tuple, str, float]]) -> None:
        """calls: as of CallTimes.take_new."""
        for part, kind, seconds in calls:
            self._parts.setdefault(part, {EAGER: [], COMPILED: []})[kind].append(seconds)
            self._parts.move_to_end(part)
        while len(self._parts) > MOST_SIZES:
            self._parts.popitem(last=False)

    def clear(self) -> None:
        self._parts.clear()

    def _pairs(self) -> list[tuple[int, float, float]]:
        """(calls of the kind with fewer, seconds of an uncompiled one, of a compiled one) of each part that has both."""
        return [(min(len(eager), len(compiled)), _typical(eager), _typical(compiled))
                for eager, compiled in ((part[EAGER], part[COMPILED]) for part in self._parts.values()) if eager and compiled]

    @property
    def is_enough(self) -> bool:
        pairs = self._pairs()
        calls, seconds = sum(count for count, _, _ in pairs), sum(count * eager for count, eager, _ in pairs)
        return calls >= MOST_KEPT or (calls >= KEPT and seconds >= ENOUGH)

    @property
    def ratio(self) -> float:
        """The middle one, each part as often as it has calls of both."""
        ratios = sorted(compiled / eager for count, eager, compiled in self._pairs() for _ in range(count))
        return ratios[(len(ratios) - 1) // 2]
