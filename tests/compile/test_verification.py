"""What was compiled is compared with eager where it runs; what is wrong is not used, and said."""
from __future__ import annotations

import functools
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from int8_compile.compile.artifacts.artifact import Artifact
from int8_compile.compile.artifacts.runtime import Cache
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.compile.verification import verifier
from int8_compile.compile.verification.difference import Difference, difference, is_right
from int8_compile.compile.verification.second_run import CallCopy, Unverifiable
from int8_compile.compile.verification.state import nothing_left
from int8_compile.compile.verification.verifier import VerificationOptions
from test_right_under_change import KEPT, Here, exported, inference, inputs, run  # noqa: F401


class Backend:
    """Of torch.compile: change(result, inputs) is what it makes of a graph's right result."""

    def __init__(self, change=None):
        self.change = change

    def __call__(self, graph, example_inputs):
        def compiled(*args):
            outputs = graph(*args)
            return outputs if self.change is None else (self.change(outputs[0], args), *outputs[1:])
        return compiled


class Looked:
    """A module compiled by such a backend. failures: that were recorded."""

    def __init__(self, change=None, cache=None, always=False):
        self.failures: list = []
        self.backend = Backend(change)
        options = KEPT if cache else CompileOptions(backend=self.backend, mark_sizes=True, dynamic=False)
        self.compiled = CompiledModule(options, cache=cache, verification=VerificationOptions(always, self._record))
        self.report = self.compiled.report

    def _record(self, failure) -> str:
        self.failures.append(failure)
        return "a file"

    def __call__(self, net, *args, passthrough=lambda error: False, **options):
        return self.compiled.run(net, lambda: net(*args, **options), filter_guards=True, passthrough=passthrough)


def one_row(x, args):
    x = x.clone()
    x[0, -1] *= 1.5
    return x


def one_nan(x, args):
    x = x.clone()
    x[0, 0, 0] = float("nan")
    return x


MUTATIONS = {"scaled": lambda x, args: x * 1.01, "without bias": lambda x, args: x - 0.1, "one row": one_row, "a NaN": one_nan,
             "other rows": lambda x, args: x.flip(0), "an infinity": lambda x, args: x / 0,
             "half precision": lambda x, args: x.half().float(),
             "another dtype": lambda x, args: x.double(),
             "another shape": lambda x, args: x[:, :-1]}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_graph_is_not_used_from_its_first_call_on(mutation, caplog):
    net, x, looked = nets.make(nets.Plain), inputs()[0], Looked(MUTATIONS[mutation])
    for _ in range(3):
        assert torch.equal(looked(net, x), net(x))
    assert looked.report.last_calls == {"artifact": 0, "graph": 0, "eager": 3} and looked.report.status().startswith("running uncompiled")
    failure, = looked.failures
    assert (failure.region, failure.kind, failure.dtype) == ("Plain", "graph", "float32") and failure.difference > 1e-4
    said, = [warning for warning in looked.report.warnings() if "computes something else" in warning]
    assert "Plain" in said and torch.__version__ in said and "emulate_precision_casts" in said
    assert "a file" in caplog.text and "a file" not in looked.report.text()


def test_what_is_right_is_looked_at_once_for_each_size(monkeypatch):
    looks = []
    call = verifier.Verification.call
    monkeypatch.setattr(verifier.Verification, "call", lambda self, *args: looks.append(args[2]) or call(self, *args))
    net, looked = nets.make(nets.Plain), Looked()
    for batch, tokens, count in ((2, 10, 1), (2, 10, 1), (2, 15, 1), (2, 16, 2), (4, 16, 3), (2, 10, 3), (2, 40, 4)):
        looked(net, inputs(batch, tokens)[0])
        assert looks == ["Plain"] * count
    assert looked.report.checked["Plain"][0] == "float32" and looked.report.last_calls["graph"] == 3
    assert "checked against eager: 1 class, difference 0x of float32's own rounding" in looked.report.text()


def test_a_fault_that_begins_at_a_size_is_found_at_that_size():
    def change(x, args):
        return x * 1.1 if x.shape[1] > 100 else x
    net, looked = nets.make(nets.Plain), Looked(change)
    for tokens in (10, 60, 200, 60):
        x = inputs(2, tokens)[0]
        assert torch.equal(looked(net, x), net(x))
        assert bool(looked.failures) == (tokens == 200 or bool(looked.failures))
    assert looked.failures and looked.failures[0].inputs[0] == "float32 [2, 200, 32]"


