"""Objects among the arguments of a block that only keep values are taken apart; whatever else an object can do is refused by name."""
from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from test_right_under_change import cached, exported, inference, inputs, refused  # noqa: F401
from toys import difference


@dataclass
class Modulation:
    shift: torch.Tensor
    gate: torch.Tensor
    gain: float = 1.0


# A default is an attribute of the class, which could be read in the place of the object's own.
del Modulation.gain


class Derived(Modulation):
    @classmethod
    def of(cls, x, gain=1.0):
        return cls(x[:, :1], x[:, 1:2], gain)

    def apply(self, x):
        return (x + self.shift) * self.gate * self.gain


class Compressed:
    __slots__ = "data", "frames"

    def __init__(self, data, frames):
        self.data, self.frames = data, frames

    def expand(self):
        return self.data.repeat_interleave(self.frames, 1)


class Defaults(Derived):
    gain = 1.0


class Computed(Derived):
    @property
    def twice(self):
        return self.gain * 2


class Open(Derived):
    def __getattr__(self, name):
        raise AttributeError(name)


class Kind(enum.Enum):
    A = 1


class Adds(nets.Small):
    def forward(self, x, thing, transformer_options=None):
        return thing.apply(self.body(x))


class Expands(nets.Small):
    def forward(self, x, thing, transformer_options=None):
        return self.body(x) * thing.expand()


class Changes(nets.Small):
    def forward(self, x, thing, transformer_options=None):
        thing.gain = thing.gain + 1
        return self.body(x) * thing.gain


class Asks(nets.Small):
    def forward(self, x, thing, transformer_options=None):
        return self.body(x) * (2 if thing else 1)


def run(compiled, net, x, *things):
    def call():
        y = x
        for block, thing in zip(net.blocks, things * len(net.blocks)):
            y = block(y, thing)
        return y
    return compiled.run(net, call, filter_guards=True, passthrough=lambda error: False), call()


def check(compiled, net, x, thing, used="artifact"):
    for _ in range(2):  # the first may build
        got, want = run(compiled, net, x, thing)
        assert difference(got, want) < 1e-5
    assert compiled.report.last_calls[used] == len(net.blocks), (compiled.report.fallbacks, refused(compiled))


@pytest.mark.parametrize("kind, made", [(Adds, lambda x: Derived.of(x)), (Expands, lambda x: Compressed(x[:, ::2].contiguous(), 2))],
                         ids=["dataclass", "slots"])
def test_what_only_keeps_values_is_kept_and_serves_all_sizes_and_the_next_process(tmp_path, kind, made):
    net = nets.make(kind, depth=2)
    for _ in range(2):
        compiled = cached(tmp_path / "cache")
        for batch, tokens in ((2, 10), (2, 12), (3, 8), (1, 6)):
            x = torch.randn(batch, tokens, 32)
            check(compiled, net, x, made(x))
        assert len(compiled.report.artifacts) == 1


def test_a_number_or_a_none_in_it_counts(tmp_path):
    net, compiled, x = nets.make(Adds, depth=2), cached(tmp_path / "cache"), inputs()[0]
    check(compiled, net, x, Derived.of(x))
    assert run(compiled, net, x, Derived.of(x, 3.0))[0].equal(run(compiled, net, x, Derived.of(x, 3.0))[1])
    check(compiled, net, x, Derived.of(x))
    with_more = Derived.of(x)
    with_more.unknown = None
    got, want = run(compiled, net, x, with_more)
    assert difference(got, want) < 1e-5


@pytest.mark.parametrize("change", [
    lambda monkeypatch: monkeypatch.setattr(Derived, "apply", lambda self, x: x * 7),
    lambda monkeypatch: monkeypatch.setattr(Derived, "gate", property(lambda self: 7.0, lambda self, value: None), raising=False),
    lambda monkeypatch: monkeypatch.setattr(Modulation, "__getattribute__", lambda self, name: 7.0 if name == "gain" else
                                            object.__getattribute__(self, name)),
], ids=["a method", "a property", "how attributes are read"])
def test_another_class_is_not_served(tmp_path, monkeypatch, change):
    net, x = nets.make(Adds, depth=2), inputs()[0]
    compiled = cached(tmp_path / "cache")
    check(compiled, net, x, Derived.of(x))
    with monkeypatch.context() as patched:
        change(patched)
        for each in (compiled, cached(tmp_path / "cache")):
            got, want = run(each, net, x, Derived.of(x))
            assert difference(got, want) < 1e-5
    for each in (compiled, cached(tmp_path / "cache")):  # the second may find what was built meanwhile
        got, want = run(each, net, x, Derived.of(x))
        assert difference(got, want) < 1e-5


def test_what_is_more_than_its_values_is_refused_by_name(tmp_path):
    class Local(Derived):
        pass
    x = inputs()[0]
    for index, (kind, thing, why) in enumerate([
            (Adds, Defaults.of(x), "a Defaults"), (Adds, Computed.of(x), "a Computed"), (Adds, Open.of(x), "an argument is a Open"),
            (Adds, Local.of(x), "a Local"), (Asks, Kind.A, "a Kind"), (Changes, Derived.of(x), "it changes a Derived that it gets"),
            (Asks, torch.Generator(), "a Generator")]):
        net, compiled = nets.make(kind, depth=2), cached(tmp_path / str(index))
        want = run(cached(tmp_path / "none"), net, x, thing)[1]
        assert why in refused(compiled) or run(compiled, net, x, thing)[0].shape == want.shape
        assert compiled.report.calls["artifact"] == 0 and why in refused(compiled), (why, refused(compiled))


def test_one_object_that_is_there_twice_is_refused(tmp_path):
    net, compiled, x = nets.make(Both, depth=2), cached(tmp_path / "cache"), inputs()[0]
    thing = Derived.of(x)
    check(compiled, net, x, (Derived.of(x), Derived.of(x)))
    got, want = run(compiled, net, x, (thing, thing))
    assert difference(got, want) < 1e-5 and compiled.report.last_calls["artifact"] == 0 and "there twice" in refused(compiled)


class Both(nets.Small):
    def forward(self, x, things, transformer_options=None):
        first, second = things
        return first.apply(self.body(x)) * (2 if first is second else 1)


def test_an_artifact_for_a_class_that_is_gone_is_left_alone(tmp_path, monkeypatch):
    net, x = nets.make(Adds, depth=2), inputs()[0]
    check(cached(tmp_path / "cache"), net, x, Derived.of(x))
    thing = Derived.of(x)
    monkeypatch.delattr(sys.modules[__name__], "Derived")
    compiled = cached(tmp_path / "cache")
    got, want = run(compiled, net, x, thing)
    assert difference(got, want) < 1e-5 and compiled.report.calls["artifact"] == 0 and not compiled.report.failure
