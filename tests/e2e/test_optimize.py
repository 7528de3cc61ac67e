"""Optimize Model over HTTP: one node between loader and sampler, on four families; another start of the server decides nothing.

INT8_COMPILE_ORDERS: from 48 on Z-Image too, which is not small.
"""
from __future__ import annotations

import os

import pytest
from older_comfyui import needs_for
from toys import difference

from benchmarks.comfy_server import ComfyServer, find_comfyui
from benchmarks.workflows import flux_prompt, reports, sd15_prompt, wan_prompt, zimage_prompt

from .conftest import latent

pytestmark = pytest.mark.e2e
FAMILIES = {"flux": flux_prompt, "wan": wan_prompt, "sd15": sd15_prompt}
if int(os.environ.get("INT8_COMPILE_ORDERS", "12")) >= 48:
    FAMILIES["zimage"] = zimage_prompt
BOUND = 0.05  # of an image's difference from the float one, as for INT8 everywhere in these tests


@pytest.fixture(scope="module")
def optimized(models_dir, tmp_path_factory):
    """Of two starts of one server, the second with nothing but what the first has kept: {family: (difference from eager, report)} each."""
    folder = tmp_path_factory.mktemp("optimized")
    environment = {"INT8_COMPILE_CACHE": "", "INT8_COMPILE_CACHE_KEY_FILE": str(folder / "key" / "cache.key")}
    eager, starts = {}, []
    for _ in range(2):
        with ComfyServer(find_comfyui(), folder / "comfyui", models=models_dir, env=environment) as server:
            starts.append({})
            for family, prompt in FAMILIES.items():
                if family not in eager:
                    eager[family] = latent(server, server.run(prompt(width=64, height=64)))
                result = server.run(prompt(width=64, height=64, model_nodes=[("OptimizeModel", server.defaults("OptimizeModel"))]))
                starts[-1][family] = difference(latent(server, result), eager[family]), reports(result.outputs)[-1]
    return starts


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_within_the_goals_bound_and_the_next_start_decides_nothing(optimized, family):
    needs_for("INT8QuantizeModel")
    (off, first), (off_again, second) = (start[family] for start in optimized)
    print(family, off, first["text"], second["text"], sep="\n")
    own, then = (report["details"]["optimize"] for report in (first, second))
    assert off < BOUND and off_again < BOUND
    assert not own["known"] and then["known"] and own["layers"] == then["layers"] > 10
    assert own["int8_layers"] == then["int8_layers"] and own["shapes"] == then["shapes"] and len(own["table"]) <= 6
    # What pays is this machine's own: a model in which no layer does is not quantized, and has no report of it.
    assert second["details"].get("waiting") == (0 if then["int8_layers"] else None) and "measures" not in second["status"]
