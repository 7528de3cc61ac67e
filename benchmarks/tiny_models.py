"""Small random checkpoints of ComfyUI's own model classes, which its stock loaders recognise.

They have the layout of real Flux, Wan and SD1.5 checkpoints, weights that keep activations near unit scale, and
fixed seeds, so that a whole workflow runs in about a second on a CPU and its latents can be compared.
ComfyUI before 0.9.0 takes every Flux for one of 24 heads and fails on the tiny one; Wan loads everywhere.

    python benchmarks/tiny_models.py --comfyui ~/ComfyUI --out /tmp/base [--only flux,wan]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DEFAULT_NAMES = ("flux", "wan", "clip", "taef1", "loras")
# flux_57: 57 blocks like the real Flux, a model for compile times. sd15: SD1.5 at its real width, with the first level only. zimage: one
# layer and four refiners of the real width, by which ComfyUI knows it: 1.8 GB.
ALL_NAMES = (*DEFAULT_NAMES, "flux_57", "flux_narrow", "sd15", "zimage")

HIDDEN = 256  # two heads of 128, the head size that both families fix
LORA_RANK = 4
LORA_SIZE = 0.25  # ||delta W|| / ||W|| at strength 1
FLUX_LORA_LAYERS = ("_attn.qkv", "_attn.proj", "_mlp.0", "_mlp.2", ".linear1", ".linear2")
WAN_LORA_LAYERS = ("_attn.q", "_attn.k", "_attn.v", "_attn.o", ".ffn.0", ".ffn.2")
SD15_LORA_LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")
ZIMAGE_LORA_LAYERS = (".attention.out", ".feed_forward.w1", ".feed_forward.w2")


def cache_dir() -> Path:
    """Where benchmarks and tests keep the checkpoints between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int8-compile"


def make_models(
    comfyui: Path, base_dir: Path, names: Sequence[str] = DEFAULT_NAMES, python: str | None = None
) -> Path:
    """Write the named models that base_dir/models lacks and return base_dir.

    Runs in a process of ComfyUI's Python, as importing comfy changes settings of the whole process.
    ValueError for an unknown name; RuntimeError with that process's output when it fails.
    """
    if __package__:
        from .comfy_server import find_python
    else:
        from comfy_server import find_python

    unknown = set(names) - set(ALL_NAMES)
    if unknown:
        raise ValueError(f"no tiny model is called {', '.join(sorted(unknown))}; there are {', '.join(ALL_NAMES)}")
    arguments = ["--comfyui", str(comfyui), "--out", str(base_dir), "--only", ",".join(names)]
    done = subprocess.run([python or find_python(comfyui), __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"making the tiny models failed:\n{done.stdout}{done.stderr}")
    return Path(base_dir)


def builders() -> dict:
    """Name -> {path under models/: function that returns the state dict}."""
    return {
        "flux": {"diffusion_models/tiny_flux.safetensors": lambda: flux_weights(2, 3, seed=1)},
        "flux_57": {"diffusion_models/flux_57.safetensors": lambda: flux_weights(19, 38, seed=2)},
        # One head: too narrow for INT8 to pay.
        "flux_narrow": {"diffusion_models/flux_narrow.safetensors": lambda: flux_weights(2, 3, seed=14, hidden=128)},
        "wan": {"diffusion_models/tiny_wan.safetensors": lambda: wan_weights(4, seed=3)},
        "sd15": {
            "diffusion_models/tiny_sd15.safetensors": lambda: sd15_weights(seed=10),
            "loras/tiny_sd15_a.safetensors": lambda: peft_lora(sd15("meta"), SD15_LORA_LAYERS, seed=11),
        },
        "zimage": {
            "diffusion_models/tiny_zimage.safetensors": lambda: zimage_weights(seed=12),
            "loras/tiny_zimage_a.safetensors": lambda: peft_lora(zimage("meta"), ZIMAGE_LORA_LAYERS, seed=13),
        },
        "clip": {"text_encoders/tiny_clip_l.safetensors": lambda: clip_l_weights(seed=4)},
        "taef1": {
            "vae_approx/taef1_encoder.safetensors": lambda: taesd_weights("Encoder", seed=5),
            "vae_approx/taef1_decoder.safetensors": lambda: taesd_weights("Decoder", seed=6),
        },
        "loras": {
            "loras/tiny_flux_a.safetensors": lambda: kohya_lora(flux(2, 3, "meta"), FLUX_LORA_LAYERS, seed=7),
            "loras/tiny_flux_b.safetensors": lambda: kohya_lora(flux(2, 3, "meta"), FLUX_LORA_LAYERS, seed=8),
            "loras/tiny_wan_a.safetensors": lambda: peft_lora(wan(4, "meta"), WAN_LORA_LAYERS, seed=9),
        },
    }


def write_models(base_dir: Path, names: Sequence[str]) -> list[Path]:
    """Write what is missing, in this process; returns the new files."""
    from safetensors.torch import save_file

    written = []
    for name in names:
        for relative, build in builders()[name].items():
            path = base_dir / "models" / relative
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            save_file(build(), unfinished, metadata={"format": "pt"})
            os.replace(unfinished, path)
            written.append(path)
    return written


def flux(depth: int, depth_single: int, device: str, hidden: int = HIDDEN, dtype=None):
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    return Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=2048, context_in_dim=4096, hidden_size=hidden,
        num_heads=hidden // 128, depth=depth, depth_single_blocks=depth_single, mlp_ratio=4.0, axes_dim=[16, 56, 56],
        theta=10000, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
        dtype=dtype or torch.float32, device=device, operations=comfy.ops.disable_weight_init,
    )


