"""Attention that packs put in the place of a UNet block's (IPAdapter, PAG), and patches that ComfyUI calls around blocks (FreeU, SLG)."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.small_families import MORE, SMALL

sys.path.insert(0, str(Path(__file__).parent.parent / "compile"))
from test_right_under_change import cached, exported  # noqa: F401

ALL = {**SMALL, **MORE}
pytestmark = [pytest.mark.comfy, pytest.mark.rotating]
OVERRIDE = "optimized_attention_override"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def compiled(comfy):
    return in_process()


def in_process(backend="aot_eager"):
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    return CompiledModule(CompileOptions(backend=backend, mark_sizes=True))


class Replacement:
    """As IPAdapter's: asks the step in Python, reads the block, keeps a state."""

    def __init__(self, strength=1.0):
        self.strength, self.seen = strength, []

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        self.seen.append({key: value for key, value in extra_options.items() if key not in ("uuids", "sample_sigmas", "sigmas")})
        sigma = extra_options["sigmas"].cpu()[0].item()
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        return out + self.strength * sigma / 700 * (1 + extra_options["block"][1] + extra_options["block_index"]) * q


def everywhere(function, kind="attn2", index=None):
    """As Model.set_model_attn2_replace for all blocks, or for one of those in each transformer."""
    suffix = () if index is None else (index,)
    keys = [(place, number, *suffix) for place in ("input", "middle", "output") for number in range(9)]
    return {"patches_replace": {kind: dict.fromkeys(keys, function)}}


def run(compiled, family, model, patches, **shape):
    """Of the model with these patches, eager where compiled is None."""
    forward = model.forward

    def patched(x, timesteps, *args, transformer_options, **kwargs):
        options = {"transformer_index": 0, **transformer_options, **patches}
        result = forward(x, timesteps, *args, transformer_options=options, **kwargs)
        assert all(options[key] is value for key, value in patches.items())
        assert [*options][:2] == ["transformer_index", "wrappers"]  # in their order
        return result

    def call():
        return family.call(model, **{"tokens": 7, **shape})
    model.forward = patched
    try:
        return call() if compiled is None else compiled.run(model, call, filter_guards=True, passthrough=lambda error: False)
    finally:
        del model.forward


@pytest.mark.parametrize("name, kind, index", [("SD1.5", "attn2", None), ("SDXL", "attn1", 0), ("SDXL", "attn2", None)])
def test_one_graph_a_class_serves_every_block_step_weight_and_size(compiled, name, kind, index):
    family = ALL[name]
    model, graphs = family.build(), []
    shapes = {"batch": 2}, {"batch": 2, "height": 48}, {"batch": 3}  # 1 is compiled apart, without patches too
    for shape in shapes:
        run(compiled, family, model, {}, **shape)
    plain = compiled.report.graphs
    for strength, shape in zip((1.0, 0.5, 0.7, 2.0), (*shapes, shapes[0])):
        ours, theirs = Replacement(strength), Replacement(strength)
        want = run(None, family, model, everywhere(theirs, kind, index), **shape)
        for _ in range(2):
            ours.seen.clear()
            assert torch.equal(run(compiled, family, model, everywhere(ours, kind, index), **shape), want), (strength, shape)
            assert ours.seen == theirs.seen
        graphs.append(compiled.report.graphs)
    classes = sum("Transformer" in region for region, _ in compiled.report.regions)
    assert graphs == [plain + classes] * len(graphs) and not compiled.report.last_calls["eager"] and not compiled.report.breaks
    assert torch.equal(run(compiled, family, model, {}, **shape), run(None, family, model, {}, **shape))
    assert compiled.report.graphs == graphs[0] and not compiled.report.failure


def returns_value(q, k, v, extra_options):
    """PAG."""
    return v


def for_all(q, extra_options):
    return q[:1] * 0.25


def writes(q, extra_options):
    extra_options["mine"] = 1
    return q * 0.25


@pytest.mark.parametrize("then", [for_all, writes])
def test_one_that_does_something_else_later_is_run_as_eager_runs_it(compiled, then):
    family = SMALL["SD1.5"]
    model, state = family.build(), {}

    def fickle(q, k, v, extra_options):
        return q * 0.5 if state["behaves"] else then(q, extra_options)
    for state["behaves"] in (True, True, False, False, True, False):
        want = run(None, family, model, everywhere(fickle, "attn1"), batch=2)
        assert torch.allclose(run(compiled, family, model, everywhere(fickle, "attn1"), batch=2), want, atol=1e-5)
    assert not compiled.report.failure


