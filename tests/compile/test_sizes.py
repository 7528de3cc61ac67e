"""Integers among the arguments that only act as sizes: one graph and one artifact for all of them; what looks at one otherwise is right."""
from __future__ import annotations

import collections
import enum
import numbers
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from int8_compile.compile.artifacts import artifact, compilers, origins, runtime
from int8_compile.compile.artifacts.shape_expressions import SizeConditions
from int8_compile.compile.artifacts.traced_calls import Recording
from int8_compile.compile.engine import CompiledModule
from test_right_under_change import COMPILED, cached, exported, inference, inputs, refused, run  # noqa: F401
from toys import difference

pytestmark = pytest.mark.rotating(3)

WHOLE = int, numbers.Rational
COMFYUI = origins.COMFYUI


@pytest.fixture(autouse=True)
def comfyuis_own(monkeypatch):
    """These blocks stand for ComfyUI's own: with a pack's, integers are constants."""
    monkeypatch.setattr(origins, "COMFYUI", (*origins.COMFYUI, __name__.partition(".")[0], nets.__name__.partition(".")[0]))


class Size(enum.IntEnum):
    SMALL = 3


class Plain(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x)


class LooksAtBatch(nets.Small):
    def forward(self, x, transformer_options=None):
        return self.body(x) * 3 if x.shape[0] == 1 else self.body(x)


class FillsReshaped(nets.Small):
    """At batch 1 it writes into what it takes, else into a copy."""

    def forward(self, x, transformer_options=None):
        rows = x.transpose(0, 1).reshape(-1, x.shape[-1])
        rows.mul_(2)
        return self.body(x)


class FillsRearranged(nets.Small):
    def forward(self, x, transformer_options=None):
        h = self.body(x)
        rows = h.transpose(0, 1).flatten(0, 1)
        rows += 1
        return h


class Parts(nets.Small):
    """Parts of the tokens by their bounds, as MiniMax H3 is told them."""

    def forward(self, x, bounds, transformer_options=None):
        h = self.body(x)
        return torch.cat([h[:, start:stop] * (row + 1) for start, stop, row in bounds], 1)


class Grid(nets.Small):
    def forward(self, x, hw, transformer_options=None):
        return self.body(x.unflatten(1, hw).transpose(1, 2).flatten(1, 2))


class Returns(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x), {"size": count + x.shape[1], "tokens": x.shape[1], "kind": "a"}, count * 2


