"""ComfyUI servers for the suite: real-width models of the step, prompts without text encoders, caches of their own."""
from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.comfy_server import ComfyServer, find_python, load_latent
from benchmarks.gpu.context import ROOT, Context
from benchmarks.workflows import Node, _node

PROBE = Path(__file__).with_name("probe")
BUILD_TIMEOUT = 240  # seconds for artifacts that the pack builds in the background


@dataclass(frozen=True)
class Family:
    """A model and its usual picture. spec: see models.skeleton. sizes: (width, height) of the picture, and of another one. cond: (tokens,
    width, pooled) of the conditioning. frames: of a video."""

    name: str
    spec: dict = field(hash=False)
    sizes: tuple[tuple[int, int], tuple[int, int]]
    cond: tuple[int, int, int]
    cfg: float = 1.0
    frames: int = 0

    @property
    def unet(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def int8(self) -> str:
        return f"{self.name}_int8.safetensors"

    @property
    def lora(self) -> str:
        return f"{self.name}_lora.safetensors"


def families(dry: bool) -> dict[str, Family]:
    if dry:
        flux, wan = {"family": "flux", "hidden": 256}, {"family": "wan", "depth": 2, "hidden": 256, "ffn": 768}
        sizes, cond = ((128, 128), (192, 128)), (16, 4096, 2048)
        found = (Family("flux", {**flux, "depth": [1, 2]}, sizes, cond), Family("flux_full", {**flux, "depth": [2, 3]}, sizes, cond),
                 Family("wan", wan, ((64, 64), (96, 64)), cond, 3.0, 5),
                 Family("sdxl", {"family": "sdxl", "depth": [0, 1, 2]}, ((64, 64), (96, 64)), (77, 2048, 1280), 3.0))
    else:
        flux, wan = {"family": "flux", "hidden": 3072}, {"family": "wan", "depth": 12, "hidden": 5120, "ffn": 13824}
        sizes, cond = ((1024, 1024), (832, 1216)), (512, 4096, 2048)
        found = (Family("flux", {**flux, "depth": [4, 8]}, sizes, cond), Family("flux_full", {**flux, "depth": [19, 38]}, sizes, cond),
                 Family("wan", wan, ((832, 480), (480, 832)), cond, 5.0, 33),
                 Family("sdxl", {"family": "sdxl", "depth": [0, 2, 10]}, sizes, (77, 2048, 1280), 6.0))
    return {family.name: family for family in found}


def make_models(context: Context, *wanted: Family) -> Path:
    """The base directory whose models are those of the families."""
    specs = json.dumps({family.name: family.spec for family in wanted})
    command = [find_python(context.comfyui), str(Path(__file__).with_name("models.py")), "--comfyui", str(context.comfyui), "--out",
               str(context.work / "base" / "models"), "--device", context.device, specs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"making models failed:\n{done.stdout}{done.stderr}")
    return context.work / "base"


def prompt(family: Family, nodes: Sequence[Node] = (), *, unet: str = "", lora: float = 0.0, size: int = 0, batch: int = 1, steps: int = 4,
           seed: int = 1, tokens: int = 0) -> dict:
    """Saves a latent. nodes: between loader (with its LoRA, if its strength is not 0) and sampler. size: which of the family's."""
    width, height = family.sizes[size]
    count, channels, pooled = family.cond
    latent = {"width": width, "height": height, "batch_size": batch}
    kind = "EmptyHunyuanLatentVideo" if family.frames else "EmptyLatentImage" if family.name == "sdxl" else "EmptySD3LatentImage"
    result = {"unet": _node("UNETLoader", unet_name=unet or family.unet, weight_dtype="default"),
              "latent": _node(kind, **latent, **({"length": family.frames} if family.frames else {}))}
    for name, cond_seed in (("positive", 1), ("negative", 2)):
        result[name] = _node("BenchConditioning", tokens=tokens or count, width=channels, pooled=pooled, seed=cond_seed)
    add_branch(result, "", family, nodes, lora, steps, seed)
    return result


def add_branch(result: dict, name: str, family: Family, nodes: Sequence[Node], lora: float, steps: int, seed: int) -> None:
    """A chain of model nodes and a sampler of its own, from the prompt's loader on."""
    chain = list(nodes)
    if lora:
        chain.insert(0, ("LoraLoaderModelOnly", {"lora_name": family.lora, "strength_model": lora}))
    model = "unet"
    for number, (kind, inputs) in enumerate(chain, 1):
        result[f"{name}model_{number}"] = _node(kind, model=[model, 0], **inputs)
        model = f"{name}model_{number}"
    result[f"{name}sampler"] = _node("KSampler", model=[model, 0], positive=["positive", 0], negative=["negative", 0],
                                     latent_image=["latent", 0], seed=seed, steps=steps, cfg=family.cfg, sampler_name="euler",
                                     scheduler="simple", denoise=1.0)
    result[f"{name}save"] = _node("SaveLatent", samples=[f"{name}sampler", 0], filename_prefix=f"suite{name}")


class Caches:
    """Folders of what compilers keep: empty at first, the same for a restart."""

    def __init__(self, folder: Path):
        self.env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton"),
                    "INT8_COMPILE_CACHE_DIR": str(folder / "cache"), "INT8_COMPILE_CACHE_KEY_FILE": str(folder / "key"),
                    "INT8_COMPILE_CACHE": "1", "TORCH_LOGS": "recompiles"}