class Keeps:
    """What another pack keeps of its inputs or its result is its own."""

    def __init__(self, what):
        self.what, self.kept, self.sums, self.results = what, [], [], {}

    def __call__(self, q, k, v, extra_options):
        self.sums.append(sum(float(tensor.abs().sum()) for tensor in self.kept))
        if self.what == "inputs":
            self.kept = [*self.kept, q, k, v][-24:]
            return q + sum(kept.mean() for kept in self.kept) * 0.1
        key = (extra_options["block"], extra_options["block_index"])
        if key not in self.results:
            self.results[key] = q * 0.5 + v.mean()
        self.kept = [*self.results.values()]
        return self.results[key]


@pytest.mark.parametrize("what", ["inputs", "result"])
def test_what_a_replacement_keeps_is_not_written_over(comfy, what):
    family = SMALL["SDXL"]
    model, compiled = family.build(), in_process("inductor")  # which uses memory again
    ours, theirs = Keeps(what), Keeps(what)
    for _ in range(3):
        want, got = run(None, family, model, everywhere(theirs, "attn1")), run(compiled, family, model, everywhere(ours, "attn1"))
        assert torch.allclose(got, want, atol=1e-4)
        torch.testing.assert_close(torch.tensor(ours.sums), torch.tensor(theirs.sums), rtol=1e-4, atol=1e-2)
    assert compiled.report.last_calls["graph"] and not compiled.report.failure


def test_one_that_writes_into_its_options_tells_the_next_of_its_block_and_is_called_as_often(compiled):
    family, model = SMALL["SDXL"], SMALL["SDXL"].build()
    counts = []

    def patches():
        state = {"calls": 0}
        counts.append(state)

        def first(q, k, v, extra_options):
            state["calls"] += 1
            extra_options["mine"] = state["calls"]
            return q * 0.5

        def second(q, k, v, extra_options):
            state["calls"] += 1
            return q * 0.1 * extra_options.pop("mine", 0) + state["calls"]
        return {"patches_replace": {**everywhere(first, "attn1")["patches_replace"], **everywhere(second)["patches_replace"]}}
    ours, theirs = patches(), patches()
    for _ in range(3):
        want = run(None, family, model, theirs)
        assert torch.equal(run(compiled, family, model, ours), want)
        assert counts[0] == counts[1]
    assert not compiled.report.last_calls["eager"]


def test_one_pack_that_does_not_fit_takes_nothing_from_another(compiled):
    family, model = SMALL["SD1.5"], SMALL["SD1.5"].build()
    graphs = []
    for function in (Replacement(1.0), lambda q, k, v, extra_options: q[:, :, :1], Replacement(0.5), Replacement(2.0)):
        patches = everywhere(function, "attn1")
        try:
            want = run(None, family, model, patches)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                run(compiled, family, model, patches)
        else:
            for _ in range(2):
                assert torch.equal(run(compiled, family, model, patches), want)
        graphs.append(compiled.report.graphs)
    assert graphs[2:] == graphs[1:2] * 2 and not compiled.report.last_calls["eager"]


@pytest.mark.parametrize("reads", ["in", "get", "late"])
def test_code_of_a_pack_that_torch_does_not_trace_sees_the_patches_around_blocks(comfy, monkeypatch, reads):
    import comfy.ldm.modules.attention as core

    compiled = in_process("eager")
    attend, calls = core.optimized_attention, []

    @torch.compiler.disable
    def other(q, k, v, *args, transformer_options=None, **kwargs):
        calls.append(1)
        options = transformer_options or {}
        there = {"in": lambda: "patches" in options, "get": lambda: options.get("patches") is not None,
                 "late": lambda: len(calls) > 10 and "input_block_patch" in options.get("patches", {})}[reads]()
        return attend(q, k, v, *args, **kwargs) * (0.5 if there else 1.0)
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(core, name, other)
    family, model = SMALL["SD1.5"], SMALL["SD1.5"].build()
    for patches in ({}, *[{"patches": {"input_block_patch": [lambda h, options: h]}}] * 2):
        calls.clear()
        want = run(None, family, model, patches)
        calls.clear()
        assert torch.equal(run(compiled, family, model, patches), want)


def test_several_kinds_come_and_go_on_one_model(compiled):
    family = SMALL["SDXL"]
    model = family.build()
    makes = {"plain": dict, "PAG": lambda: everywhere(returns_value, "attn1"),
             "both": lambda: {"patches_replace": {"attn1": {("middle", 0): returns_value}, **everywhere(Replacement())["patches_replace"]}},
             "with patches around blocks": lambda: {"patches": {"output_block_patch": [lambda h, skip, options: (h * 0.5, skip)]},
                                                    **everywhere(Replacement())},
             "with one inside": lambda: {"patches": {"attn1_output_patch": [lambda n, options: n * 0.5]}, **everywhere(Replacement())},
             "with an override": lambda: {OVERRIDE: lambda function, q, *args, **kwargs: function(q, *args, **kwargs) * 0.5,
                                          **everywhere(Replacement())}}
    graphs = 0
    for turn in range(2):
        for name, make in makes.items():
            want = run(None, family, model, make())
            for _ in range(2):
                assert torch.allclose(run(compiled, family, model, make()), want, atol=1e-5), name
        if turn == 0:
            graphs = compiled.report.graphs
    assert not compiled.report.failure and compiled.report.graphs - graphs <= 8  # what is traced is, for each function anew


