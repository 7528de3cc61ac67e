"""The pack's main job on this machine: eager, compiled and INT8 + compiled, side by side.

Starts a real ComfyUI server, queues a real workflow over HTTP, prints a table and writes pictures and demo.json. Without ComfyUI it
runs the same engine on a small diffusion transformer of this repository (embedded.py). Exits 1 if any part failed.

    python benchmarks/demo.py [--out demo_output] [--comfyui PATH] [--embedded] [--steps N]
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import (  # noqa: E402
    ComfyServer,
    PromptRejected,
    RunResult,
    find_comfyui,
    find_python,
    load_latent,
    relative_difference,
)
from benchmarks.demo_report import TITLES, Variant, beside_check, comparison, cpu_name, limits, table, write_json  # noqa: E402
from benchmarks.tiny_models import HIDDEN, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt  # noqa: E402

SIZE = 512  # pixels
TOKENS = (SIZE // 16) ** 2 + 77  # of the picture and of the prompt
SAME_SEED = 1
WARM_SEEDS = (2, 3, 4)  # the fastest counts: other programs can only slow a run down
BUSY = 1.25  # a load average a core that the demo does not reach on its own
NODES = {
    "eager": (),
    "compiled": ("CompileModel",),
    "int8_compiled": ("INT8QuantizeModel", "INT8LazyTorchCompile"),
}
CHOSEN = {"INT8QuantizeModel": {"method": "convrot"}}
FACTS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name() if cuda else None}))
"""


def with_comfyui(comfyui: Path, out: Path, steps: int, facts: dict) -> list[Variant]:
    """The three variants through a ComfyUI server; pictures and server.log in out."""
    python = find_python(comfyui)
    models = make_models(comfyui, cache_dir(), python=python)
    device = "cuda" if facts["cuda_device"] else "cpu"
    # What the compile cache builds in the background would share the cores with what is timed.
    with ComfyServer(comfyui, out / "comfyui", models=models, device=device, python=python,
                     env={"INT8_COMPILE_CACHE": "0"}) as server:
        facts["comfyui"] = server.comfyui_version
        try:
            variants = [Variant(name) for name in TITLES]
            for variant in variants:
                name = variant.name
                print(f"{TITLES[name]} ..." + (" compiling takes a minute or two on a CPU" if NODES[name] else ""), flush=True)
                variant.first_image_seconds = _run(server, variant, SAME_SEED, out, steps)
            # In turn, so that other work on the machine meets all alike. Of a warm prompt only the sampler runs.
            for seed in WARM_SEEDS:
                for variant in variants:
                    seconds = None if variant.error else _run(server, variant, seed, out, steps)
                    if seconds is not None:
                        variant.seconds_per_step = min(seconds / steps, variant.seconds_per_step or float("inf"))
            for variant in variants:
                variant.weights_mb = _weights_mb(server.log_text(), variant.name == "int8_compiled")
        finally:
            shutil.copy(server.log_path, out / "server.log")
    _differences(variants, out, "bfloat16" if device == "cuda" else "float32")
    return variants


def _run(server: ComfyServer, variant: Variant, seed: int, out: Path, steps: int) -> float | None:
    """The seconds of a prompt; what it made is copied to out. None where it failed: variant.error says why."""
    name, first = variant.name, seed == SAME_SEED
    nodes = [(node, {**server.defaults(node), **CHOSEN.get(node, {})}) for node in NODES[name]]
    # Decoding a picture takes as long as sampling here; the steps are timed without it.
    prompt = flux_prompt(seed=seed, image=first, width=SIZE, height=SIZE, steps=steps, model_nodes=nodes, prefix=name)
    before = len(server.log_text())
    try:
        result = server.run(prompt)
    except PromptRejected as error:
        variant.error = str(error)
        return None
    if result.status != "success":
        _failed(variant, result, out)
        return None
    failures = [line for line in server.log_text()[before:].splitlines() if "compile failed" in line]
    variant.error = failures[0] if failures else ""
    if first or seed == WARM_SEEDS[0]:
        for path in result.files(server):
            shutil.copy(path, out / (f"{name}.png" if path.suffix == ".png" else f"{name}_{'same' if first else 'warm'}.latent"))
    return result.seconds


