"""The pack's main job on this machine: eager, compiled, INT8 + compiled, with background, and at the next start, side by side.

Starts a real ComfyUI server with its default flags, queues a real workflow over HTTP, prints a table and writes pictures and demo.json.
Without ComfyUI it runs the same engine on a small diffusion transformer of this repository (embedded.py). Exits 1 if any part failed.

    python benchmarks/demo.py [--out demo_output] [--comfyui PATH] [--embedded] [--steps N] [--warm]
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
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
SAME_SEED, SECOND_SEED, LOADING_SEED = 1, 5, 6
WARM_SEEDS = (2, 3, 4)  # the fastest counts: other programs can only slow a run down
BUSY = 1.25  # a load average a core that the demo does not reach on its own
NODES = {
    "eager": (),
    "compiled": ("CompileModel",),
    **dict.fromkeys(("int8_compiled", "int8_background", "int8_next"), ("INT8QuantizeModel", "INT8LazyTorchCompile")),
}
CHOSEN = {"INT8QuantizeModel": {"method": "convrot"}}
BACKGROUND = ("int8_background", "int8_next")  # a user leaves it on
NO_CACHE = {"INT8_COMPILE_CACHE": "0"}  # what the compile cache builds would share the cores with what is timed
BUILD_TIMEOUT = 600
START = time.monotonic()
FACTS = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "device": torch.cuda.get_device_name() if cuda else None}))
"""