def test_now_and_then_another_block_is_looked_at_again(monkeypatch):
    monkeypatch.setattr(verifier, "AGAIN", 4)
    seen = []
    call = verifier.Verification.call
    monkeypatch.setattr(verifier.Verification, "call", lambda self, *args: seen.append(args[3]) or call(self, *args))
    net, looked = nets.make(nets.Plain, 5), Looked()
    for _ in range(16):
        looked(net, inputs()[0])
    blocks = [list(net.blocks).index(block) for block in seen]
    assert len(blocks) == 5 and len(set(blocks)) > 2


def test_always_looks_at_every_call():
    net, looked = nets.make(nets.Plain), Looked(lambda x, args: x + 1 if next(counter) == 7 else x, always=True)
    counter = iter(range(100))
    for _ in range(3):
        assert torch.equal(looked(net, inputs()[0]), net(inputs()[0]))
    assert len(looked.failures) == 1


def test_a_graph_that_is_compiled_later_is_looked_at_too():
    compiles = []

    class Later(Backend):
        def __call__(self, graph, example_inputs):
            compiles.append(graph)
            self.change = MUTATIONS["scaled"] if len(compiles) > 1 else None
            return super().__call__(graph, example_inputs)
    net, looked = nets.make(nets.Flags), Looked()
    looked.compiled = CompiledModule(CompileOptions(backend=Later(), mark_sizes=True, dynamic=False),
                                     verification=VerificationOptions(record=looked._record))
    for _ in range(4):
        got, want = looked(net, inputs()[0], shared={}), net(inputs()[0], shared={})
    assert looked.failures and torch.equal(got, want)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("kind", [nets.Appends, nets.Collects, nets.InPlace, nets.Flags, nets.Counts, nets.Remembers])
def test_a_look_leaves_no_trace(kind, wrong):
    net, looked = nets.make(kind), Looked(MUTATIONS["scaled"] if wrong else None)
    twin = nets.make(kind)
    for step in range(3):
        given = []
        for _ in range(2):
            x, y = inputs()
            given.append({nets.Appends: ([x, None, x, None], [0]), nets.Collects: ([],), nets.InPlace: (y[:, None],)}.get(kind, ()))
            given[-1] = (x.clone(), *given[-1])
        got, want = looked(net, *given[0]), twin(*given[1])
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), step
        for mine, others in zip(torch.utils._pytree.tree_leaves(given[0]), torch.utils._pytree.tree_leaves(given[1])):
            assert torch.allclose(mine, others, rtol=1e-5, atol=1e-6) if isinstance(mine, torch.Tensor) else mine == others
        for block, other in zip(net.blocks, twin.blocks):
            assert getattr(block, "calls", 0) == getattr(other, "calls", 0)
    assert bool(looked.failures) == wrong


class Held:
    def __init__(self):
        self.count = 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


def _write(block):
    block.written.add_(1)
    return block.written


def _of_parameter(block):
    block.weight_state.add_(1)
    return block.weight_state


def _of_list(block):
    block.tensors[0].mul_(2).add_(1)
    return block.tensors[0]


def _of_object(block):
    block.held.count += 1
    return block.held.count


def _of_slots(block):
    block.slotted.count += 1
    return block.slotted.count


def _of_nested(block):
    block.nested["a"][0]["b"] += 1
    return block.nested["a"][0]["b"]


def _of_array(block):
    block.array += 1
    return float(block.array[0])


STATES = (_write, _of_parameter, _of_list, _of_object, _of_slots, _of_nested, _of_array)


class Stateful(nets.Small):
    change = staticmethod(_write)

    def __init__(self, *args):
        super().__init__(*args)
        self.written, self.tensors, self.held, self.slotted = torch.zeros(1), [torch.zeros(2)[:1]], Held(), Slotted()
        self.weight_state = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.nested, self.array = {"a": ({"b": 0},)}, np.zeros(3)

    def forward(self, x, transformer_options=None):
        return self.body(x) * (1 + 0.01 * self.change(self))


