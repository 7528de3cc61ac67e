"""LoadINT8Model in a process of its own: what it takes at its peak."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.comfy_server import REPO, find_comfyui

pytestmark = pytest.mark.comfy

SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
repo, comfyui, path = sys.argv[1:]
sys.path[:0] = [comfyui, repo]
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
spec = importlib.util.spec_from_file_location("int8_compile", repo + "/__init__.py", submodule_search_locations=[repo])
sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)
from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
from int8_compile.int8.options import Int8Options

def kib(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

load_int8_model(repo_small := str(Path(path).with_name("small.safetensors")), Int8Options())  # libraries and kernels in place
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
model = load_int8_model(path, Int8Options())
weights = model.model.diffusion_model.state_dict().items()
print(json.dumps(dict(peak=(kib("VmHWM") - before) * 1024, stored=sum(w.nbytes for _, w in weights))))
"""


@pytest.mark.rotating
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_int8_size_and_one_layer(tmp_path, comfy):
    """A Flux of 450 MB in bf16, hidden size 1024; its largest layer takes 14 MB."""
    import torch
    from comfy.ldm.flux.model import Flux
    from safetensors.torch import save_file

    def write(path, depth, single, hidden):
        model = Flux(in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768, context_in_dim=256, hidden_size=hidden,
                     num_heads=hidden // 128, depth=depth, depth_single_blocks=single, mlp_ratio=4.0, axes_dim=[16, 56, 56], theta=10000,
                     qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.bfloat16, device="cpu", operations=torch.nn)
        save_file({k.replace("_norm.weight", "_norm.scale"): v for k, v in model.state_dict().items()}, path)

    with torch.inference_mode(False):
        write(tmp_path / "model.safetensors", 3, 8, 1024)
        write(tmp_path / "small.safetensors", 1, 1, 256)
    size = (tmp_path / "model.safetensors").stat().st_size
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(REPO), str(find_comfyui()), str(tmp_path / "model.safetensors")],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    print(f"bf16 file {size / 2**20:.0f} MiB, INT8 {result['stored'] / 2**20:.0f} MiB, peak {result['peak'] / 2**20:.0f} MiB")
    layer = 7 * 1024 * 1024 * 2
    assert result["stored"] < 0.56 * size
    assert result["peak"] < 1.15 * result["stored"] + layer
