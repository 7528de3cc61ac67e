"""What packs put before and behind a UNet block's attention: HyperTile, ToMe, ControlNet-LLLite, hypernetworks."""
from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.small_families import MORE, SMALL

sys.path.insert(0, str(Path(__file__).parent))
from test_replaced_attention import OVERRIDE, everywhere, in_process, run

ALL = {**SMALL, **MORE}
pytestmark = [pytest.mark.comfy, pytest.mark.rotating]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def operations(comfy):
    """As the compile nodes do."""
    from int8_compile.compile.comfyui.attention import add_functions

    add_functions()


@pytest.fixture
def compiled(comfy):
    return in_process()


class Model:
    """What nodes write their patches into."""

    def __init__(self):
        self.patches = {}

    def clone(self):
        return self

    def set_model_attn1_patch(self, patch):
        self.patches["attn1_patch"] = [patch]

    def set_model_attn1_output_patch(self, patch):
        self.patches["attn1_output_patch"] = [patch]


def hypertile(size=128, swap=2, depth=2):
    from comfy_extras.nodes_hypertile import HyperTile

    model = Model()
    HyperTile.execute(model, size, swap, depth, False)
    return model.patches


def tome(ratio=0.3):
    from comfy_extras.nodes_tomesd import TomePatchModel

    model = Model()
    TomePatchModel.execute(model, ratio)
    return model.patches


def lllite(strength=1.0):
    """As ControlNet-LLLite's, which keep the number of tokens."""
    def patch(q, k, v, extra_options):
        scale = strength * (1 + extra_options["block"][1] + extra_options["block_index"])
        return q * (1 + 0.01 * scale), k, v
    return {"attn1_patch": [patch], "attn2_patch": [patch]}


def everything(scale=0.5):
    return {"attn1_patch": [lambda n, k, v, options: (n * scale, k, v)] * 2, "attn1_output_patch": [lambda n, options: n * scale],
            "middle_patch": [lambda x, options: x + scale], "attn2_output_patch": [lambda n, options: n - scale],
            "attn2_patch": [lambda n, k, v, options: (n, k[:, :5] * scale, v[:, :5])]}


def both(compiled, family, model, make, **shape):
    """(result, eager's): each with patches of its own and the same random numbers."""
    results = []
    for by in (compiled, None):
        torch.manual_seed(5)
        patches = make()
        results.append(run(by, family, model, {"patches": patches} if patches else {}, **shape))
    return results


@pytest.mark.parametrize("name, makes", [
    ("SD1.5", [hypertile, lambda: hypertile(256), lambda: hypertile(64, 4, 1)]),
    ("SD1.5", [tome, lambda: tome(0.5), lambda: tome(0.1)]),
    ("SDXL", [lllite, lambda: lllite(0.5), lambda: lllite(2.0)]),
    ("SD1.5", [everything, lambda: everything(0.25), lambda: everything(2.0)]),
], ids=["HyperTile", "ToMe", "LLLite", "every kind"])
def test_one_graph_a_class_serves_every_value_size_and_step(compiled, name, makes):
    family = ALL[name]
    model, graphs = family.build(), []
    shapes = {"batch": 2, "height": 32, "width": 32}, {"batch": 2, "height": 48, "width": 64}, {"batch": 3, "height": 64, "width": 48}
    for shape in shapes:
        run(compiled, family, model, {}, **shape)
    plain = compiled.report.graphs
    for make, shape in zip((*makes, makes[0]), (*shapes, shapes[0])):
        assert not torch.equal(both(None, family, model, dict, **shape)[0], both(None, family, model, make, **shape)[0])
        for _ in range(2):
            got, want = both(compiled, family, model, make, **shape)
            assert torch.equal(got, want), shape
        graphs.append(compiled.report.graphs)
    classes = sum("Transformer" in region for region, _ in compiled.report.regions)
    assert graphs == [plain + classes] * len(graphs) and not compiled.report.last_calls["eager"] and not compiled.report.breaks
    assert torch.equal(*both(compiled, family, model, dict, **shape))
    assert compiled.report.graphs == graphs[0] and not compiled.report.failure


