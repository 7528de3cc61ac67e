"""What a model gains: how long its calls take, by what ran them."""
from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

# What ran a call: the model as it came into the chain of nodes; with the chain's layers, uncompiled; compiled.
WITHOUT, EAGER, COMPILED = "without", "eager", "compiled"
BESIDE = "beside"  # as EAGER, but in the moments of WITHOUT: the others come minutes later, when a machine may have other times
KEPT = 3  # calls of a kind that say something
MOST_KEPT = 25  # the last, of compiled ones the first: what they are compared with was timed just before
MOST_SIZES = 64  # with other weights each counts anew
MAX_PENDING = 64  # calls that a GPU has not finished, or that nobody has taken; more are not timed, or forgotten
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


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile, since other work on the machine only adds; 0 of none."""
    return sorted(seconds)[(len(seconds) - 1) // 4] if seconds else 0.0


@dataclass(frozen=True)
class Call:
    """kind: EAGER or COMPILED. blocks: how many of the model's were called."""

    image: int
    size: str
    weights: Hashable
    kind: str
    blocks: int
    seconds: float = 0.0


class CallTimes:
    """Seconds of the last calls of each kind, of the first compiled ones, by size and, but for WITHOUT, weights (a LoRA that is added while
    a layer runs takes its time). On CUDA by the device's own clock, read when the device has come so far: nothing waits for it."""

    _images = itertools.count()

    def __init__(self):
        self.image = next(self._images)  # whose the next calls are
        self.weights: Hashable = None  # as that
        self._seconds: dict[tuple, dict[str, deque[float]]] = {}
        self._pending: deque[tuple] = deque()
        self._new: deque[Call] = deque(maxlen=MAX_PENDING)
        self._of_trial: Hashable = None  # weights with which BESIDE was timed
        self._lock = threading.Lock()  # ComfyUI calls the model from a thread for each GPU

    def begin(self, device: torch.device):
        """What end takes."""
        if device.type != "cuda":
            return time.perf_counter()
        self._read()
        start = torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        return start, device

    def end(self, begun, size: str, kind: str, blocks: int = 0) -> None:
        """kind: empty for a call that says nothing: something was compiled in it."""
        if not kind:
            return
        call = Call(self.image, size, self.weights, kind, blocks)
        if isinstance(begun, float):
            with self._lock:
                self._add(call, time.perf_counter() - begun)
        elif len(self._pending) < MAX_PENDING:
            start, device = begun
            end = torch.cuda.Event(enable_timing=True)
            end.record(torch.cuda.current_stream(device))
            self._pending.append((start, end, call))
            self._read()

    def _read(self) -> None:
        with self._lock:
            while self._pending and self._pending[0][1].query():
                start, end, call = self._pending.popleft()
                self._add(call, start.elapsed_time(end) / 1e3)

    def _add(self, call: Call, seconds: float) -> None:
        key = self._key(call.size, call.kind, call.weights)
        kinds = self._seconds.pop(key, {})
        self._seconds[key] = kinds  # the last used is last
        kept = kinds.setdefault(call.kind, deque(maxlen=None if call.kind == COMPILED else MOST_KEPT))
        if call.kind != COMPILED or len(kept) < MOST_KEPT:
            kept.append(seconds)
        while len(self._seconds) > MOST_SIZES:
            del self._seconds[next(iter(self._seconds))]
        if call.kind in (EAGER, COMPILED):
            self._new.append(replace(call, seconds=seconds))

    def take_new(self) -> list[Call]:
        """Calls since the last time."""
        self._read()
        with self._lock:
            new = list(self._new)
            self._new.clear()
            return new

    @staticmethod
    def _key(size: str, kind: str, weights: Hashable) -> tuple:
        """What calls are counted together."""
        return (size, kind) if kind in (WITHOUT, BESIDE) else (size, None, weights)

    def new_image(self) -> None:
        """The next calls are another image's."""
        self.image = next(self._images)

    def of_weights(self, identity: Hashable) -> None:
        """Of what weights the next calls are."""
        if self._of_trial is None:
            self._of_trial = identity
        self.weights = identity

    def _kept(self, size: str, kind: str) -> list[float]:
        self._read()
        with self._lock:
            return list(self._seconds.get(self._key(size, kind, self.weights), {}).get(kind, ()))

    def count(self, size: str, kind: str) -> int:
        return len(self._kept(size, kind))

    def seconds(self, size: str, kind: str) -> float:
        """Of a call; 0 where none is kept."""
        return typical(self._kept(size, kind))

    def without(self, size: str) -> float:
        """Seconds of WITHOUT, in the minutes of EAGER if that can be told."""
        then, now = self.seconds(size, BESIDE), self.seconds(size, EAGER)
        return self.seconds(size, WITHOUT) * (now / then if then and now and self.weights == self._of_trial else 1.0)

    def gain(self, size: str) -> Gain | None:
        """None while one of the two is not known."""
        before = WITHOUT if self.count(size, WITHOUT) else EAGER
        if not self.count(size, before) or not self.count(size, COMPILED):
            return None
        seconds = self.without(size) or self.seconds(size, EAGER)
        return Gain(size, seconds, self.seconds(size, COMPILED), (self.count(size, before), self.count(size, COMPILED)))
