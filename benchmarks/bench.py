"""Your own checkpoint or workflow, in your own ComfyUI: eager, each INT8 method, uncompiled and compiled; speed beside quality.

    nox -s bench -- --model FILE [--clip FILE ... --clip-type TYPE --vae FILE] [--text TEXT] [--width W --height H --steps N --cfg C]
    nox -s bench -- --workflow FILE.json       in API format (ComfyUI's menu: Export (API)); compile and INT8 nodes in it are taken out
    further: [--methods rowwise convrot smoothquant auto] [--no-compile] [--images N] [--comfyui PATH] [--out bench_output]

FILE is a name as ComfyUI's loaders list it. Writes bench.md (the table), bench.png (seconds an image against PSNR), grid.png (the pictures)
and bench.json into the folder --out. Each row is a server of its own, so that none profits from another's memory. PSNR is of the pictures
against eager's with the same seed. Exits 1 where a row failed.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, PromptRejected, RunResult, find_comfyui, find_python  # noqa: E402
from benchmarks.demo import BUILD_TIMEOUT, FACTS, say  # noqa: E402
from benchmarks.demo_report import cpu_name, number, sheet  # noqa: E402
from benchmarks.workflows import reports  # noqa: E402

METHODS = "rowwise", "convrot", "auto"
TAKEN_OUT = "CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel", "OptimizeModel", "ApplyModes", "TorchCompileModel"
SEEDS = "seed", "noise_seed"
FIRST_SEED = 1
NO_LIMIT_DB = 99.0  # of pictures that are equal


@dataclass
class Row:
    """first, later: seconds of whole prompts; later is the median with other seeds. int8_db: the block that loses most as INT8 against
    float, as the compile node's report has it. psnr: dB of the picture against eager's. error: why it did not run."""

    method: str = ""
    compiled: bool = False
    first: float | None = None
    later: float | None = None
    psnr: float | None = None
    int8_db: float | None = None
    weights: str = ""
    error: str = ""
    pictures: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        parts = [f"INT8 {self.method}"] * bool(self.method) + ["compiled"] * self.compiled
        return " + ".join(parts) or "eager"

    @property
    def file(self) -> str:
        return self.title.replace(" + ", "_").replace(" ", "_")


def of_model(options: argparse.Namespace) -> dict:
    """A prompt around a checkpoint (--clip: around a diffusion model and its text encoders)."""
    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}
    if options.clip:
        loaders = "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader"
        several = len(options.clip) > 1
        names = {f"clip_name{index if several else ''}": name for index, name in enumerate(options.clip, 1)}
        kind = {} if len(options.clip) == 3 else {"type": options.clip_type}
        prompt = {"unet": node("UNETLoader", unet_name=options.model, weight_dtype="default"),
                  "clip": node(loaders[len(options.clip) - 1], **names, **kind), "vae": node("VAELoader", vae_name=options.vae)}
        model, clip, vae = ["unet", 0], ["clip", 0], ["vae", 0]
    else:
        prompt = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=options.model)}
        model, clip, vae = (["checkpoint", output] for output in range(3))
    latent = "EmptySD3LatentImage" if options.clip else "EmptyLatentImage"
    return {**prompt, "positive": node("CLIPTextEncode", text=options.text, clip=clip),
            "negative": node("CLIPTextEncode", text="", clip=clip),
            "latent": node(latent, width=options.width, height=options.height, batch_size=1),
            "sampler": node("KSampler", model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["latent", 0], seed=1,
                            steps=options.steps, cfg=options.cfg, sampler_name="euler", scheduler="simple", denoise=1.0),
            "decode": node("VAEDecode", samples=["sampler", 0], vae=vae),
            "save": node("SaveImage", images=["decode", 0], filename_prefix="bench")}


def without_nodes(prompt: dict, taken_out: Sequence[str] = TAKEN_OUT) -> dict:
    """The prompt with nodes of some classes passed over: who took their output takes what they were given as model."""
    def origin(link):
        while link[0] in gone and "model" in prompt[link[0]]["inputs"]:
            link = prompt[link[0]]["inputs"]["model"]
        return link
    gone = {name for name, node in prompt.items() if node["class_type"] in taken_out}
    return {name: {**node, "inputs": {key: origin(value) if _is_link(value) else value for key, value in node["inputs"].items()}}
            for name, node in prompt.items() if name not in gone}


def with_nodes(prompt: dict, nodes: Sequence[tuple[str, dict]], schemas: dict) -> dict:
    """The prompt with a chain of nodes before everything that takes a MODEL and gives none (samplers, guiders, schedulers). schemas:
    ComfyUI's /object_info."""
    if not nodes:
        return prompt
    prompt = {name: {**node, "inputs": dict(node["inputs"])} for name, node in prompt.items()}
    ends: dict[tuple, str] = {}
    for node in list(prompt.values()):
        schema = schemas.get(node["class_type"], {})
        if "MODEL" in schema.get("output", ()):
            continue
        kinds = {key: kind[0] for group in schema.get("input", {}).values() if isinstance(group, dict) for key, kind in group.items()}
        for key, link in node["inputs"].items():
            if kinds.get(key) != "MODEL" or not _is_link(link):
                continue
            if tuple(link) not in ends:
                last = link
                for class_type, inputs in nodes:
                    name = f"bench_{len(prompt)}"
                    prompt[name] = {"class_type": class_type, "inputs": {**inputs, "model": last}}
                    last = [name, 0]
                ends[tuple(link)] = last[0]
            node["inputs"][key] = [ends[tuple(link)], 0]
    return prompt