@contextlib.contextmanager
def caches(context: Context) -> Iterator[Caches]:
    with tempfile.TemporaryDirectory(dir=context.work) as folder:
        yield Caches(Path(folder))


class Suite:
    """A running server. image(...) queues a prompt and gives (seconds, latent)."""

    def __init__(self, server: ComfyServer, context: Context):
        self.server, self.context = server, context

    def nodes(self, wanted: Sequence) -> list[Node]:
        """(class, inputs that differ from its defaults) or a class -> with all inputs."""
        chosen = [(node, {}) if isinstance(node, str) else node for node in wanted]
        return [(kind, {**self.server.defaults(kind), **inputs}) for kind, inputs in chosen]

    def run(self, content: dict) -> tuple[float, list]:
        """(seconds, the latents that it saved)"""
        result = self.server.run(content, timeout=max(5.0, self.context.left()))
        if result.status != "success":
            error = result.error or {}
            raise RuntimeError(f"{error.get('node_type')}: {str(error.get('exception_message', result.status)).strip()[:600]}")
        files = sorted((p for p in result.files(self.server) if p.suffix == ".latent"), key=str)
        return result.seconds, [load_latent(path) for path in files]

    def image(self, family: Family, nodes: Sequence[Node], **changes):
        seconds, (latent,) = self.run(prompt(family, nodes, **changes))
        return seconds, latent

    def memory(self, reset: bool = False, pause: bool = False) -> dict:
        """pause: nobody asks for it from now on, until this is called again."""
        return self.server.get(f"/gpu_probe?{'reset=1&' * reset}{'pause=1' * pause}")

    def start_profile(self) -> None:
        self.server.get("/gpu_profile?start=1")

    def profile(self) -> dict:
        """Since start_profile; see probe."""
        return self.server.get("/gpu_profile")

    def log(self) -> str:
        return self.server.log_text()

    def recompiles(self) -> int:
        return self.log().count("Recompiling function")

    def wait_for_builder(self) -> float:
        """Until all that was begun is built: -> seconds."""
        start = time.monotonic()
        while time.monotonic() - start < min(BUILD_TIMEOUT, self.context.left() - 10):
            log = self.log()
            if log.count(": building: ") <= log.count(": built: ") + log.count("not kept in the compile cache"):
                break
            time.sleep(0.2)
        return time.monotonic() - start


@contextlib.contextmanager
def serve(context: Context, models: Path, env: dict, extra_args: Sequence[str] = (), pack: bool = True) -> Iterator[Suite]:
    # A page of our own: the frontend's package need not be there.
    page = context.work / "page"
    page.mkdir(exist_ok=True)
    (page / "index.html").write_text("<html></html>")
    attention = ["--use-pytorch-cross-attention", "--front-end-root", str(page)]
    with tempfile.TemporaryDirectory(dir=context.work) as base:
        arguments = dict(models=models, env=env, device=context.device, extra_args=[*attention, *extra_args], extra_packs={"probe": PROBE})
        with ComfyServer(context.comfyui, Path(base), **arguments, **({} if pack else {"pack": None})) as server:
            yield Suite(server, context)


def save_int8(context: Context, family: Family, models: Path) -> None:
    """The family's native INT8 checkpoint, beside its bf16 one, for the servers that start later."""
    target = models / "models" / "diffusion_models" / family.int8
    if target.exists():
        return
    with caches(context) as kept, serve(context, models, kept.env) as suite:
        content = prompt(family, suite.nodes([("INT8QuantizeModel", {"method": "convrot"})]))
        del content["sampler"], content["save"]
        content["save"] = _node("SaveINT8Model", model=["model_1", 0], filename_prefix=f"diffusion_models/{family.name}_int8")
        result = suite.server.run(content, timeout=max(5.0, context.left()))
        if result.status != "success":
            raise RuntimeError(f"SaveINT8Model: {result.error}")
        (saved,) = (suite.server.base_dir / "output" / "diffusion_models").glob(f"{family.name}_int8_*.safetensors")
        saved.rename(target)
