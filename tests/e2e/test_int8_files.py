"""INT8 files over HTTP: saved by one ComfyUI, loaded by another without the pack."""
from __future__ import annotations

import shutil

import pytest
from toys import difference

from benchmarks.workflows import flux_prompt

from .conftest import latent

pytestmark = pytest.mark.e2e


def test_a_saved_model_samples_the_same_in_a_comfyui_without_the_pack(server, serve, defaults):
    prompt = flux_prompt(model_nodes=[defaults("INT8QuantizeModel", method="convrot")], lora=("tiny_flux_a.safetensors", 0.5))
    prompt["save_model"] = {"class_type": "SaveINT8Model", "inputs": {"model": ["model_1", 0], "filename_prefix": "diffusion_models/e2e"}}
    want = latent(server, server.run(prompt))
    (saved,) = (server.base_dir / "output" / "diffusion_models").glob("e2e_*.safetensors")
    with serve(pack=None) as stock:
        folder = stock.base_dir / "models" / "diffusion_models"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(saved, folder / "saved.safetensors")
        got = latent(stock, stock.run(flux_prompt(unet="saved.safetensors")))
    assert 0 < difference(got, want) < 0.03  # ComfyUI's own INT8 kernels


def test_a_model_quantized_while_loading_compiles_and_samples(server, defaults):
    eager = latent(server, server.run(flux_prompt()))
    loader = defaults("LoadINT8Model", unet_name="tiny_flux.safetensors")
    quantized = latent(server, server.run(flux_prompt(unet=loader, model_nodes=[defaults("INT8LazyTorchCompile")])))
    assert 1e-6 < difference(quantized, eager) < 0.05
    assert "compile failed" not in server.log_text()
