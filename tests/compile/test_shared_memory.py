"""What a block writes into its input is seen by all that share its memory, under whatever name, and however it is laid out."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_right_under_change import COMPILED, TRACED, cached, exported, inference, run  # noqa: F401, I001
from toys import difference

from int8_compile.compile.engine import CompiledModule


class Thing:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class InheritsSlots(Slotted):
    __slots__ = ()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))

    def forward(self, x, *others, transformer_options=None):
        x.mul_(1.5)
        return self.layer(x) + self.other(x, *others, transformer_options=transformer_options)


class Buffered(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(12, 2, 32))

    def given(self, x):
        self.kept.copy_(x.transpose(0, 1))
        return self.kept.transpose(0, 1),

    def other(self, x, transformer_options=None):
        return self.kept.transpose(0, 1)


class Dense(Buffered):
    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(2, 12, 32)

    def given(self, x):
        self.kept.copy_(x)
        return self.kept,

    def other(self, x, transformer_options=None):
        return self.kept


class BufferWritten(Buffered):
    def forward(self, x, transformer_options=None):
        self.kept.mul_(1.5)
        return self.layer(x) + self.kept.transpose(0, 1)


class InRecord(Block):
    def given(self, x):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return x, Thing(x.transpose(0, 1))

    def other(self, x, thing, transformer_options=None):
        return thing.value.transpose(0, 1)


class InSlots(InRecord):
    def given(self, x):
        x, thing = super().given(x)
        return x, InheritsSlots(thing.value)


class InList(InRecord):
    def given(self, x):
        x, thing = super().given(x)
        return x, [{"value": thing.value}]

    def other(self, x, items, transformer_options=None):
        return items[0]["value"].transpose(0, 1)


class InOptions(InRecord):
    def other(self, x, thing, transformer_options=None):
        return transformer_options["image"].transpose(0, 1)


class Outside(InRecord):
    """Held by nobody whom the block is given."""

    def other(self, x, thing, transformer_options=None):
        return x


class Net(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = torch.nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            given = block.given(x)
            options = {"image": given[1].value} if isinstance(block, InOptions) else {}
            seen = given[0].transpose(0, 1)
            x = block(*given, transformer_options=options)
            x = x + seen.transpose(0, 1)
        return x


@pytest.mark.parametrize("kind", [Buffered, Dense, BufferWritten, InRecord, InSlots, InList, InOptions, Outside])
@pytest.mark.parametrize("how", ["eager", "aot_eager", "kept"])
def test_what_is_written_is_seen_under_its_other_names(tmp_path, kind, how):
    net = Net(kind).requires_grad_(False)
    compiled = {"eager": CompiledModule(COMPILED), "aot_eager": CompiledModule(TRACED), "kept": cached(tmp_path / "cache")}[how]
    for _ in range(3):
        x = torch.randn(2, 12, 32)
        want = net(x.clone())
        assert difference(run(compiled, net, x.clone()), want) < 1e-5
    assert sum(compiled.report.last_calls.values()) == 3  # the blocks


def scaled(x, factor=torch.empty(0), mask=torch.ones((0, 3))):  # noqa: B008  (as in ACE-Step)
    return x * factor if factor.numel() else x + mask.shape[0]


class HasEmptyDefault(Outside):
    def forward(self, x, *others, transformer_options=None):
        return scaled(self.layer(x))


def test_a_default_that_is_an_empty_tensor_is_kept_and_another_one_is_noticed(tmp_path):
    net, compiled = Net(HasEmptyDefault).requires_grad_(False), cached(tmp_path / "cache")
    before = scaled.__defaults__
    try:
        for defaults in (before, (torch.empty(0), torch.ones((0, 3))), (torch.full((1,), 3.0), before[1]),
                         (torch.empty(0), torch.ones(2, 0))):
            scaled.__defaults__ = defaults
            for _ in range(2):
                x = torch.randn(2, 12, 32)
                assert difference(run(compiled, net, x.clone()), net(x.clone())) < 1e-5
            assert defaults[0].numel() or defaults[1].shape[0] or compiled.report.last_calls["artifact"] == 3, compiled.report.fallbacks
    finally:
        scaled.__defaults__ = before