@pytest.mark.parametrize("make", [lambda: hypertile(64), lambda: tome(0.5), everything], ids=["HyperTile", "ToMe", "every kind"])
def test_compiled_by_inductor_they_are_what_eager_makes_of_them(comfy, make):
    family = SMALL["SD1.5"]
    model, compiled = family.build(), in_process("inductor")
    for shape in ({"batch": 2, "height": 32, "width": 32}, {"batch": 2, "height": 48, "width": 64}) * 2:
        got, want = both(compiled, family, model, make, **shape)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert compiled.report.last_calls["graph"] and not compiled.report.last_calls["eager"] and not compiled.report.failure


def test_int8_layers_take_as_many_tokens_as_a_patch_gives(comfy):
    from int8_compile.int8.linear import Int8Linear

    family = SMALL["SD1.5"]
    model, compiled = family.build(), in_process("inductor")
    for name, module in list(model.named_modules()):
        if "transformer_blocks" in name and type(module).__name__ == "Linear" and module.in_features % 16 == 0:
            model.set_submodule(name, Int8Linear.from_float(module.weight, module.bias))
    for shape in ({"batch": 2, "height": 32, "width": 32}, {"batch": 2, "height": 48, "width": 64}):
        got, want = both(compiled, family, model, lambda: hypertile(64), **shape)
        assert (got - want).norm() < 2e-2 * want.norm()  # a last bit before rounding
    assert compiled.report.last_calls["graph"] and not compiled.report.last_calls["eager"] and not compiled.report.failure


@pytest.mark.parametrize("kind", ["attn1_patch", "attn2_patch", "attn1_output_patch", "middle_patch"])
@pytest.mark.parametrize("then", ["for all", "another type", "fewer tokens", "writes"])
def test_one_that_does_something_else_later_is_run_as_eager_runs_it(compiled, kind, then):
    family, state = SMALL["SD1.5"], {}
    model = family.build()

    def change(n, options):
        if then == "writes":
            options["mine"] = 1
        return {"for all": lambda: n[:1] * 0.25, "another type": lambda: n.double(), "fewer tokens": lambda: n[:, ::2],
                "writes": lambda: n * 0.25}[then]()

    def make():
        def before(n, context, value, options):
            return (n * 0.5 if state["behaves"] else change(n, options)), context, value

        def behind(n, options):
            return n * 0.5 if state["behaves"] else change(n, options)
        return {kind: [before if kind in ("attn1_patch", "attn2_patch") else behind]}
    for state["behaves"] in (True, True, False, False, True, False):
        try:
            want = run(None, family, model, {"patches": make()}, batch=2)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
                run(compiled, family, model, {"patches": make()}, batch=2)
        else:
            assert torch.allclose(run(compiled, family, model, {"patches": make()}, batch=2), want, atol=1e-5)
    assert not compiled.report.failure


def test_an_error_of_a_patch_is_raised_as_its_own_and_the_next_call_is_compiled(compiled):
    family, state = SMALL["SD1.5"], {"raises": False}
    model = family.build()

    def patch(n, context, value, options):
        if state["raises"]:
            raise ValueError("of the patch")
        return n * 0.5, context, value
    for state["raises"] in (False, False, True, False):
        if state["raises"]:
            with pytest.raises(ValueError, match=r"^of the patch$"):
                run(compiled, family, model, {"patches": {"attn1_patch": [patch]}})
        else:
            assert torch.equal(*both(compiled, family, model, lambda: {"attn1_patch": [patch]}))
    assert not compiled.report.failure and not compiled.report.last_calls["eager"]


class Keeps:
    """What another pack keeps of what it got or gave is its own."""

    def __init__(self):
        self.kept, self.sums = [], []

    def before(self, n, context, value, options):
        self.sums.append(sum(float(tensor.abs().sum()) for tensor in self.kept))
        result = n * 0.5
        self.kept = [*self.kept, n, context, value, result][-24:]
        return result, context, value

    def behind(self, n, options):
        self.kept = [*self.kept, n][-24:]
        return n


def test_what_a_patch_keeps_is_not_written_over(comfy):
    family = SMALL["SDXL"]
    model, compiled = family.build(), in_process("inductor")  # which uses memory again
    ours, theirs = Keeps(), Keeps()
    for _ in range(3):
        got, want = (run(by, family, model, {"patches": {"attn1_patch": [keeps.before], "attn1_output_patch": [keeps.behind]}})
                     for by, keeps in ((compiled, ours), (None, theirs)))
        assert torch.allclose(got, want, atol=1e-4)
        torch.testing.assert_close(torch.tensor(ours.sums), torch.tensor(theirs.sums), rtol=1e-4, atol=1e-2)
    assert compiled.report.last_calls["graph"] and not compiled.report.failure


