"""Random checkpoints of real width, made on the GPU where there is one and written straight to where ComfyUI finds them.

    python benchmarks/gpu/models.py --comfyui PATH --out FOLDER --device cuda '{"flux": {"family": "flux", "depth": [4, 8]}}'
"""
from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent.parent
sys.path.insert(0, str(ROOT))


def write(path: Path, tensors) -> None:
    """A safetensors file of (name, shape, function that makes the tensor in bf16), one tensor in memory at a time."""
    import torch

    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        size = 2
        for dim in shape:
            size *= dim
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, make in tensors:
            file.write(make().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    os.replace(partial, path)


def skeleton(spec: dict):
    """The model of spec, without weights, and what its layers with a LoRA are called."""
    from benchmarks import tiny_models

    if spec["family"] == "flux":
        return tiny_models.flux(*spec["depth"], "meta", spec["hidden"]), tiny_models.FLUX_LORA_LAYERS
    if spec["family"] == "wan":
        return tiny_models.wan(spec["depth"], "meta", spec["hidden"], spec["ffn"]), tiny_models.WAN_LORA_LAYERS
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    levels = spec["depth"]  # of the transformers of each level; two residual blocks a level down, three up
    down = [depth for depth in levels for _ in range(2)]
    return UNetModel(
        image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[2] * len(levels), dtype=torch.float32,
        channel_mult=(1, 2, 4)[:len(levels)], num_classes="sequential", use_spatial_transformer=True, transformer_depth=down,
        transformer_depth_middle=levels[-1], transformer_depth_output=[depth for depth in levels for _ in range(3)], context_dim=2048,
        use_linear_in_transformer=True, adm_in_channels=2816, num_head_channels=64, legacy=False, device="meta",
        operations=comfy.ops.disable_weight_init), (".to_q", ".to_k", ".to_v", ".to_out.0")


def make(folder: Path, name: str, spec: dict, device: str) -> None:
    import torch
    from safetensors.torch import save_file

    from benchmarks import tiny_models

    model, lora_layers = skeleton(spec)
    rng = torch.Generator(device).manual_seed(11)

    def drawn(key, shape):
        return lambda: tiny_models.draw(key, shape, rng).to(torch.bfloat16)
    tensors = [(key.replace("_norm.weight", "_norm.scale") if spec["family"] == "flux" else key, tuple(weight.shape),
                drawn(key, tuple(weight.shape))) for key, weight in model.state_dict().items()]
    (folder / "diffusion_models").mkdir(parents=True, exist_ok=True)
    write(folder / "diffusion_models" / f"{name}.safetensors", tensors)
    lora = {"flux": tiny_models.kohya_lora, "wan": tiny_models.peft_lora}.get(spec["family"], tiny_models.peft_lora)
    (folder / "loras").mkdir(exist_ok=True)
    save_file(lora(model, lora_layers, seed=12), folder / "loras" / f"{name}_lora.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a models folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("specs", type=json.loads)
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui.absolute()))
    from comfy.cli_args import args

    args.cpu = True  # read when comfy.model_management is imported; the weights are drawn where --device says
    for name, spec in options.specs.items():
        if not (options.out / "diffusion_models" / f"{name}.safetensors").exists():
            make(options.out, name, spec, options.device)


if __name__ == "__main__":
    main()