@pytest.mark.parametrize("change", STATES)
def test_what_a_block_holds_is_as_after_one_call(change, monkeypatch):
    monkeypatch.setattr(Stateful, "change", staticmethod(change))
    device, (x, *_) = torch.device("cpu"), inputs()
    block, twin = nets.make(Stateful).blocks[0], nets.make(Stateful).blocks[0]
    for _ in range(2):
        with torch.inference_mode():
            with nothing_left(block, device) as trace:
                expected = block(x)
            assert trace.is_left
            assert torch.equal(expected, block(x)) and torch.equal(expected, twin(x))


@pytest.mark.parametrize("make", [lambda: torch.Generator().manual_seed(3), lambda: random.Random(3), lambda: np.random.default_rng(3),
                                  lambda: np.random.RandomState(3), lambda: np.random])
def test_random_generators_of_a_block_are_put_back(make):
    class Draws(nets.Small):
        def __init__(self, *args):
            super().__init__(*args)
            self.generator = make()

        def forward(self, x, transformer_options=None):
            if isinstance(self.generator, torch.Generator):
                return self.body(x) + torch.randn(x.shape, generator=self.generator)
            return self.body(x) * self.generator.random()
    np.random.seed(5)
    block, (x, *_) = nets.make(Draws).blocks[0], inputs()
    with pytest.raises(Unverifiable, match="random"), nothing_left(block, torch.device("cpu")):
        first = block(x)
    assert torch.equal(block(x), first) and not torch.equal(block(x), first)


def test_a_block_with_an_iterator_is_not_called_twice():
    block = nets.make(nets.Plain).blocks[0]
    block.turns = itertools.count()
    with pytest.raises(Unverifiable, match="iterator"), nothing_left(block, torch.device("cpu")):
        raise AssertionError("called")


def test_random_numbers_are_drawn_once_and_not_compared():
    class Noise(nets.Small):
        def forward(self, x, transformer_options=None):
            return self.body(x) + torch.randn_like(x)
    net, results = nets.make(Noise), []
    for looked in (Looked(), None):
        torch.manual_seed(7)
        random.seed(7)
        call = looked or run
        compiled = () if looked else (CompiledModule(CompileOptions(backend=Backend(), mark_sizes=True, dynamic=False)),)
        results.append([call(*compiled, net, inputs()[0].clone()) for _ in range(2)])
        if looked:
            assert not looked.failures and not looked.report.checked
    assert torch.equal(torch.randn(3), torch.randn(3)) is False and len(results) == 2


def test_memory_that_is_short_in_a_look_is_said_once_and_tried_later(monkeypatch):
    net, looked = nets.make(nets.Plain), Looked(MUTATIONS["scaled"])

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(verifier, "CallCopy", short)
    monkeypatch.setattr(verifier, "_LATER", 3)
    for _ in range(2):
        looked(net, inputs()[0])
    assert looked.report.last_calls["graph"] == 3
    assert [text for text in looked.report.fallbacks if "no memory to check Plain" in text] and not looked.failures
    monkeypatch.undo()
    for _ in range(4):
        got = looked(net, inputs()[0])
    assert looked.failures and torch.equal(got, net(inputs()[0])) and len(looked.report.fallbacks) == 2


class Stopped(Exception):
    pass


class Stops(nets.Small):
    stop = False

    def forward(self, x, transformer_options=None):
        self.calls = getattr(self, "calls", 0) + 1
        if Stops.stop:
            raise Stopped
        return self.body(x)