def _failed(variant: Variant, result: RunResult, out: Path) -> None:
    what = f"{result.error['node_type']}: {result.error['exception_message'].strip()}" if result.error else result.status
    variant.error = f"{what}\nThe traceback is in {out / 'server.log'}."


def _weights_mb(log: str, int8: bool) -> float | None:
    """As ComfyUI has them in memory (a bf16 file is fp32 there on a CPU), from the line that INT8 Quantize Model logs."""
    sizes = re.findall(r"weights ([\d.]+) -> ([\d.]+) MB", log)
    return float(sizes[-1][int8]) if sizes else None


def _differences(variants: list[Variant], out: Path, dtype: str) -> None:
    """From eager, the worse of the two seeds."""
    for variant in variants:
        variant.limits = limits(variant.name, dtype)
        files = [(out / f"{variant.name}_{kind}.latent", out / f"eager_{kind}.latent") for kind in ("same", "warm")]
        if all(path.exists() for pair in files for path in pair):
            variant.difference = max(relative_difference(load_latent(a), load_latent(b)) for a, b in files)
        elif not variant.error:
            variant.error = "no latent to compare with eager's"


def checked(comfyui: Path, out: Path) -> dict | None:
    """What INT8 Compile Check measures and advises for a block of this model's width and tokens: check.py's JSON; None where it fails."""
    print("check.py ... two compiles more", flush=True)
    sizes = ["--width", str(HIDDEN), "--tokens", str(TOKENS)]
    command = [find_python(comfyui), str(ROOT / "check.py"), *sizes, "--json", str(out / "check.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COMFYUI_PATH": str(comfyui)})
    if done.returncode:
        print(f"check.py failed:\n{done.stderr}", flush=True)
        return None
    return json.loads((out / "check.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo_output")
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--embedded", action="store_true", help="do not use ComfyUI")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.png"), *out.glob("*.latent"), out / "demo.json"):
        stale.unlink(missing_ok=True)

    comfyui = None if arguments.embedded else arguments.comfyui or find_comfyui()
    python = find_python(comfyui) if comfyui else sys.executable
    seen = subprocess.run([python, "-c", FACTS], capture_output=True, text=True)
    if seen.returncode:
        sys.exit(f"{seen.stderr}{python} cannot import torch. Run nox -s demo, or set COMFYUI_PYTHON to the Python that runs ComfyUI.")
    seen = json.loads(seen.stdout)
    facts = {"mode": "comfyui" if comfyui else "embedded", "date": datetime.date.today().isoformat(), "torch": seen["torch"],
             "device": seen["device"] or cpu_name(), "cuda_device": seen["device"]}
    if comfyui:
        variants = with_comfyui(comfyui, out, arguments.steps, facts)
        check = checked(comfyui, out)
    else:
        check = None
        print("No ComfyUI: running the embedded model. Set COMFYUI_PATH to the folder of ComfyUI's main.py for the real thing.", flush=True)
        from benchmarks import embedded  # imports torch, which the other branch leaves to the server
        variants = embedded.run(out, arguments.steps)
    facts["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    comparison(variants, out)
    write_json(out / "demo.json", variants, **facts, check=check and {"advice": check["advice"], "block": check["block"]["ratios"]})
    host = f"ComfyUI {facts['comfyui']}, Flux of 5 blocks, {SIZE}x{SIZE}" if comfyui else "embedded diffusion transformer, 6 blocks"
    print(f"\n{host}; torch {facts['torch']} on {facts['device']}\n\n{table(variants)}\n\nPictures and demo.json: {out}")
    if check:
        print(f"\n{beside_check(variants, check['block']['ratios'])}\n{check['advice']}")
    if not facts["cuda_device"] and facts["load"] and facts["load"] > BUSY * os.cpu_count():
        print(f"Other programs keep this machine busy (load {facts['load']:.1f} on {os.cpu_count()} cores): the times say little.")
    return 0 if all(v.passed for v in variants) else 1


if __name__ == "__main__":
    sys.exit(main())