def flux_weights(depth: int, depth_single: int, seed: int, hidden: int = HIDDEN) -> dict:
    import torch

    model = fill(flux(depth, depth_single, "cpu", hidden), seed)
    # BFL's checkpoints call the weight of a query or key norm "scale"; every ComfyUI reads that name.
    return {
        name.replace("_norm.weight", "_norm.scale"): weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }


def wan(layers: int, device: str, hidden: int = HIDDEN, ffn: int = 3 * HIDDEN, dtype=None):
    import comfy.ops
    import torch
    from comfy.ldm.wan.model import WanModel

    return WanModel(
        model_type="t2v", dim=hidden, ffn_dim=ffn, num_heads=hidden // 128, num_layers=layers, text_dim=4096,
        dtype=dtype or torch.float32, device=device, operations=comfy.ops.disable_weight_init,
    )


def wan_weights(layers: int, seed: int) -> dict:
    import torch

    return {name: weight.to(torch.bfloat16) for name, weight in fill(wan(layers, "cpu"), seed).state_dict().items()}


def sd15(device: str):
    """320 channels, 8 heads and a context of 768, by which ComfyUI knows SD1.5."""
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=[1], channel_mult=[1], num_heads=8,
        use_spatial_transformer=True, transformer_depth=[1], transformer_depth_output=[1, 1], transformer_depth_middle=1,
        context_dim=768, legacy=False, dtype=torch.float32, device=device, operations=comfy.ops.disable_weight_init,
    )


def sd15_weights(seed: int) -> dict:
    import torch

    return {name: weight.to(torch.bfloat16) for name, weight in fill(sd15("cpu"), seed).state_dict().items()}


def zimage(device: str, dtype=None):
    """One layer and four refiners; its context of 768 is CLIP-L's."""
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(
        patch_size=2, in_channels=16, dim=3840, n_layers=1, n_heads=30, n_kv_heads=30, ffn_dim_multiplier=8 / 3, qk_norm=True,
        cap_feat_dim=768, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, dtype=dtype or torch.float32, device=device, operations=comfy.ops.disable_weight_init,
    )


def zimage_weights(seed: int) -> dict:
    import torch

    return fill(zimage("cpu", torch.bfloat16), seed).state_dict()


def clip_l_weights(seed: int) -> dict:
    """CLIP-L at its real size, which its configuration fixes: 123 million weights."""
    import json

    import comfy.clip_model
    import comfy.ops
    import torch

    config = json.loads((Path(comfy.clip_model.__file__).parent / "sd1_clip_config.json").read_text())
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    return {name: weight.to(torch.float16) for name, weight in fill(model, seed).state_dict().items()}


def taesd_weights(kind: str, seed: int) -> dict:
    import comfy.taesd.taesd

    model = fill(getattr(comfy.taesd.taesd, kind)(latent_channels=16), seed)
    if kind == "Decoder":
        model[-1].weight.data *= 0.3  # images are in [0, 1]: spread them around the middle
        model[-1].bias.data += 0.5
    return model.state_dict()


def fill(model, seed: int):
    """Draw every parameter so that unit inputs give outputs of about unit size, whatever the depth."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data.copy_(draw(name, weight.shape, rng))
    return model


def draw(name: str, shape: Sequence[int], rng):
    """The parameter of this name and shape, on rng's device."""
    import torch

    noise = torch.randn(shape, generator=rng, device=rng.device)
    if "embeddings." in name:  # CLIP's token and position tables
        return noise
    if name.endswith("modulation"):  # Wan adds these to the time embedding
        return noise * 0.3
    if len(shape) > 1:
        return noise / noise[0].numel() ** 0.5
    if name.endswith("bias"):
        return noise * 0.02
    return 1 + 0.05 * noise  # the scale of a norm


def lora_factors(model, layers: Sequence[str], seed: int):
    """Yields (name, down [rank, K], up [N, rank]) for each Linear whose name ends in one of layers."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.endswith(tuple(layers)) and weight.ndim == 2:
            rows, columns = weight.shape
            down = torch.randn(LORA_RANK, columns, generator=rng) / columns**0.5
            up = torch.randn(rows, LORA_RANK, generator=rng) * LORA_SIZE / LORA_RANK**0.5
            yield layer, down.to(torch.bfloat16), up.to(torch.bfloat16)


def kohya_lora(model, layers: Sequence[str], seed: int) -> dict:
    """kohya's key format, the usual one of Flux LoRAs."""
    import torch

    weights = {}
    for layer, down, up in lora_factors(model, layers, seed):
        key = "lora_unet_" + layer.replace(".", "_")
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        weights[f"{key}.alpha"] = torch.tensor(float(LORA_RANK))
    return weights


def peft_lora(model, layers: Sequence[str], seed: int) -> dict:
    """PEFT's key format, the usual one of Wan LoRAs."""
    weights = {}
    for layer, down, up in lora_factors(model, layers, seed):
        weights |= {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--out", type=Path, required=True, help="base directory: files go under its models folder")
    parser.add_argument("--only", default=",".join(DEFAULT_NAMES), help=f"some of {','.join(ALL_NAMES)}")
    options = parser.parse_args()

    sys.path.insert(0, str(options.comfyui.absolute()))
    from comfy.cli_args import args

    args.cpu = True  # read when comfy.model_management is imported
    for path in write_models(options.out, options.only.split(",")):
        print(f"{path} {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
