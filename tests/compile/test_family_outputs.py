"""Every model family's own class, small and on the CPU: what a compiled model gives is what it gives eager."""
from __future__ import annotations

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions

from benchmarks.small_families import SMALL

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(4)]

TOLERANCE = 1e-3  # of the largest value
CALLS = {"base": {}, "resolution": dict(height=44, width=36), "tokens": dict(tokens=33), "batch": dict(batch=2)}
# Graphs beyond one per region: VACE's first block asks for its number; Cosmos' first gets a batch dimension of another stride.
# HiDream's experts pick their tokens by a mask: its graphs break there.
# LTX-AV's connectors run before it samples. HiDream-O1's vision model is for reference images only, and its other blocks run with and
# without what the first step has kept.
MORE_GRAPHS = {"Wan VACE": 1, "Cosmos": 1, "LTX-AV": -1}
# Where text and image lie in their sequence are numbers, of which torch takes the first for a constant.
NUMBERS = {"HiDream-O1", "MiniMax H3"}
BREAKS = {"HiDream"}
# Graphs more for another batch, by what a block asks: VACE's first for its number once more, LTX for its mask's batch.
ASK_FOR_BATCH = {"Wan VACE": 1, "LTXV": 1, "LTX-AV": 1, "Cosmos": 1, "Cosmos Predict2": 1, "HiDream-O1": 2}


def assert_one_graph_per_region(name: str, report, graphs: list[int]):
    """graphs: compiled in all, after each call."""
    base, resolution, tokens, batch = graphs
    assert base == len(report.regions) + MORE_GRAPHS.get(name, 0), report.recompiles
    if name in NUMBERS:
        assert base <= resolution <= tokens <= 2 * base and batch <= 2 * tokens, report.recompiles
    else:
        assert (resolution, tokens) == (base, base) and batch <= base + ASK_FOR_BATCH.get(name, 0), report.recompiles
# After a larger one, where parts of tensors are what torch makes of them.
ASK_AFTER_MORE = {"HunyuanVideo": 1, "HiDream-O1": 2}


@pytest.fixture(autouse=True)
def sampling():
    with torch.inference_mode():
        yield


@pytest.mark.rotating
@pytest.mark.parametrize("name", SMALL)
def test_every_family_gives_the_same_compiled_as_eager_at_any_size(comfy, name):
    family, graphs, differences = SMALL[name], [], []
    model = family.build()
    compiled = CompiledModule(CompileOptions(backend="aot_eager", mark_sizes=True))
    for sizes in CALLS.values():
        sizes = sizes if family.batches else {**sizes, "batch": 1}
        expected = family.call(model, **sizes)
        got = compiled.run(model, lambda sizes=sizes: family.call(model, **sizes), filter_guards=True, passthrough=lambda error: False)
        differences.append(((got - expected).abs().max() / expected.abs().max()).item())
        graphs.append(compiled.report.graphs)
    print(f"{name}: graphs {dict(zip(CALLS, graphs))}, regions {compiled.report.regions}, breaks {compiled.report.breaks}")
    assert compiled.report.failure == ""
    assert all(difference < TOLERANCE for difference in differences), dict(zip(CALLS, differences))
    if name not in BREAKS:
        assert_one_graph_per_region(name, compiled.report, graphs)


def graphs_beyond_regions(name: str, backend: str, calls: list[dict]) -> int:
    """Of a small model of that family, which gives at calls of these sizes what it gives eager."""
    family = SMALL[name]
    model, compiled = family.build(), CompiledModule(CompileOptions(backend=backend, mark_sizes=True))
    for sizes in calls:
        expected = family.call(model, **sizes)
        got = compiled.run(model, lambda sizes=sizes: family.call(model, **sizes), filter_guards=True, passthrough=lambda error: False)
        assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert compiled.report.failure == ""
    return compiled.report.graphs - len(compiled.report.regions)


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["Flux", "Wan", "Z-Image", "SDXL"])
def test_inductor_computes_what_eager_computes(comfy, name):
    assert graphs_beyond_regions(name, "inductor", [CALLS[call] for call in ("base", "batch", "base", "resolution")]) == 0


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["Wan", "Z-Image", "PixArt", "HunyuanVideo", "HiDream-O1"])
def test_a_batch_of_1_after_a_larger_one_compiles_nothing_unless_a_block_asks_for_it(comfy, name):
    calls = [CALLS["batch"], CALLS["base"], CALLS["tokens"], {"batch": 3, **CALLS["resolution"]}]
    assert graphs_beyond_regions(name, "aot_eager", calls) == ASK_AFTER_MORE.get(name, 0)


def spatial_transformers(width: int, count: int):
    """(their compiled module, a function that samples with them at a batch, each at its place in a UNet)"""
    from comfy.ldm.modules.attention import SpatialTransformer

    blocks = torch.nn.ModuleList(SpatialTransformer(width, 2, width // 2, context_dim=8) for _ in range(count))
    root, compiled = torch.nn.ModuleList([blocks]), CompiledModule(CompileOptions(backend="eager", mark_sizes=True))

    def run(batch: int, places: list[int]) -> torch.Tensor:
        x = torch.randn(batch, width, 4, 4)
        for block, place in zip(blocks, places, strict=True):
            x = block(x, torch.randn(batch, 5, 8), {"block": ("input", place)})
        return x
    return compiled, lambda *args: compiled.run(root, lambda: run(*args), filter_guards=True, passthrough=lambda error: False)


def test_a_model_that_was_compiled_before_costs_the_next_no_graph(comfy):
    """Torch remembers which numbers varied for code of the same name and line: SD1.5's block numbers before SDXL's."""
    graphs = []
    for width, places in ((64, [1, 1]), (96, [4, 4]), (128, [5, 6, 7])):
        compiled, sample = spatial_transformers(width, len(places))
        sample(2, places)
        graphs.append(compiled.report.graphs)
    assert graphs == [1, 1, 1]


def test_another_batch_is_no_graph_whichever_block_meets_it_first(comfy):
    compiled, sample = spatial_transformers(160, 3)
    sample(1, [1, 2, 4])
    sample(2, [5, 7, 8])
    assert compiled.report.graphs == 1, compiled.report.recompiles