def test_an_interrupt_in_a_look_ends_the_prompt_and_leaves_no_trace(monkeypatch):
    net, looked = nets.make(nets.Plain), Looked()
    monkeypatch.setattr(verifier, "nothing_left", lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        looked(net, inputs()[0], passthrough=lambda error: isinstance(error, Stopped))
    monkeypatch.undo()
    assert torch.equal(looked(net, inputs()[0]), net(inputs()[0])) and looked.report.checked and not looked.report.warnings()
    block = nets.make(Stops).blocks[0]
    monkeypatch.setattr(Stops, "stop", True)
    with pytest.raises(Stopped), nothing_left(block, torch.device("cpu")):
        block(inputs()[0])
    assert "calls" not in block.__dict__


@pytest.mark.parametrize("change", ["other weights", "swapped"])
def test_an_artifact_that_is_wrong_is_used_in_no_process(tmp_path, monkeypatch, change):
    store = CacheStore(tmp_path / "cache", tmp_path / "key" / "cache.key")
    call = Artifact.__call__

    def wrong(self, tensors, leaves, options=()):
        if change == "swapped":
            return call(self, tensors, [leaves[0].flip(0), *leaves[1:]], options)
        return call(self, [tensor.roll(1) for tensor in tensors], leaves, options)
    def kept() -> int:
        return len([path for path in store.base.rglob("manifest.json") if not path.parent.name.startswith(".bad")])
    net, (x, scale) = nets.make(), inputs()
    Looked(cache=Cache(store, Here(store)))(net, x, scale)
    assert kept() == 1
    looked = Looked(cache=Cache(store, Here(store)))
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "__call__", wrong)
        for _ in range(3):
            assert torch.equal(looked(net, x, scale), net(x, scale))
    assert looked.failures[0].kind == "artifact" and looked.report.last_calls["eager"] == 3
    assert not kept()
    again = Looked(cache=Cache(store, Here(store)))
    for _ in range(2):
        assert (again(net, x, scale) - net(x, scale)).abs().max() < 1e-4
    assert again.report.last_calls["artifact"] == 3 and again.report.checked and not again.failures


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_otherwise_is_right_and_rounding_worse_is_not(dtype):
    torch.manual_seed(0)
    exact = torch.randn(4, 50, 64, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for _ in range(20):
        eager, compiled = ((exact * (1 + eps * torch.randn(exact.shape))).to(dtype) for _ in range(2))
        assert is_right([compiled], [eager], dtype, False, lambda: [exact.float()])[0]
    worse = (exact * (1 + 8 * eps * torch.randn(exact.shape))).to(dtype)
    assert not is_right([worse], [eager], dtype, False, lambda: [exact.float()])[0]
    assert is_right([worse], [worse * (1 + eps)], dtype, False, lambda: [exact.float()])[0]  # eager is as far off
    assert not is_right([worse], [eager], dtype, False, lambda: None)[0]


def test_differences_of_special_values():
    x = torch.randn(3, 4)
    hole, other = x.clone(), x.clone()
    hole[0, 0] = float("nan")
    other[1, 1] = float("inf")
    assert difference([hole], [hole.clone()]) == Difference(0.0, 0.0) and difference([x], [x.clone()]).total == 0
    assert difference([hole], [x]).total == difference([other], [x]).total == difference([x], []).total == float("inf")
    assert difference([x], [other]) == Difference(0.0, 0.0)  # eager's overflow alone
    assert difference([torch.zeros(2, 2)], [torch.zeros(2, 2)]).total == 0
    assert 1e20 < difference([torch.ones(2)], [torch.zeros(2)]).total < float("inf")
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]).total == float("inf")
    assert difference([torch.empty(0, 4)], [torch.empty(0, 4)]).total == 0
    one, more = (torch.view_as_complex(torch.full((3, 2), value)) for value in (1.0, 1.5))
    assert difference([one], [more]).total == pytest.approx(1 / 3)


