"""Every model family's own class, small and on the CPU: what a compiled model gives is what it gives eager."""
from __future__ import annotations

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions

from .small_families import SMALL

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-3  # of the largest value
CALLS = {"base": {}, "resolution": dict(height=44, width=36), "tokens": dict(tokens=33), "batch": dict(batch=2)}
# Off until the engine compiles each region once, whatever the sizes of a call.
ONE_GRAPH_PER_REGION = False
# HiDream's blocks pick the tokens of each expert by a mask: only the values tell how many there are, and the graph breaks there.
MORE_GRAPHS = {"HiDream"}


def assert_one_graph_per_region(name: str, report, graphs: list[int]):
    """graphs: compiled in all, after each call."""
    assert name in MORE_GRAPHS or graphs[0] == len(report.regions), report.recompiles
    assert graphs == graphs[:1] * len(graphs), report.recompiles


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """No kernel chosen by its input's size: oneDNN takes a convolution of more than 20480 values or of more than one image,
    which is a guard, and a graph more, that only CPUs have."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", SMALL)
def test_every_family_gives_the_same_compiled_as_eager_at_any_size(comfy, name):
    family, graphs, differences = SMALL[name], [], []
    model = family.build()
    compiled = CompiledModule(CompileOptions(backend="aot_eager", dynamic=True))
    for sizes in CALLS.values():
        expected = family.call(model, **sizes)
        got = compiled.run(model, lambda sizes=sizes: family.call(model, **sizes), filter_guards=True, passthrough=lambda error: False)
        differences.append(((got - expected).abs().max() / expected.abs().max()).item())
        graphs.append(compiled.report.graphs)
    print(f"{name}: graphs {dict(zip(CALLS, graphs))}, regions {compiled.report.regions}, breaks {compiled.report.breaks}")
    assert compiled.report.failure == ""
    assert all(difference < TOLERANCE for difference in differences), dict(zip(CALLS, differences))
    if ONE_GRAPH_PER_REGION:
        assert_one_graph_per_region(name, compiled.report, graphs)