def around(scale=0.5):
    """Patches that ComfyUI's models call before, between and after blocks."""
    def called(arguments):
        arguments["img"] = arguments["img"] * scale
        return arguments

    def replaced(arguments, extra):
        out = extra["original_block"](arguments)
        return {**out, "img": out["img"] * scale}
    return {"SD1.5": {"patches": {"output_block_patch": [lambda h, skip, options: (h * scale, skip)],
                                  "input_block_patch": [lambda h, options: h * scale]}},
            "Flux": {"patches_replace": {"dit": {("double_block", 0): replaced, ("single_block", 1): replaced}},
                     "patches": {"post_input": [called]}},
            "Qwen-Image": {"patches": {"double_block": [called]}}}


@pytest.mark.parametrize("name", around())
@pytest.mark.parametrize("keep", [True, False])
def test_patches_around_blocks_compile_nothing_and_artifacts_serve_them(comfy, tmp_path, name, keep):
    family = ALL[name]
    model, compiled = family.build(), cached(tmp_path / "cache") if keep else in_process()
    plain = run(None, family, model, {})
    for _ in range(2):
        assert torch.allclose(run(compiled, family, model, {}), plain, atol=1e-5)
    graphs, calls = compiled.report.graphs, dict(compiled.report.last_calls)
    assert not keep or calls["artifact"]
    for patches in (around(), around(0.25), {name: {}}):
        want = run(None, family, model, patches[name])
        assert torch.equal(want, plain) == (not patches[name])
        for _ in range(2):
            assert torch.allclose(run(compiled, family, model, patches[name]), want, atol=1e-5)
        assert compiled.report.graphs == graphs and compiled.report.last_calls == calls and not compiled.report.failure


def test_code_of_a_pack_in_a_block_sees_the_patches_around_it(compiled, monkeypatch):
    import comfy.ldm.flux.layers as layers
    import comfy.ldm.flux.math as core

    rope = core.attention

    def attention(q, k, v, pe, mask=None, transformer_options=None):
        scale = transformer_options.get("patches", {}).get("post_input", [lambda _: 1.0])[0](None)
        return rope(q, k, v, pe, mask, transformer_options=transformer_options) * scale
    monkeypatch.setattr(layers, "attention", attention)
    family = SMALL["Flux"]
    model = family.build()
    plain = run(None, family, model, {})
    assert torch.equal(run(compiled, family, model, {}), plain)
    for scale in (0.5, 0.25):
        patches = {"patches": {"post_input": [lambda given, scale=scale: scale if given is None else given]}}
        want = run(None, family, model, patches)
        assert not torch.equal(want, plain)
        for _ in range(3):
            assert torch.equal(run(compiled, family, model, patches), want)
    assert torch.equal(run(compiled, family, model, {}), plain)


class Asked(dict):
    """Notes the keys that are asked for while a block runs."""

    def __init__(self, values, inside, found):
        super().__init__(values)
        self.inside, self.found = inside, found

    def _note(self, key):
        if self.inside:
            self.found.add(key)

    def __contains__(self, key):
        self._note(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)

    def __iter__(self):
        self._note("all")
        return super().__iter__()

    def keys(self):
        self._note("all")
        return super().keys()

    def items(self):
        self._note("all")
        return super().items()


@pytest.mark.parametrize("name", ALL)
def test_no_block_of_comfyui_asks_for_patches_that_are_called_around_blocks(comfy, name):
    from int8_compile.compile.artifacts.stand_ins import OUTSIDE
    from int8_compile.compile.regions import find_regions

    family = ALL[name]
    model = family.build()
    inside, found = [], set()
    for region in find_regions(model):
        for module in region.modules:
            if module is not model:
                module.register_forward_pre_hook(lambda *_: inside.append(1))
                module.register_forward_hook(lambda *_: inside.pop() and None)
    given = {key: Asked({"another packs": {}}, inside, found) for key in OUTSIDE}
    forward = model.forward

    def patched(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, dict) and "sample_sigmas" in value:
                value.update(given)
        return forward(*args, **kwargs)
    model.forward = patched
    family.call(model, tokens=7)
    assert found.isdisjoint({"all", *OUTSIDE["patches"], *OUTSIDE["patches_replace"]}), found
