"""Blocks lowered for a card that is not there, by the script that makes the table of results."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import lowered_blocks

CARD = "NVIDIA GeForce RTX 4090"
RESULTS = lowered_blocks.ROOT / "benchmarks" / "results"
SMALL = ("--width", "256", "--pixels", "256", "--text", "64")


@pytest.fixture(scope="module")
def lowered():
    """{family: {class: graph}} of small INT8 blocks, each family in a process of its own: torch is told there that it is on a card."""
    if importlib.util.find_spec("triton") is None or sys.platform != "linux":
        pytest.skip("needs Triton and a CUDA build of torch")
    environment = {**{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}, "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, lowered_blocks.__file__, "--card", CARD, "--weights", "int8", *SMALL, "--no-cubins"]
    running = {family: subprocess.Popen([*arguments, "--family", family], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True) for family in ("flux", "wan")}
    found = {}
    for family, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        found[family] = lowered_blocks.graphs_of(json.loads(out.splitlines()[-1]), "int8")
    return found


@pytest.mark.comfy
def test_each_class_of_int8_blocks_lowers_to_one_graph_for_cuda(lowered):
    assert list(lowered["flux"]) == ["DoubleStreamBlock", "SingleStreamBlock"] and list(lowered["wan"]) == ["WanAttentionBlock"]
    kinds = {name: Counter(call.kind for call in graph.calls) for name, graph in lowered["flux"].items()}
    assert kinds["DoubleStreamBlock"]["int8 gemm"] == 10 and kinds["SingleStreamBlock"]["int8 gemm"] == 3
    for kind in kinds.values():
        assert kind["attention"] == kind["rope"] == 1 and not kind["gemm"] and not kind["other"], kind


@pytest.mark.comfy
def test_q_k_and_v_are_products_of_one_quantization_on_cuda(lowered):
    """Flux has one layer for the three; in Wan they are three, and k and v of the prompt two."""
    calls = lowered["wan"]["WanAttentionBlock"].calls
    shared = [len([call for call in calls if call.kind == "int8 gemm" and next(iter(quantizer.writes)) in call.reads])
              for quantizer in calls if quantizer.kind == "quantizer"]
    assert sorted(shared) == [1, 1, 1, 1, 1, 2, 3]


@pytest.mark.comfy
def test_every_tensor_that_a_call_reads_was_written_before_it(lowered):
    """The instrument itself: reads and writes are those of the code that was made."""
    for family in lowered.values():
        for graph in family.values():
            written = set()
            for call in graph.calls:
                parts = {whole: {part for part, into in graph.parts.items() if into == whole} for whole in graph.parts.values()}
                for tensor in (name.partition("#")[0] for name in call.reads):
                    assert tensor.startswith("arg") or tensor in written or (parts.get(tensor, {tensor}) <= written), (call, tensor)
                written.update(call.writes)


def test_the_page_of_results_is_what_its_numbers_say():
    found = json.loads((RESULTS / "lowered_blocks.json").read_text())
    assert (RESULTS / "lowered_blocks.md").read_text() == lowered_blocks.table(found)
    spills = [name for target in found["targets"] for weights in target["weights"].values() for graph in weights["blocks"].values()
              for name, cubins in graph["kernels"].items() if not cubins or any(cubin["stack"] for cubin in cubins)]
    assert not spills
