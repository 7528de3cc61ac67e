"""A model whose layers and weights are another pack's, and one that casts its weights: kept by one server, found by the next."""
from __future__ import annotations

from pathlib import Path

import pytest
from toys import difference

from benchmarks.comfy_server import ComfyServer, find_comfyui
from benchmarks.workflows import flux_prompt, reports

from .conftest import latent

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(3, together=True)]
PACK = Path(__file__).parent.parent / "assets" / "packed_layers"
LORA = "tiny_flux_a.safetensors", 0.5
UNETS = {"packed": ("LoadPackedModel", {"name": "tiny_flux.safetensors"}),
         "fp8": ("UNETLoader", {"unet_name": "tiny_flux.safetensors", "weight_dtype": "fp8_e4m3fn"})}


@pytest.fixture(scope="module")
def starts(models_dir, tmp_path_factory):
    """Of two starts of a server, for each of UNETS: [(difference from eager, details of the report)] without and with a LoRA."""
    folder = tmp_path_factory.mktemp("kept")
    environment = {"INT8_COMPILE_CACHE": "", "INT8_COMPILE_CACHE_KEY_FILE": str(folder / "key" / "cache.key")}
    found = []
    for _ in range(2):
        with ComfyServer(find_comfyui(), folder / "comfyui", models=models_dir, env=environment, extra_packs={"packed": PACK}) as server:
            nodes = [("INT8LazyTorchCompile", {**server.defaults("INT8LazyTorchCompile"), "background": True})]
            found.append({})
            for name, unet in UNETS.items():
                if len(found) == 1:
                    server.run(flux_prompt(unet=unet, width=64, height=64, model_nodes=nodes, seed=2))
                    server.wait_for_builder(200)
                found[-1][name] = []
                for lora in (None, LORA):
                    given = {"unet": unet, "lora": lora, "width": 64, "height": 64}
                    eager = latent(server, server.run(flux_prompt(**given)))
                    result = server.run(flux_prompt(**given, model_nodes=nodes))
                    found[-1][name].append((difference(latent(server, result), eager), reports(result.outputs)[-1]))
    return found


@pytest.mark.parametrize("name", UNETS)
def test_what_was_compiled_is_kept(starts, name):
    for start in starts:
        for off, report in start[name]:
            assert off < 1e-3, report
            assert report["details"]["graphs"] == 0 and "from the compile cache" in report["status"], report
            assert not report["warnings"]
