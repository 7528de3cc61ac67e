"""What each method costs in quality: per layer, in the latent, in the picture, and in what a classifier makes of it.

The trained digits model (tests/assets) and the random tiny Flux and Wan, against the same model in full precision. fp8 is ComfyUI's own
weight_dtype fp8_e4m3fn.

    python benchmarks/int8_quality.py --comfyui ~/ComfyUI [--json FILE]
"""
from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("rowwise", "convrot", "smoothquant", "auto", "fp8")
EACH = 20  # pictures of every digit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui.absolute()))
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True
    import comfy.sample
    import comfy.sd
    import torch
    from sklearn.svm import SVC

    from benchmarks import digits
    from benchmarks.tiny_models import cache_dir, make_models
    from benchmarks.wrapper_overhead import load_pack
    load_pack()
    from int8_compile.compile.comfyui.int8_calibrate import plans, quantize_model
    from int8_compile.int8.options import Int8Options

    folder = make_models(options.comfyui, cache_dir()) / "models" / "diffusion_models"
    _, labels, pixels = digits.load_digits()
    classifier = SVC().fit(pixels, labels)
    vae = comfy.sd.VAE(sd=digits.vae())
    context, pooled = digits.conds()
    random = torch.Generator().manual_seed(1)
    other = (torch.randn(2, 77, 4096, generator=random), torch.randn(2, 2048, generator=random))

    def sample(model, latent, cond, pooled, seed, steps=8):
        conds = [[cond, {"pooled_output": pooled}]]
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", conds, conds, latent, disable_pbar=True, seed=seed)

    def draw_digits(model):
        latent = torch.zeros(EACH, digits.CHANNELS, digits.SIZE, digits.SIZE)
        return torch.cat([sample(model, latent, context[d:d + 1], pooled[d:d + 1], 100 + d) for d in range(10)])

    def draw_random(shape):
        return lambda model: torch.cat([sample(model, torch.zeros(shape), other[0][i:i + 1], other[1][i:i + 1], i) for i in range(2)])

    models = {"digits": (digits.ASSETS / digits.MODEL, draw_digits),
              "tiny_flux": (folder / "tiny_flux.safetensors", draw_random((1, 16, 32, 32))),
              "tiny_wan": (folder / "tiny_wan.safetensors", draw_random((1, 16, 2, 16, 16)))}

    def db(signal, noise):
        return (10 * torch.log10(signal / noise)).item()

    results = []
    with torch.inference_mode():
        for name, (path, draw) in models.items():
            model = comfy.sd.load_diffusion_model(str(path))
            want = draw(model).double()
            shown = vae.decode(want.float()).double() if name == "digits" else None
            for method in ("full precision", *METHODS):
                layers = []
                if method == "full precision":
                    got = want
                elif method == "fp8":
                    got = draw(comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float8_e4m3fn})).double()
                else:
                    # min_sqnr_db has it measure the methods that need no calibration, too.
                    quantized = quantize_model(model, Int8Options(method=method, min_sqnr_db=0.001))
                    got = draw(quantized).double()
                    layers = [plan.sqnr[plan.method] for plan in plans(quantized) if plan.method in plan.sqnr]
                row = {"model": name, "method": method}
                if layers:
                    row |= {"layers": len(layers), "layer SQNR mean": sum(layers) / len(layers), "layer SQNR least": min(layers)}
                if method != "full precision":
                    row["latent SQNR"] = db(want.square().mean(), (got - want).square().mean())
                if name == "digits":
                    inside = model.model.process_latent_in(got.float())
                    truth = torch.arange(10).repeat_interleave(EACH).numpy()
                    row["recognised"] = (classifier.predict(digits.to_pixels(inside).numpy()) == truth).mean().item()
                    if method != "full precision":
                        error = (vae.decode(got.float()).double() - shown).square().mean()
                        row["image PSNR"] = db(torch.tensor(1.0, dtype=torch.float64), error)
                results.append(row)
                print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
