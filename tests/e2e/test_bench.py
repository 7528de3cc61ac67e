"""nox -s bench: a user's own model through eager and INT8, with a table, a plot and the pictures."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from older_comfyui import needs_for

from benchmarks import bench
from benchmarks.workflows import flux_prompt

REPO = Path(__file__).resolve().parent.parent.parent
SCHEMAS = {node: {"input": {"required": {"model": ["MODEL"]}}, "output": [output]} for node, output in (
    ("UNETLoader", "MODEL"), ("KSampler", "LATENT"), ("BasicScheduler", "SIGMAS"), ("CompileModel", "MODEL"))}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "benchmarks/bench.py", *arguments], cwd=REPO, capture_output=True, text=True)


def test_nodes_stand_before_every_end_of_a_model_once():
    prompt = flux_prompt(model_nodes=[("CompileModel", {}), ("INT8QuantizeModel", {})])
    prompt["sigmas"] = {"class_type": "BasicScheduler", "inputs": {"model": ["model_2", 0]}}
    bare = bench.without_nodes(prompt)
    assert not {"model_1", "model_2"} & set(bare) and bare["sampler"]["inputs"]["model"] == bare["sigmas"]["inputs"]["model"] == ["unet", 0]
    found = bench.with_nodes(bare, [("INT8QuantizeModel", {"method": "rowwise"}), ("INT8LazyTorchCompile", {})], SCHEMAS)
    first, second = (name for name in found if name not in bare)
    assert found[first]["inputs"] == {"method": "rowwise", "model": ["unet", 0]} and found[second]["inputs"] == {"model": [first, 0]}
    assert found["sampler"]["inputs"]["model"] == found["sigmas"]["inputs"]["model"] == [second, 0]
    assert bare["sampler"]["inputs"]["model"] == ["unet", 0]  # unchanged


def test_every_seed_is_set_and_links_stay():
    noise, sampler = ({"class_type": "any", "inputs": inputs} for inputs in ({"noise_seed": 4}, {"seed": ["noise", 0]}))
    seeded = bench.with_seed({"noise": noise, "sampler": sampler}, 9)
    assert seeded["noise"]["inputs"] == {"noise_seed": 9} and seeded["sampler"] == sampler


@pytest.mark.rotating
@pytest.mark.e2e
def test_a_model_is_benched_with_its_table_and_pictures(models_dir, tmp_path):
    needs_for("INT8QuantizeModel")
    done = run("--model", "tiny_flux.safetensors", "--clip", "tiny_clip_l.safetensors", "--clip-type", "sd3", "--vae", "taef1",
               "--width", "64", "--height", "64", "--steps", "1", "--images", "1", "--methods", "rowwise", "--no-compile",
               "--models", str(models_dir), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    eager, int8 = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert eager["psnr"] is None and 20 < int8["psnr"] < 90 and "->" in int8["weights"] and eager["later"] > 0
    assert "| INT8 rowwise |" in (tmp_path / "bench.md").read_text() and "| INT8 rowwise |" in done.stdout
    assert all((tmp_path / name).stat().st_size for name in ("bench.png", "grid.png", "INT8_rowwise.png", "eager.png"))


@pytest.mark.parametrize("arguments", ["--model a --workflow b", "", "--model a --clip c", "--model a --images 0"])
def test_what_it_cannot_do_is_said(arguments):
    done = run(*arguments.split())
    assert done.returncode == 2 and "usage:" in done.stderr
