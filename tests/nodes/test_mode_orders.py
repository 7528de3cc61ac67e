"""Lists of modes that alternate on one loaded model: each image is that of its own list, and compiled where the list says so."""
from __future__ import annotations

import json
import random

import pytest
import torch
from toys import difference, wait_for_builder

from .test_cache import cache_folder, restart  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
QUANTIZED = {"float": [], "rowwise": ["int8"], "convrot": ["convrot", "int8"], "smoothquant": ["smoothquant", "int8"],
             "kept": ["convrot", {"name": "int8", "config": {"keep_layers": ["double_blocks.*"]}}]}


@pytest.fixture
def ways(nodes):
    """How a list is applied: in one node, in two, or by the nodes that do the same."""
    def apply(model, chain):
        return nodes.ApplyModes(model, modes=json.dumps(chain))

    def by_nodes(model, chain, last):
        if chain:
            model = apply(model, chain)
        return nodes.INT8LazyTorchCompile(model, **last) if last else model
    return {
        "one node": lambda model, chain, last: apply(model, [*chain, {"name": "compile", "config": last}] if last else chain),
        "two nodes": lambda model, chain, last: apply(apply(model, chain), [{"name": "compile", "config": last}] if last else []),
        "compile node behind": by_nodes,
    }


def served(model) -> dict:
    """{what ran: calls of blocks} of the last step."""
    from int8_compile.compile.comfyui.compile_model import reports

    (report,) = reports(model)
    assert report.status().startswith("ready"), report.text()
    return report.last_calls


def play(flux, ways, sample, last, rounds, seed, first_time=lambda: None):
    """Samples in a random order; every list is met several times, with and without compile."""
    eager = {name: sample(ways["one node"](flux, chain, None)) for name, chain in QUANTIZED.items()}
    assert len({image.sum().item() for image in eager.values()}) == len(QUANTIZED)
    turns = [(name, way, compiled) for name in QUANTIZED for way in ways for compiled in (True, True, False)]
    random.Random(seed).shuffle(turns)
    seen = set()
    for name, way, compiled in turns[:rounds]:
        if compiled and name not in seen:
            seen.add(name)
            image = sample(ways[way](flux, QUANTIZED[name], last))
            assert difference(image, eager[name]) < 1e-3, (name, way)
            first_time()
        model = ways[way](flux, QUANTIZED[name], last if compiled else None)
        assert difference(sample(model), eager[name]) < 1e-3, (name, way, compiled)
        if compiled:
            calls = served(model)
            assert calls and not calls.get("eager"), (name, way, calls)
    assert torch.equal(sample(flux), eager["float"])
    return seen


@pytest.mark.rotating
@pytest.mark.parametrize("seed", range(2))
def test_lists_alternate_in_any_order_each_compiled_and_itself(load, nodes, ways, sample, seed):
    assert play(load(), ways, sample, {"backend": "aot_eager"}, 45, seed) == QUANTIZED.keys()


@pytest.mark.rotating
def test_compile_alone_behind_an_int8_list_of_the_same_session_compiles(load, nodes, ways, sample, restart):  # noqa: F811
    """With artifacts: they are of one structure each."""
    cache = restart()
    flux = load()
    last = {"backend": "inductor", "background": True}
    eager = {name: sample(ways["one node"](flux, QUANTIZED[name], None)) for name in ("float", "convrot")}
    for name in ("convrot", "float", "convrot", "float"):
        model = ways["one node"](flux, QUANTIZED[name], last)
        first = sample(model)
        wait_for_builder(cache)
        for image in (first, sample(model)):
            # Inductor rounds norms and activations otherwise in the last bit, which INT8 blows up to its own noise.
            assert difference(image, eager[name]) < (1e-3 if name == "float" else 0.01)
            assert name == "float" or difference(image, eager["float"]) > 2e-3
        assert {kind for kind, count in served(model).items() if count} == {"artifact"}, name
    places = {path.parent for path in cache.store.base.glob("*/*/*/*")}
    assert len(places) >= 4  # two regions of two structures


def test_what_may_not_follow_compile_is_refused_whichever_node_compiled(load, nodes, sample):
    from int8_compile.compile.modes import ModeOrderError

    flux = load()
    image = sample(flux)
    for compiled in (nodes.ApplyModes(flux, modes='["compile"]'), nodes.INT8LazyTorchCompile(flux), nodes.CompileModel(flux)):
        for more in ('["int8"]', '["compile"]', '["convrot", "int8", "compile"]'):
            with pytest.raises(ModeOrderError, match="nothing may follow compile"):
                nodes.ApplyModes(compiled, modes=more)
    assert torch.equal(sample(nodes.ApplyModes(flux, modes="[]")), image)


def test_a_compile_node_before_int8_compiles_the_int8_layers(load, nodes, sample):
    flux = load()
    eager = sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    compiled = nodes.INT8LazyTorchCompile(flux, backend="cudagraphs")
    quantized = nodes.INT8QuantizeModel(compiled, method="convrot")
    for model, want in ((quantized, eager), (compiled, sample(flux)), (quantized, eager)):
        assert difference(sample(model), want) < 1e-3 and not served(model).get("eager")


def test_apply_modes_shows_what_its_modes_report(load, sample):
    from int8_compile.nodes import ApplyModes

    def entry(output):
        ((shown,),) = output.ui["int8_compile"]
        return shown
    flux = load()
    output = ApplyModes.execute(flux, '["smoothquant", "int8", {"name": "compile", "config": {"backend": "aot_eager"}}]')
    before = entry(output)
    count = before["details"]["waiting"]
    assert before["status"] == (f"modes: smoothquant, int8, compile; measures and quantizes {count} layers at the first sampling; "
                                "compiles at the first sampling") and count > 10
    sample(output[0])
    shown = entry(output)
    for part in (f"quantized {count} layers", "least SQNR", "blocks: DoubleStreamBlock x2"):
        assert part in shown["text"]
    assert "ready: 2 regions, 5 blocks" in shown["status"] and not shown["warnings"]
    assert shown["details"]["modes"] == ["smoothquant", "int8", "compile"] and shown["details"]["methods"] == {"smoothquant": count}
    assert shown["details"]["graphs"] == 2
    # Each of two nodes says what it has done; the modes are those of the model.
    first = ApplyModes.execute(flux, '["convrot", "int8"]')
    second = ApplyModes.execute(first[0], '[{"name": "compile", "config": {"backend": "aot_eager"}}]')
    assert entry(first)["status"] == f"modes: convrot, int8; quantized {count} layers"
    assert entry(second)["status"] == "modes: convrot, int8, compile; compiles at the first sampling"
    assert entry(ApplyModes.execute(flux, ""))["text"] == "no modes: the model is as it was loaded"
    assert entry(ApplyModes.execute(flux, '["convrot"]'))["status"] == "modes: convrot"
