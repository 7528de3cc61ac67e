"""A small trained diffusion model: ComfyUI's own Flux class at width 128 on scikit-learn's 8x8 digits, so that quality can be measured on
learned weights and seen by a person.

A digit is a latent of 8x8 with 16 channels, each pixel's value along one direction of the channels; ``vae`` is a TAESD of ComfyUI's whose
weights are written down, not learned, and shows it as a picture of 64x64. The class comes as text: what ComfyUI's CLIPTextEncode makes of
"0" to "9" with the small random CLIP of tiny_models.py.

    python benchmarks/digits.py --comfyui ~/ComfyUI [--out tests/assets] [--minutes 8]

trains it anew: 8 minutes on two quiet cores.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
ASSETS = ROOT / "tests" / "assets"
MODEL, CONDS = "digits_flux.safetensors", "digits_conds.safetensors"
CHANNELS, SIZE = 16, 8
BATCH, LEARNING_RATE, EMA = 64, 3e-3, 0.995
CLIP_WIDTH = 768  # of the 4096 that a Flux gets: the rest is zero with CLIP-L alone


def direction():
    """The unit vector [16] of channels that a pixel's value lies along."""
    import torch

    return torch.tensor([1.0, -1.0] * (CHANNELS // 2)) / CHANNELS ** 0.5


def load_digits():
    """(latents [n, 16, 8, 8] in model space, labels [n], pixels [n, 64] from 0 to 16)."""
    import sklearn.datasets
    import torch

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    values = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, SIZE, SIZE) / 8 - 1
    return values * direction().reshape(1, -1, 1, 1) * CHANNELS ** 0.5, torch.tensor(labels), pixels


def to_pixels(latents):
    """Model-space latents [n, 16, 8, 8] -> [n, 64] from 0 to 16, as scikit-learn has them."""
    values = (latents.float() * direction().reshape(1, -1, 1, 1)).sum(1) / CHANNELS ** 0.5
    return ((values + 1) * 8).clamp(0, 16).reshape(len(values), -1)


def vae() -> dict:
    """State dict of a TAESD for stock Load VAE: every latent pixel is a square of 8x8 of its grey."""
    import comfy.taesd.taesd
    import torch

    state = {}
    for part, model in (("encoder", comfy.taesd.taesd.Encoder(CHANNELS)), ("decoder", comfy.taesd.taesd.Decoder(CHANNELS))):
        for name, tensor in model.state_dict().items():
            state[f"taesd_{part}.{name}"] = torch.zeros_like(tensor)
    decoder = comfy.taesd.taesd.Decoder(CHANNELS)
    convolutions = [name for name, module in decoder.named_children() if isinstance(module, torch.nn.Conv2d)]
    first, *middle, last = convolutions
    # The clamp at the input bends values: tanh(x / 3) * 3 of +-1 is +-0.96, nothing that shows.
    state[f"taesd_decoder.{first}.weight"][0, :, 1, 1] = direction() / CHANNELS ** 0.5 / 2
    state[f"taesd_decoder.{first}.bias"][0] = 0.5
    for name in middle:
        state[f"taesd_decoder.{name}.weight"][0, 0, 1, 1] = 1
    state[f"taesd_decoder.{last}.weight"][:, 0, 1, 1] = 1
    state["vae_scale"], state["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
    return state


def flux(device="cpu"):
    import comfy.ops
    import torch
    from comfy.ldm.flux.model import Flux

    return Flux(in_channels=CHANNELS, out_channels=CHANNELS, patch_size=2, vec_in_dim=2048, context_in_dim=4096, hidden_size=128,
                num_heads=1, depth=2, depth_single_blocks=3, mlp_ratio=4.0, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
                guidance_embed=False, txt_ids_dims=[], dtype=torch.float32, device=device, operations=comfy.ops.disable_weight_init)


def encode_classes(clip_path: Path) -> dict:
    """{"context": [10, 77, 768], "pooled": [10, 768]} in fp16, of the texts "0" to "9"."""
    import comfy.sd
    import torch

    clip = comfy.sd.load_clip([str(clip_path)], clip_type=comfy.sd.CLIPType.SD3)
    encoded = [clip.encode_from_tokens(clip.tokenize(str(digit)), return_pooled=True) for digit in range(10)]
    return {"context": torch.cat([c for c, _ in encoded])[..., :CLIP_WIDTH].to(torch.float16).contiguous(),
            "pooled": torch.cat([p for _, p in encoded])[..., :CLIP_WIDTH].to(torch.float16).contiguous()}


def conds(folder: Path = ASSETS):
    """(context [10, 77, 4096], pooled [10, 2048]) in fp32, as a Flux gets them."""
    import torch.nn.functional as F
    from safetensors.torch import load_file

    stored = load_file(folder / CONDS)
    return F.pad(stored["context"].float(), (0, 4096 - CLIP_WIDTH)), F.pad(stored["pooled"].float(), (0, 2048 - CLIP_WIDTH))


def out_of_place():
    """A mode in which ``a += b`` makes a new a: ComfyUI's blocks write over what autograd needs."""
    import torch
    from torch.overrides import TorchFunctionMode

    class OutOfPlace(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            func = {torch.Tensor.__iadd__: torch.Tensor.add, torch.Tensor.add_: torch.Tensor.add,
                    torch.Tensor.__imul__: torch.Tensor.mul, torch.Tensor.mul_: torch.Tensor.mul}.get(func, func)
            return func(*args, **(kwargs or {}))
    return OutOfPlace()


def train(folder: Path, minutes: float) -> dict:
    """The weights, an average over the last steps, in bf16 and BFL's names."""
    import comfy.model_management
    import torch

    from benchmarks.tiny_models import fill

    comfy.model_management.in_training = True  # operations with gradients
    torch.manual_seed(0)
    latents, labels, _ = load_digits()
    context, pooled = conds(folder)
    model = fill(flux(), 0).train()
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 - done)
        index = torch.randint(len(latents), (BATCH,))
        x0, noise, sigma = latents[index], torch.randn(BATCH, CHANNELS, SIZE, SIZE), torch.rand(BATCH)
        x = noise * sigma.reshape(-1, 1, 1, 1) + x0 * (1 - sigma.reshape(-1, 1, 1, 1))  # comfy.model_sampling.CONST
        with torch.autocast("cpu", torch.bfloat16), out_of_place():
            velocity = model(x, sigma, context[labels[index]], pooled[labels[index]], transformer_options={})
        loss = (velocity.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                average[name].lerp_(weight, 1 - min(EMA, (step + 1) / (step + 10)))
        if step % 50 == 0:
            print(f"step {step}, {time.monotonic() - start:.0f} s: loss {loss.item():.4f}", flush=True)
        step += 1
    return {name.replace("_norm.weight", "_norm.scale"): weight.to(torch.bfloat16).contiguous() for name, weight in average.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--minutes", type=float, default=8)
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui.absolute()))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True
    from safetensors.torch import save_file

    from benchmarks.tiny_models import cache_dir, write_models

    options.out.mkdir(parents=True, exist_ok=True)
    write_models(cache_dir(), ["clip"])
    save_file(encode_classes(cache_dir() / "models" / "text_encoders" / "tiny_clip_l.safetensors"), options.out / CONDS)
    save_file(train(options.out, options.minutes), options.out / MODEL)


if __name__ == "__main__":
    main()