def with_seed(prompt: dict, seed: int) -> dict:
    def seeded(inputs):
        return {key: seed if key in SEEDS and not _is_link(value) else value for key, value in inputs.items()}
    return {name: {**node, "inputs": seeded(node["inputs"])} for name, node in prompt.items()}


def _is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def psnr(path: Path, other: Path) -> float:
    """dB of two pictures of 8 bits."""
    from PIL import Image, ImageChops, ImageStat

    images = [Image.open(each).convert("RGB") for each in (path, other)]
    if images[0].size != images[1].size:
        return 0.0
    squares = statistics.fmean(ImageStat.Stat(ImageChops.difference(*images)).sum2) / (images[0].width * images[0].height)
    return min(NO_LIMIT_DB, 10 * math.log10(255 ** 2 / squares)) if squares else NO_LIMIT_DB


def measure(server: ComfyServer, row: Row, prompt: dict, images: int, out: Path) -> None:
    nodes: list[tuple[str, dict]] = []
    if row.method:
        nodes.append(("INT8QuantizeModel", {**server.defaults("INT8QuantizeModel"), "method": row.method}))
    if row.compiled:
        nodes.append(("INT8LazyTorchCompile", server.defaults("INT8LazyTorchCompile")))
    prompt = with_nodes(without_nodes(prompt), nodes, server.object_info())
    results = [_run(server, with_seed(prompt, FIRST_SEED + image)) for image in range(1 + images)]
    row.first, row.later = results[0].seconds, statistics.median(result.seconds for result in results[1:])
    for entry in reports(results[-1].outputs):
        details = entry["details"]
        row.int8_db = min((found[0] for found in details.get("int8", {}).values()), default=row.int8_db)
        if details.get("after"):
            row.weights = f"{details['before']:.0f} -> {details['after']:.0f}"
        row.error = row.error or details.get("failure", "")
    pictures = [path for path in results[0].files(server) if path.suffix == ".png"]
    for index, path in enumerate(pictures):
        row.pictures.append(f"{row.file}{f'_{index}' * (index > 0)}.png")
        (out / row.pictures[-1]).write_bytes(path.read_bytes())
    if row.compiled:
        with contextlib.suppress(RuntimeError):
            server.wait_for_builder(BUILD_TIMEOUT)


def _run(server: ComfyServer, prompt: dict) -> RunResult:
    result = server.run(prompt, timeout=3600)
    if result.status != "success":
        raise RuntimeError(result.failure)
    return result