def test_copies_lie_as_the_originals_and_share_what_they_share():
    whole = torch.randn(4, 6, 8)
    x, y, wide = whole.transpose(1, 2), whole[1], torch.randn(5, 1).expand(5, 3)
    options = {"inner": [x, {"y": y}], "text": "a"}
    copy = CallCopy((x, y, wide, options), {"again": options, "x": x})
    a, b, c, copied = copy.args
    for mine, theirs in ((x, a), (y, b), (wide, c)):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.storage_offset() == theirs.storage_offset()
        assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert copied is copy.kwargs["again"] is not options and copied["inner"][0] is a is copy.kwargs["x"] and copied["inner"][1]["y"] is b
    marked = torch.randn(3)
    marked.note = 1
    holder = type("Holder", (dict,), {})()
    for value in (marked, holder, torch.randn(3, 3).to_sparse()):
        with pytest.raises(Unverifiable):
            CallCopy((value,), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_at_the_ends_of_a_dtype_are_compared(dtype):
    big = 1e30 if dtype is not torch.float16 else 6e4
    for scale in (0.0, torch.finfo(dtype).tiny, big):
        one = (torch.rand(2, 5, 8) * scale).to(dtype)
        assert is_right([one], [one.clone()], dtype, False, lambda: None)[0]
        assert is_right([one * (1 + torch.finfo(dtype).eps)], [one], dtype, False, lambda: None)[0]
        if scale:
            assert not is_right([one * 0.7], [one], dtype, False, functools.partial(list, [one.double()]))[0]


def test_an_overflow_of_eager_alone_is_no_fault_and_one_of_compiled_code_is():
    expected = torch.randn(2, 5, 8, dtype=torch.float16)
    found = expected.clone()
    expected[0, 0, 0] = torch.inf
    assert is_right([found], [expected], torch.float16, False, lambda: None)[0]
    assert not is_right([expected], [found], torch.float16, False, lambda: None)[0]


def test_where_eager_underflows_to_zero_the_exact_result_decides():
    exact = torch.full((2, 5, 8), 1e-9)
    zero, near = torch.zeros(2, 5, 8, dtype=torch.float16), torch.full((2, 5, 8), 6e-8).half()
    assert not is_right([near], [zero], torch.float16, False, lambda: [zero.float()])[0]
    assert is_right([exact.half()], [zero], torch.float16, False, lambda: [exact])[0]


def test_one_huge_row_hides_no_other():
    expected = torch.randn(1, 64, 32)
    expected[0, 5] *= 1e4
    found = expected.clone()
    found[0, 9] *= -1
    assert not is_right([found], [expected], torch.bfloat16, False, lambda: [expected])[0]
    assert is_right([expected * 1.001], [expected], torch.bfloat16, False, lambda: None)[0]


def test_an_infinity_is_one_of_the_same_sign():
    expected = torch.randn(2, 8)
    expected[0, 0] = torch.inf
    for value, right in ((torch.inf, True), (-torch.inf, False), (torch.nan, False)):
        found = expected.clone()
        found[0, 0] = value
        assert is_right([found], [expected], torch.float32, False, lambda: None)[0] == right


class Experts(nets.Small):
    """One of two, by a value that is nearly a tie."""

    def forward(self, x, transformer_options=None):
        x = self.body(x)
        return x * (1 + torch.stack([x[..., 0], x[..., 0]], -1).topk(1).indices)


class Halves(nets.Small):
    """fp32 outside, computed in bfloat16."""

    def forward(self, x, transformer_options=None):
        return x + self.body(x).bfloat16().float()


def test_near_ties_and_what_a_block_rounds_inside_are_no_fault():
    def other_expert(x, args):
        x = x.clone()
        x[0, 0] *= 2
        return x
    for kind, change in ((Experts, other_expert), (Halves, lambda x, args: x * 1.002)):
        net, looked = nets.make(kind), Looked(change)
        looked(net, inputs(2, 60)[0])
        assert not looked.failures, kind
        looked = Looked(MUTATIONS["other rows"])
        looked(nets.make(kind), inputs(2, 60)[0])
        assert looked.failures


def test_where_each_size_is_compiled_each_is_looked_at():
    def change(x, args):
        return x * 1.1 if x.shape[1] == 100 else x
    net, looked = nets.make(nets.Plain), Looked(change)
    looked.compiled = CompiledModule(CompileOptions(backend=Backend(change), dynamic=False),
                                     verification=VerificationOptions(record=looked._record))
    for tokens in (70, 100, 70):
        x = inputs(2, tokens)[0]
        assert torch.equal(looked(net, x), net(x))
    assert looked.failures


def test_without_memory_for_the_exact_result_what_is_far_off_is_not_used(monkeypatch):
    net, looked = nets.make(nets.Plain), Looked(MUTATIONS["scaled"])

    def short(*args):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(verifier, "weights_in", short)
    for _ in range(3):
        assert torch.equal(looked(net, inputs()[0]), net(inputs()[0]))
    assert looked.failures


def test_a_new_size_is_looked_at_at_once_in_the_turn_of_another_block(monkeypatch):
    monkeypatch.setattr(verifier, "AGAIN", 1)
    net, looked = nets.make(nets.Plain, 5), Looked(lambda x, args: x * 1.1 if x.shape[1] > 100 else x)
    for _ in range(3):
        looked(net, inputs(2, 10)[0])
    x = inputs(2, 200)[0]
    assert torch.equal(looked(net, x), net(x)) and looked.failures