def test_all_of_a_block_get_one_dict_in_the_order_of_eager(compiled):
    family = SMALL["SDXL"]
    model = family.build()

    def make():
        seen = []

        def note(kind, options):
            seen.append((kind, options.get("last"), options["block"], options["block_index"], options["n_heads"],
                         options["activations_shape"], options["attn_precision"]))
            options["last"] = kind

        def before(kind):
            return lambda n, context, value, options: (note(kind, options), (n, context, value))[1]

        def behind(kind):
            return lambda n, options: (note(kind, options), n)[1]

        def replaced(q, k, v, options):
            note("attn2", options)
            return q * 0.5
        return seen, {"patches": {"attn1_patch": [before("a")], "attn1_output_patch": [behind("b")], "middle_patch": [behind("c")],
                                  "attn2_patch": [before("d")], "attn2_output_patch": [behind("e")]}, **everywhere(replaced)}
    (ours, our_patches), (theirs, their_patches) = make(), make()
    for _ in range(3):
        want, got = run(None, family, model, their_patches), run(compiled, family, model, our_patches)
        assert torch.equal(got, want) and ours == theirs
    assert not compiled.report.last_calls["eager"]


def test_what_patches_write_into_the_context_is_there_for_later_blocks(compiled):
    family = SMALL["SDXL"]
    model = family.build()

    def make(later=False):
        calls = []

        def write(n, context, value, options):
            calls.append(1)
            if not later or len(calls) > 3:
                context.mul_(0.9)
            return n, context, value
        return {"attn2_patch": [write]}
    for later in (False, True):
        for _ in range(2):
            assert torch.equal(*both(compiled, family, model, lambda later=later: make(later)))
    assert not compiled.report.last_calls["eager"] and not compiled.report.failure


def test_what_patches_hand_on_in_their_options_is_one_graph_for_all(compiled):
    family, graphs = SMALL["SD1.5"], []
    model = family.build()

    def make():
        def put(n, context, value, options):
            options["mine"], options["block_index"] = n.mean(), 7
            return n, context, value
        return {"attn1_patch": [put], "attn1_output_patch": [lambda n, options: n + options.pop("mine")]}
    for _ in range(3):
        assert torch.equal(*both(compiled, family, model, make))
        graphs.append(compiled.report.graphs)
    assert len({*graphs}) == 1 and not compiled.report.breaks and not compiled.report.failure


def test_one_result_for_all_tokens_is_added_to_each(compiled):
    family, state = SMALL["SD1.5"], {}
    model = family.build()

    def make():
        return {"attn1_patch": [lambda n, context, value, options: (n + torch.rand(1), context, value)],
                "attn1_output_patch": [lambda n, options: n.mean(**state["mean"]) if state["mean"] else n]}
    for state["mean"] in ({}, {}, {"dim": 1, "keepdim": True}, {"dim": (0, 1)}, {}):
        assert torch.equal(*both(compiled, family, model, make))
    assert not compiled.report.last_calls["eager"] and not compiled.report.failure


def test_beside_an_override_a_replacement_and_patches_around_blocks(compiled):
    family = SMALL["SDXL"]
    model = family.build()
    makes = {"plain": dict, "HyperTile": lambda: {"patches": hypertile(64)},
             "an override": lambda: {OVERRIDE: lambda function, q, *args, **kwargs: function(q, *args, **kwargs) * 0.5,
                                     "patches": hypertile(64)},
             "a replacement": lambda: {"patches": tome(), **everywhere(lambda q, k, v, options: q * 0.5)},
             "patches around blocks": lambda: {"patches": {
                 "output_block_patch": [lambda h, skip, options: (h * 0.5, skip)], **hypertile(64)}}}
    graphs = 0
    for turn in range(2):
        for name, make in makes.items():
            for _ in range(2):
                results = []
                for by in (compiled, None):
                    torch.manual_seed(7)
                    results.append(run(by, family, model, make(), height=32, width=48))
                assert torch.equal(*results), (turn, name)
        if turn == 0:
            graphs = compiled.report.graphs
    assert compiled.report.graphs == graphs and not compiled.report.failure and not compiled.report.last_calls["eager"]