def run(rows: Sequence[Row], prompt: dict, options: argparse.Namespace, facts: dict) -> None:
    comfyui = options.comfyui
    packs = {path.name: path for path in (comfyui / "custom_nodes").glob("*/") if options.workflow and (path / "__init__.py").exists()
             and path.resolve() != ROOT and not path.name.endswith(".disabled")}
    for row in rows:
        say(f"{row.title} ...")
        with contextlib.ExitStack() as scope:
            try:
                server = scope.enter_context(ComfyServer(
                    comfyui, options.out / "comfyui", models=options.models or comfyui, extra_packs=packs,
                    device="cuda" if facts["cuda_device"] else "cpu"))
                facts["comfyui"] = server.comfyui_version
                measure(server, row, prompt, options.images, options.out)
            except (RuntimeError, PromptRejected, OSError, TimeoutError) as error:
                row.error = str(error)
        if row.pictures and rows[0].pictures:
            pairs = zip(row.pictures, rows[0].pictures)
            row.psnr = None if row is rows[0] else min(psnr(options.out / one, options.out / other) for one, other in pairs)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown."""
    yield "| | first image s | later image s | speed | weights MB | PSNR dB | INT8 against float dB |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        speed = rows[0].later / row.later if rows[0].later and row.later else None
        cells = [number(row.first, ".1f"), number(row.later, ".2f"), number(speed, ".2f", "x"), row.weights or "-",
                 number(row.psnr, ".1f"), number(row.int8_db, ".1f")]
        yield f"| {row.title} | {' | '.join(cells)} |"
    yield from ("", *(f"{row.title} failed: {row.error}" for row in rows if row.error))


def plot(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds an image", ylabel="PSNR against eager, dB")
    shown = [row for row in rows[1:] if row.later and row.psnr is not None]
    if rows[0].later:
        axes.axvline(rows[0].later, linestyle="--", color="grey", label=rows[0].title)
    for row in shown:
        axes.scatter(row.later, row.psnr, marker="o" if row.compiled else "s", label=row.title)
    figure.legend(loc="outside right upper")
    axes.margins(0.2)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint; with --clip a diffusion model")
    source.add_argument("--workflow", type=Path)
    parser.add_argument("--clip", nargs="+", default=[], help="one to three text encoders")
    parser.add_argument("--clip-type", default="flux")
    parser.add_argument("--vae", help="with --clip")
    parser.add_argument("--text", default="a photo of a red fox in the snow")
    for name, default in (("width", 1024), ("height", 1024), ("steps", 20), ("images", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--methods", nargs="*", choices=(*METHODS, "smoothquant"), default=METHODS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--models", type=Path, help="a folder with a folder models; default: ComfyUI's own")
    parser.add_argument("--out", type=Path, default=ROOT / "bench_output")
    options = parser.parse_args()
    if options.clip and not options.vae:
        parser.error("--clip needs --vae too")
    if len(options.clip) > 3 or options.images < 1:
        parser.error("at most three text encoders, and at least one image")
    options.comfyui = options.comfyui or find_comfyui()
    if options.comfyui is None:
        sys.exit("ComfyUI was not found: set COMFYUI_PATH to the folder of its main.py, or give --comfyui.")
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    prompt = json.loads(options.workflow.read_text(encoding="utf-8")) if options.workflow else of_model(options)
    if not all(isinstance(node, dict) and "class_type" in node for node in prompt.values()):
        sys.exit(f"{options.workflow} is not in API format: ComfyUI's menu, Export (API).")
    seen = json.loads(subprocess.run([find_python(options.comfyui), "-c", FACTS], capture_output=True, text=True, check=True).stdout)
    facts = {"date": datetime.date.today().isoformat(), "torch": seen["torch"], "device": seen["device"] or cpu_name(),
             "cuda_device": seen["device"], "model": options.model or options.workflow.name}
    rows = [Row(method, compiled) for method in ("", *options.methods) for compiled in ((False,) if options.no_compile else (False, True))]
    run(rows, prompt, options, facts)
    text = "\n".join(table(rows))
    heading = f"{facts['model']}, ComfyUI {facts.get('comfyui', '?')}, torch {facts['torch']} on {facts['device']}, {facts['date']}"
    (options.out / "bench.md").write_text(f"{heading}\n\n{text}\n", encoding="utf-8")
    (options.out / "bench.json").write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    shown = [row for row in rows if row.pictures]
    sheet([(options.out / row.pictures[0], f"{row.title}\n{number(row.later, '.2f')} s, {number(row.psnr, '.1f')} dB") for row in shown],
          options.out / "grid.png", columns=2 if not options.no_compile else 4)
    plot(rows, options.out / "bench.png")
    print(f"\n{heading}\n\n{text}\n\nThe table, the pictures (grid.png) and speed against quality (bench.png) are in {options.out}")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