def say(what: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {what}", flush=True)


def with_comfyui(comfyui: Path, out: Path, steps: int, facts: dict, warm: bool) -> list[Variant]:
    """The variants through three ComfyUI servers, one after the other; pictures and the servers' logs in out."""
    python = find_python(comfyui)
    say("making a small Flux ...")
    models = make_models(comfyui, cache_dir(), python=python)
    device = "cuda" if facts["cuda_device"] else "cpu"
    compilers = _compilers(out, warm)
    for stale in (out / "compilers_cache", out / "comfyui" / "user" / "__int8_compile"):
        shutil.rmtree(stale, ignore_errors=True)
    variants = {name: Variant(name) for name in TITLES}

    def serve(names: tuple[str, ...], env: dict) -> None:
        say("starting ComfyUI ...")
        with ComfyServer(comfyui, out / "comfyui", models=models, device=device, python=python, env={**compilers, **env}) as server:
            facts["comfyui"] = server.comfyui_version
            try:
                _measure(server, [variants[name] for name in names], out, steps)
            finally:
                shutil.copy(server.log_path, out / f"server_{names[0]}.log")
    serve(("eager", "compiled", "int8_compiled"), NO_CACHE)
    serve(("int8_background",), {})
    serve(("int8_next",), {})
    _differences(list(variants.values()), out, "bfloat16" if device == "cuda" else "float32")
    return list(variants.values())


def _compilers(out: Path, warm: bool) -> dict[str, str]:
    """The environment of whatever compiles."""
    return {} if warm else {"TORCHINDUCTOR_CACHE_DIR": str(out / "compilers_cache")}


def _measure(server: ComfyServer, variants: list[Variant], out: Path, steps: int) -> None:
    # The checkpoint, the text encoder and the VAE are read before anything is timed.
    _run(server, Variant("eager"), LOADING_SEED, out, 1)
    for variant in variants:
        waits = variant.name in ("compiled", "int8_compiled")
        say(f"{TITLES[variant.name]}: the first image" + (" waits for the compiler, up to a minute on a CPU ..." if waits else " ..."))
        variant.first_image_seconds = _run(server, variant, SAME_SEED, out, steps)
        variant.second_image_seconds = None if variant.error else _run(server, variant, SECOND_SEED, out, steps)
    if "int8_background" in [variant.name for variant in variants]:
        say("another process compiles; meanwhile images would run uncompiled ...")
        with contextlib.suppress(RuntimeError):  # the table shows it
            server.wait_for_builder(BUILD_TIMEOUT)
    say("timing steps ...")
    # In turn, so that other work on the machine meets all alike. Of a warm prompt only the sampler runs.
    for seed in WARM_SEEDS:
        for variant in variants:
            seconds = None if variant.error else _run(server, variant, seed, out, steps)
            if seconds is not None:
                variant.seconds_per_step = min(seconds / steps, variant.seconds_per_step or float("inf"))
    for variant in variants:
        variant.weights_mb = _weights_mb(server.log_text(), variant.name.startswith("int8"))


def _run(server: ComfyServer, variant: Variant, seed: int, out: Path, steps: int) -> float | None:
    """The seconds of a prompt; what it made is copied to out. None where it failed: variant.error says why."""
    name, with_image = variant.name, seed not in WARM_SEEDS
    nodes = [(node, {**server.defaults(node), **CHOSEN.get(node, {})}) for node in NODES[name]]
    if name in BACKGROUND:
        nodes[-1][1]["background"] = True
    # Decoding a picture takes as long as sampling here; the steps are timed without it.
    prompt = flux_prompt(seed=seed, image=with_image, width=SIZE, height=SIZE, steps=steps, model_nodes=nodes, prefix=name)
    before = len(server.log_text())
    try:
        result = server.run(prompt)
    except PromptRejected as error:
        variant.error = str(error)
        return None
    if result.status != "success":
        _failed(variant, result, server, out)
        return None
    failures = [line for line in server.log_text()[before:].splitlines() if "compile failed" in line]
    variant.error = failures[0] if failures else ""
    kind = {SAME_SEED: "same", WARM_SEEDS[0]: "warm"}.get(seed)
    for path in result.files(server) if kind else ():
        if path.suffix == ".latent" or kind == "same":
            shutil.copy(path, out / (f"{name}.png" if path.suffix == ".png" else f"{name}_{kind}.latent"))
    return result.seconds


def _failed(variant: Variant, result: RunResult, server: ComfyServer, out: Path) -> None:
    shutil.copy(server.log_path, out / "failed.log")
    variant.error = f"{result.failure}\nThe traceback is in {out / 'failed.log'}."


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


def checked(comfyui: Path, out: Path, warm: bool) -> dict | None:
    """What INT8 Compile Check measures and advises for a block of this model's width and tokens: check.py's JSON; None where it fails."""
    say("check.py: what a block of these sizes gains, two compiles more ...")
    sizes = ["--width", str(HIDDEN), "--tokens", str(TOKENS)]
    command = [find_python(comfyui), str(ROOT / "check.py"), *sizes, "--json", str(out / "check.json")]
    environment = {**os.environ, **_compilers(out, warm), "COMFYUI_PATH": str(comfyui)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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
    parser.add_argument("--warm", action="store_true", help="with the compilers' caches of earlier runs, which a first start does not have")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.png"), *out.glob("*.latent"), *out.glob("*.log"), out / "demo.json"):
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
        variants = with_comfyui(comfyui, out, arguments.steps, facts, arguments.warm)
        check = checked(comfyui, out, arguments.warm)
    else:
        check = None
        print("No ComfyUI: running the embedded model. Set COMFYUI_PATH to the folder of ComfyUI's main.py for the real thing.", flush=True)
        from benchmarks import embedded  # imports torch, which the other branch leaves to the server
        variants = embedded.run(out, arguments.steps)
    facts["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    comparison(variants, out)
    write_json(out / "demo.json", variants, **facts, check=check and {"advice": check["advice"], "block": check["block"]["ratios"]})
    host = f"ComfyUI {facts['comfyui']}, Flux of 5 blocks, {SIZE}x{SIZE}" if comfyui else "embedded diffusion transformer, 6 blocks"
    print(f"\n{host}; torch {facts['torch']} on {facts['device']}\n\n{table(variants)}\n\n"
          f"The pictures side by side: {out / 'comparison.png'}; the numbers: {out / 'demo.json'}; {time.monotonic() - START:.0f} s in all")
    if check:
        print(f"\n{beside_check(variants, check['block']['ratios'])}\n{check['advice']}")
    if not facts["cuda_device"] and facts["load"] and facts["load"] > BUSY * os.cpu_count():
        print(f"Other programs keep this machine busy (load {facts['load']:.1f} on {os.cpu_count()} cores): the times say little.")
    return 0 if all(v.passed for v in variants) else 1


if __name__ == "__main__":
    sys.exit(main())
