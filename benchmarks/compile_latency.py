"""How long people wait for a compile: first image, new resolutions, another LoRA, and the first image after a restart.

Every contender gets a server of its own and an empty compiler cache; seconds include loading and sampling, which eager shows alone.
Prints a table and, with --json, writes the numbers with torch, ComfyUI and processor.

    python benchmarks/compile_latency.py [--model tiny_flux | flux_57] [--pytorch-attention] [--json FILE] [--pack FOLDER:NODE ...]
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.tiny_models import DEFAULT_NAMES, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt  # noqa: E402

CONTENDERS = {
    "eager": [],
    "core TorchCompileModel": [("TorchCompileModel", {"backend": "inductor"})],
    "Compile Model": ["CompileModel"],
    "INT8 Lazy Torch Compile": ["INT8LazyTorchCompile"],
}
CHANGES = {
    "first image": {},
    "384x256": dict(width=384, height=256),
    "256x384": dict(width=256, height=384),
    "320x320": dict(width=320, height=320),
    "448x320": dict(width=448, height=320),
    "LoRA": dict(lora=("tiny_flux_a.safetensors", 1.0)),
    "batch 2": dict(batch=2),
}


def measure(name: str, nodes: list, unet: str, steps: dict, arguments: dict) -> tuple[dict, dict]:
    """({step: seconds}, {step: saved latent}) of one contender, the restart included."""
    seconds, latents = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        # torch keeps its precompiled C++ header in the temporary folder. The pack's own cache has a benchmark to itself: restart_latency.
        env = {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache, "INT8_COMPILE_CACHE": "0"}
        for changes in (steps, {"restart": {}}):
            with tempfile.TemporaryDirectory() as base, ComfyServer(base_dir=Path(base), env=env, **arguments) as server:
                chain = [(node, server.defaults(node)) if isinstance(node, str) else node for node in nodes]
                for step, change in changes.items():
                    result = server.run(flux_prompt(unet=unet, model_nodes=chain, **change), timeout=1800)
                    if result.status != "success":
                        raise RuntimeError(f"{name}, {step}: {result.error}")
                    seconds[step] = result.seconds
                    latents[step] = load_latent(next(p for p in result.files(server) if p.suffix == ".latent"))
                    print(f"{name}, {step}: {result.seconds:.1f} s", file=sys.stderr, flush=True)
                if "compile failed" in server.log_text():
                    raise RuntimeError(f"{name}: compile failed, see {server.log_path}")
    return seconds, latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny_flux", "flux_57"), default="tiny_flux")
    parser.add_argument("--pytorch-attention", action="store_true", help="the attention that ComfyUI uses on GPUs, not a CPU's default")
    parser.add_argument("--pack", nargs="*", default=[], metavar="FOLDER:NODE", help="another pack's folder and its MODEL -> MODEL node")
    parser.add_argument("--only", nargs="*", default=None, help=f"some of: {', '.join(CONTENDERS)}, and the nodes of --pack")
    parser.add_argument("--changes", nargs="*", choices=list(CHANGES)[1:], default=list(CHANGES)[1:], help="after the first image")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    packs, contenders = {}, dict(CONTENDERS)
    for pack in options.pack:
        folder, _, node = pack.rpartition(":")
        packs[node] = {Path(folder).name: Path(folder)}
        contenders[node] = [node]
    comfyui = find_comfyui()
    names = (*DEFAULT_NAMES, "flux_57") if options.model == "flux_57" else DEFAULT_NAMES
    attention = ("--use-pytorch-cross-attention",) if options.pytorch_attention else ()
    arguments = dict(comfyui=comfyui, models=make_models(comfyui, cache_dir(), names), extra_args=attention)

    changes = {step: change for step, change in CHANGES.items() if step == "first image" or step in options.changes}
    results, reference = {}, None
    for name in options.only or contenders:
        seconds, latents = measure(name, contenders[name], f"{options.model}.safetensors", changes,
                                   {**arguments, "extra_packs": packs.get(name)})
        reference = reference or latents
        worst = max(relative_difference(latents[step], reference[step]) for step in latents)
        results[name] = {"seconds": seconds, "difference": worst}

    steps = [*changes, "restart"]
    print(f"{options.model}, {'pytorch' if options.pytorch_attention else 'default'} attention, {cpu_name()}: seconds\n")
    print("".ljust(26) + "".join(step.rjust(12) for step in steps) + "difference".rjust(12))
    for name, result in results.items():
        print(name.ljust(26) + "".join(f"{result['seconds'][step]:12.1f}" for step in steps) + f"{result['difference']:12.1e}")
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "cores": os.cpu_count(), "model": options.model,
                 "attention": attention[0] if attention else "default"}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