class AsksType(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (count + 11 if isinstance(count, int) else 100)


class AsksTypeInTuple(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (count + 11 if isinstance(count, WHOLE) else 100)


class AsksClass(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (count + 11 if type(count) is int else 100)


class Matches(nets.Small):
    def forward(self, x, count, transformer_options=None):
        match count:
            case int():
                return self.body(x) * (count + 11)
        return self.body(x) * 100


class Texts(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * {"n 4": 5}.get(f"n {count}", 2)


class Converts(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (3 if str(count) == "4" else 2)


class LooksUp(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * {4: 5, 6: 7}.get(count, 2)


class Branches(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * count if count > 5 else self.body(x) + 5 * count


class Default(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (count or 9)


def one(net, sizes, tokens=12):
    x = inputs(tokens=tokens)[0]
    return (x, sizes), net(x, sizes)


def bounds(a, b):
    return [(0, a, 0), (a, b, 1), (b, 12, 3)]


@pytest.mark.parametrize("kind, values", [
    (Parts, [bounds(4, 7), bounds(2, 9), bounds(5, 8), bounds(4, 7)]), (Grid, [(3, 4), (2, 6), (4, 3)]), (Branches, [20, 30, 8, 20])])
def test_one_artifact_serves_all_integers_that_are_sizes(tmp_path, kind, values):
    net, compiled = nets.make(kind), cached(tmp_path / "cache")
    for index, value in enumerate(values):
        call, want = one(net, value)
        for _ in range(2):
            assert difference(run(compiled, net, *call), want) < 1e-5
        assert compiled.report.last_calls["artifact"] == 3, (index, refused(compiled))
    assert len(compiled.report.artifacts) == 1


@pytest.mark.parametrize("kind, values", [(Parts, [bounds(4, 7), bounds(2, 9), bounds(5, 8)]), (Grid, [(3, 4), (2, 6), (4, 3)])])
def test_one_graph_serves_all_integers_that_are_sizes(kind, values):
    net, compiled = nets.make(kind), CompiledModule(COMPILED)
    for value in values:
        call, want = one(net, value)
        assert difference(run(compiled, net, *call), want) < 1e-5
    assert compiled.report.graphs == 1 and compiled.report.last_calls["graph"] == 3, compiled.report.failure


@pytest.mark.parametrize("asked, batches", [(lambda batch: batch < 16, (2, 3, 1, 16, 20)), (lambda batch: batch % 2 == 0, (1, 2, 1, 4))])
def test_what_the_compiler_asks_of_a_size_is_asked_of_each_call(tmp_path, monkeypatch, asked, batches):
    """Inductor asks some ("batch < 16" for SD1.5's blocks), and takes the answer for granted in its code."""
    plain = compilers.COMPILERS["export"]

    def asks(program, job, path):
        sizes = [size for node in program.graph.nodes if node.op == "placeholder" for size in node.meta["val"].shape
                 if isinstance(size, torch.SymInt)]
        answers = [bool(asked(size)) for size in sizes[:1] if job.any_batch]
        plain(program, job, path)
        assert answers or not job.any_batch
    monkeypatch.setitem(compilers.COMPILERS, "export", asks)
    net, compiled = nets.make(Plain), cached(tmp_path / "cache")
    for batch in batches:
        x = inputs(batch=batch)[0]
        for _ in range(2):
            assert difference(run(compiled, net, x), net(x)) < 1e-5
        assert compiled.report.last_calls["artifact"] == 3, (batch, refused(compiled))
    assert len(compiled.report.artifacts) == 2


@pytest.mark.parametrize("batches", [(1, 2, 1, 3), (2, 1, 3, 1), (3, 2, 1)])
@pytest.mark.parametrize("kind", [LooksAtBatch, FillsReshaped, FillsRearranged])
def test_a_new_process_keeps_what_another_batch_needs_too(tmp_path, kind, batches):
    """Where batch 1 is a program of its own: a process that finds one of the two builds the other."""
    net = nets.make(kind)
    for batch in batches:
        compiled, x = cached(tmp_path / "cache"), inputs(batch=batch)[0]
        for _ in range(2):
            taken, given = x.clone(), x.clone()
            assert difference(run(compiled, net, taken), net(given)) < 1e-5 and torch.equal(taken, given)
        if kind is not FillsReshaped or batch == 1:  # which batches above 1 are told apart from by what is written into
            assert compiled.report.last_calls["artifact"] == 3 and not refused(compiled), (batch, refused(compiled))
    assert len(list((tmp_path / "cache").rglob("manifest.json"))) == 2 - (kind is FillsReshaped)


def test_a_condition_on_sizes_that_divides_by_nothing_is_not_fulfilled():
    body = {"leaves": [["float32", ["d0", 4], "c"]], "ranges": {"d0": [2, 1 << 62]}, "guards": ["(8 % (d0 // 16)) != 0"]}
    conditions = SizeConditions(body)
    assert conditions.hold_for([(48, 4)]) and not any(conditions.hold_for([shape]) for shape in ((2, 4), (1, 4), (48, 5)))


def test_other_compilers_learn_no_sizes():
    before = torch.compiler.config.dynamic_sources
    call, _ = one(nets.make(Grid), (3, 4))
    run(CompiledModule(COMPILED), nets.make(Grid), *call)
    assert torch.compiler.config.dynamic_sources == before


@pytest.mark.rotating
@pytest.mark.parametrize("kind", [AsksType, AsksTypeInTuple, AsksClass, Matches, Texts, Converts, LooksUp, Branches, Default])
@pytest.mark.parametrize("keep", [True, False])
def test_what_looks_at_an_integer_otherwise_is_right_for_each(tmp_path, kind, keep):
    net, compiled = nets.make(kind), cached(tmp_path / "cache") if keep else CompiledModule(COMPILED)
    for value in (6, 4, 7, 4, 0, 1, 6, -3, True, Size.SMALL, 1 << 40):
        call, want = one(net, value)
        for _ in range(2):
            assert difference(run(compiled, net, *call), want) < 1e-5, value


@pytest.mark.rotating
@pytest.mark.parametrize("kind", [AsksType, AsksTypeInTuple, AsksClass, Matches, Texts, Converts, LooksUp])
def test_an_integer_that_is_more_than_a_size_is_kept_for_its_value_and_others_are_refused_by_name(tmp_path, kind):
    net, compiled = nets.make(kind), cached(tmp_path / "cache")
    for value in (6, 4):
        call, want = one(net, value)
        for _ in range(2):
            assert difference(run(compiled, net, *call), want) < 1e-5
        assert compiled.report.last_calls["artifact"] == (3 if value == 6 else 0)
    assert "a number among its arguments differs from call to call" in refused(compiled)


def test_a_new_process_refuses_other_integers_by_the_same_name(tmp_path):
    net = nets.make(AsksType)
    for value in (6, 4):
        compiled = cached(tmp_path / "cache")
        call, want = one(net, value)
        for _ in range(2):
            assert difference(run(compiled, net, *call), want) < 1e-5
    assert "a number among its arguments differs from call to call" in refused(compiled)


def test_sizes_that_a_block_returns_are_those_of_the_call(tmp_path):
    block, compiled = Returns(), cached(tmp_path / "cache")
    net = torch.nn.Sequential(block, Returns())
    for count, tokens in ((5, 7), (9, 6), (1, 8)):
        x = inputs(tokens=tokens)[0]
        want = block(x, count)
        for _ in range(2):
            got = compiled.run(net, lambda x=x, count=count: block(x, count), filter_guards=True, passthrough=lambda error: False)
            assert difference(got[0], want[0]) < 1e-5 and got[1:] == want[1:]
        assert compiled.report.last_calls["artifact"] == 1, refused(compiled)
    assert all(type(item) is int for item in (got[1]["size"], got[2]))


def test_functions_that_never_see_the_type_of_an_integer_are_known():
    def asks(kind):
        code = kind.forward.__code__
        return Recording({(kind.__module__, kind.forward.__qualname__): code}).asks_of_integers()
    assert not any(map(asks, (Parts, Grid, LooksUp, Branches, Default)))
    assert all(map(asks, (AsksType, AsksTypeInTuple, AsksClass, Matches, Texts, Converts)))


class Numbered(torch.nn.Module):
    """Blocks that know their place, as Wan VACE's do."""

    def __init__(self, kind, depth=9):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(kind() for _ in range(depth))
        for index, block in enumerate(self.blocks):
            block.index = index

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class FirstIsOther(nets.Small):
    def forward(self, x):
        return self.body(x) if self.index == 0 else x + self.body(x) / self.index


class InText(nets.Small):
    def forward(self, x):
        return x + self.body(x) * {"layer 3": 2.0}.get(f"layer {self.index}", 0.5)


class Changes(nets.Small):
    def forward(self, x):
        self.index = self.index + 1
        return x + self.body(x) * self.index


@pytest.mark.rotating
@pytest.mark.parametrize("kind", [FirstIsOther, InText, Changes])
@pytest.mark.parametrize("keep", [True, False])
def test_blocks_that_know_their_place_are_right(tmp_path, kind, keep):
    net, other = Numbered(kind), Numbered(kind)
    compiled = cached(tmp_path / "cache") if keep else CompiledModule(COMPILED)
    for tokens in (10, 12, 9, 10):
        x = inputs(tokens=tokens)[0]
        assert difference(run(compiled, net, x), other(x)) < 1e-5
    assert [block.index for block in net.blocks] == [block.index for block in other.blocks]


def test_blocks_that_know_their_place_share_what_is_compiled(tmp_path):
    net, compiled, here = Numbered(FirstIsOther), cached(tmp_path / "cache"), CompiledModule(COMPILED)
    x = inputs()[0]
    for _ in range(3):
        want = net(x)
        assert difference(run(compiled, net, x), want) < 1e-5 and difference(run(here, net, x), want) < 1e-5
    assert compiled.report.last_calls["artifact"] == 9 and len(compiled.report.artifacts) == 3 == here.report.graphs  # 0, 1 and more
    net.blocks[4].index = 0
    want = net(x)
    assert difference(run(compiled, net, x), want) < 1e-5 and difference(run(here, net, x), want) < 1e-5


def test_a_place_that_is_more_than_a_number_is_kept_for_each(tmp_path):
    net, compiled = Numbered(InText, depth=4), cached(tmp_path / "cache")
    x = inputs()[0]
    for _ in range(7):
        assert difference(run(compiled, net, x), net(x)) < 1e-5
    assert compiled.report.last_calls["artifact"] == 4, refused(compiled)


TABLE = {4: 5.0, 6: 7.0}


class Tries(nets.Small):
    def forward(self, x, count, transformer_options=None):
        try:
            factor = TABLE[count]
        except (KeyError, TypeError):
            factor = 100.0
        return self.body(x) * factor


class Equals(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (2.0 if count == Size.SMALL else 100.0)


class Formats(nets.Small):
    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (2.0 if "%s" % count == "4" else 100.0)  # noqa: UP031


class Hidden(nets.Small):
    kind = int

    def forward(self, x, count, transformer_options=None):
        return self.body(x) * (2.0 if isinstance(count, self.kind) and hasattr(count, "numerator") else 100.0)


class IsOne(nets.Small):
    def forward(self, x):
        return x + self.body(x) * (2.0 if self.index is FOUR else 0.5)


FOUR = 4


class Computed(IsOne):
    @property
    def index(self):
        return self.__dict__["index"]

    @index.setter
    def index(self, value):
        self.__dict__["index"] = value + 1

    def forward(self, x):
        return x + self.body(x) * self.index


@pytest.mark.parametrize("kind", [Tries, Equals, Formats, Hidden])
def test_integers_of_a_packs_block_are_constants(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(origins, "COMFYUI", COMFYUI)
    net, compiled = nets.make(kind), cached(tmp_path / "cache")
    for value in (6, 4, 7, 3, 4, 6):
        call, want = one(net, value)
        for _ in range(2):
            assert difference(run(compiled, net, *call), want) < 1e-5, value


@pytest.mark.parametrize("kind", [IsOne, Computed])
@pytest.mark.parametrize("keep", [True, False])
def test_numbers_of_a_packs_block_are_constants(tmp_path, monkeypatch, kind, keep):
    monkeypatch.setattr(origins, "COMFYUI", COMFYUI)
    net, compiled = Numbered(kind, depth=6), cached(tmp_path / "cache") if keep else CompiledModule(COMPILED)
    for _ in range(4):
        x = inputs()[0]
        assert difference(run(compiled, net, x), net(x)) < 1e-5


@pytest.mark.parametrize("keep", [True, False])
def test_an_attribute_that_the_class_computes_is_none_of_them(tmp_path, keep):
    net, compiled = Numbered(Computed, depth=6), cached(tmp_path / "cache") if keep else CompiledModule(COMPILED)
    for _ in range(4):
        x = inputs()[0]
        assert difference(run(compiled, net, x), net(x)) < 1e-5


class Guides(nets.Small):
    """The parts of the batch by a list of numbers, as NAGuidance knows them."""

    def forward(self, x, kinds, transformer_options=None):
        h = self.body(x) + 0 * sum(kinds)
        if not (1 in kinds and 0 in kinds):
            return h
        part = h.shape[0] // len(kinds)
        rows = [h[part * place:part * (place + 1)] for place in (kinds.index(0), kinds.index(1))]
        return torch.cat([rows[0] * 2, rows[1] * 3 + (7.0 in kinds) + 2 * (2 not in kinds), h[2 * part:]])


@pytest.mark.parametrize("container", [list, tuple, collections.deque])
def test_a_number_that_varies_is_found_in_what_holds_it(container):
    net, compiled = nets.make(Guides), CompiledModule(COMPILED)
    for kinds in ([1, 0], [0, 1], [0], [1], [1, 0], [0, 1], [1, 0, 2], [0, 2, 1], [0, 1, 7], [3, 4]):
        x = inputs(batch=2 * len(kinds), tokens=12)[0]
        want = net(x, container(kinds))
        assert difference(run(compiled, net, x, container(kinds)), want) < 1e-5, kinds
        assert compiled.report.last_calls["graph"] == 3, compiled.report.fallbacks


@pytest.mark.parametrize("writes", [False, True])
def test_an_artifact_that_does_not_run_is_set_aside_and_the_image_is_eagers(tmp_path, monkeypatch, writes):
    class Block(nets.Small):
        def forward(self, x, transformer_options=None):
            return x.add_(self.body(x)) if writes else self.body(x)
    monkeypatch.setattr(sys.modules[__name__], "Block", Block, raising=False)
    Block.__qualname__ = "Block"
    plain = artifact.LOADERS["export"]

    def load(entry, device):
        program = plain(entry, device)

        def call(values):
            program(values)
            torch._assert(False, "expected size 2==1")
        return call
    monkeypatch.setitem(artifact.LOADERS, "export", load)
    net, compiled = nets.make(Block), cached(tmp_path / "cache")
    want = net(inputs()[0])
    for _ in range(4):
        got = compiled.run(net, lambda: net(inputs()[0]), filter_guards=True, passthrough=lambda error: False)
        assert difference(got, want) < 1e-5 and not compiled.report.failure
    assert any("its artifact does not run (AssertionError: expected size 2==1)" in text for text in compiled.report.fallbacks)


def test_an_artifact_is_not_blamed_for_what_another_call_did(tmp_path, monkeypatch):
    plain, full = artifact.LOADERS["export"], []

    def load(entry, device):
        program = plain(entry, device)

        def call(values):
            torch._assert(not full, "out of memory")
            return program(values)
        return call
    monkeypatch.setitem(artifact.LOADERS, "export", load)
    net, compiled = nets.make(Plain), cached(tmp_path / "cache")
    x = inputs()[0]

    def again():
        return compiled.run(net, lambda: net(x), filter_guards=True, passthrough=lambda error: "out of memory" in str(error))
    for _ in range(2):
        again()
    assert compiled.report.last_calls["artifact"] == 3
    full.append(True)
    with pytest.raises(AssertionError, match="out of memory"):
        again()
    full.clear()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "flatten", lambda *args: torch._assert(False, "another fault"))
        assert difference(again(), net(x)) < 1e-5
    assert "another fault" in compiled.report.failure and not refused(compiled)
