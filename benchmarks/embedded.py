"""The demo without ComfyUI: a small diffusion transformer of this repository, run through the pack's engine.

The model learns within a minute to draw a shape in a colour, so that its pictures can be judged by eye. Needs torch,
numpy and Pillow.
"""
from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import relative_difference  # noqa: E402
from benchmarks.demo_report import TITLES, Variant, limits  # noqa: E402

SIZE = 32
PATCH = 4
SHAPES = ("circle", "square", "triangle", "ring")
COLOURS = ((0.9, 0.2, 0.2), (0.2, 0.75, 0.3), (0.25, 0.4, 0.95), (0.95, 0.8, 0.2))
CLASSES = len(SHAPES) * len(COLOURS)
TRAINING_STEPS = 300  # about half a minute on two idle CPU cores
LEARNING_RATE = 1.5e-3
BATCH = 8
ZOOM = 4
WEIGHTS = "embedded_dit.pt"
KEPT = ("int8_background", "int8_next")  # with the compile cache
SAME_SEED, SECOND_SEED = 1, 5
WARM_SEEDS = (2, 3, 4)  # the fastest counts: other programs can only slow a run down


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning (adaLN of DiT, arXiv 2212.09748)."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)
        nn.init.zeros_(self.modulation.weight)
        nn.init.constant_(self.modulation.bias, 0.5)  # gates half open learn faster than closed ones

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


class DiT(nn.Module):
    """images [B, 3, SIZE, SIZE] in -1..1, times [B] in 0..1 (1 is noise), labels [B] -> the clean images (not noise or velocity, which
    a model this small and this briefly trained could not get out of its pictures)."""

    def __init__(self, hidden: int = 256, depth: int = 6, heads: int = 4):
        super().__init__()
        tokens = (SIZE // PATCH) ** 2
        self.embed = nn.Linear(3 * PATCH**2, hidden)
        self.position = nn.Parameter(torch.randn(tokens, hidden) * 0.5)
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.label = nn.Embedding(CLASSES, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.out = nn.Linear(hidden, 3 * PATCH**2)
        nn.init.zeros_(self.out.weight)

    def forward(self, images, times, labels):
        frequencies = torch.exp(-math.log(1000) * torch.arange(32, device=times.device) / 32)
        angles = 100 * times[:, None] * frequencies
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(images.dtype)) + self.label(labels)
        x = self.embed(F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, c)
        x = self.out(F.layer_norm(x, x.shape[-1:])).transpose(1, 2)
        return F.pixel_shuffle(x.unflatten(-1, (SIZE // PATCH, SIZE // PATCH)), PATCH)


def int8_layer(linear: nn.Linear) -> nn.Module:
    """A Linear in INT8, with the pack's layer of plain tensors."""
    from int8_compile.int8.plain_layer import ArtifactLinear
    from int8_compile.int8.quantize import quantize_weight

    qweight, scale, group = quantize_weight(linear.weight.detach(), rotate=True)
    layer = ArtifactLinear(group, "auto", ("qweight", "weight_scale", "bias"), {})
    layer.qweight, layer.weight_scale, layer.bias = qweight, scale, linear.bias.detach().clone()
    return layer


def import_pack():
    """The pack as the package int8_compile: its folder may have any name, and its nodes need ComfyUI, so that it is no installed one."""
    if "int8_compile" not in sys.modules:
        spec = importlib.util.spec_from_file_location("int8_compile", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules["int8_compile"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def shapes(labels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, SIZE, SIZE] in -1..1 of a shape a label, of varied place and size, with soft edges, on dark blue."""
    draw = torch.rand(3, len(labels), 1, 1, generator=rng)
    radius, cx, cy = 0.5 + 0.12 * draw[0], 0.2 * (draw[1] - 0.5), 0.2 * (draw[2] - 0.5)
    line = torch.linspace(-1, 1, SIZE)
    x, y = line[None, None, :] - cx, line[None, :, None] - cy
    distance = (x**2 + y**2).sqrt()
    signed = torch.stack([  # negative inside
        distance - radius,
        torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
        torch.maximum(1.9 * x.abs() - y - radius, y - radius) / 1.5,
        (distance - 0.85 * radius).abs() - 0.3 * radius,
    ])
    inside = torch.sigmoid(-signed[labels // len(COLOURS), torch.arange(len(labels))] * SIZE)[:, None]
    colour = torch.tensor(COLOURS)[labels % len(COLOURS)][:, :, None, None]
    background = torch.tensor((0.08, 0.09, 0.16))[:, None, None]
    return (inside * colour + (1 - inside) * background) * 2 - 1


def train(device: torch.device) -> DiT:
    """A model trained on shapes() by flow matching; the same on every run."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = DiT().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    start = time.perf_counter()
    for step in range(TRAINING_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20, 1.05 - step / TRAINING_STEPS)
        labels = torch.randint(CLASSES, (BATCH,), generator=rng)
        clean = shapes(labels, rng)
        times = torch.rand(BATCH, generator=rng)
        mixed = torch.lerp(clean, torch.randn(clean.shape, generator=rng), times[:, None, None, None])
        loss = F.mse_loss(model(mixed.to(device), times.to(device), labels.to(device)), clean.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"  {TRAINING_STEPS} steps, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.inference_mode()
def sample(model: nn.Module, call: Callable, seed: int, steps: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """One image of every class by Euler steps from noise at time 1 to time 0: ([CLASSES, 3, SIZE, SIZE], seconds a step).

    call: runs a step of model.
    """
    x = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(device)
    labels = torch.arange(CLASSES, device=device)
    start = time.perf_counter()
    for step in range(steps):
        t = 1 - step / steps
        times = torch.full((CLASSES,), t, device=device)
        clean = call(lambda x=x, times=times: model(x, times, labels))
        x = x + (clean - x) / (steps * t)
    x = x.cpu()
    return x, (time.perf_counter() - start) / steps


def quantized(model: DiT) -> DiT:
    """A copy of model whose eligible Linear layers are INT8."""
    from int8_compile.int8.quantize import eligible_linears

    copied = copy.deepcopy(model)
    for name in eligible_linears(copied):
        parent, _, key = name.rpartition(".")
        setattr(copied.get_submodule(parent), key, int8_layer(copied.get_submodule(name)))
    return copied


def megabytes(model: nn.Module) -> float:
    return sum(t.nbytes for t in model.state_dict().values()) / 2**20


def picture(images: torch.Tensor, path: Path) -> None:
    """A grid of images [CLASSES, 3, SIZE, SIZE], a row a shape."""
    from PIL import Image

    grid = images.clamp(-1, 1).unflatten(0, (len(SHAPES), len(COLOURS))).permute(0, 3, 1, 4, 2)
    grid = ((grid + 1) * 127.5).byte().reshape(len(SHAPES) * SIZE, len(COLOURS) * SIZE, 3)
    Image.fromarray(grid.numpy()).resize((len(COLOURS) * SIZE * ZOOM, len(SHAPES) * SIZE * ZOOM), Image.Resampling.NEAREST).save(path)


def open_cache(out: Path):
    """The compile cache of this demo, in out."""
    from int8_compile.compile.artifacts.builder import Builder
    from int8_compile.compile.artifacts.runtime import Cache
    from int8_compile.compile.artifacts.store import CacheStore

    store = CacheStore(out / "compile_cache", out / "compile_cache_key" / "cache.key")
    return Cache(store, Builder(store))


def measure(name: str, model: DiT, out: Path, steps: int) -> tuple[Variant, torch.Tensor]:
    """A variant by the pack's engine, without its difference; the images [seeds, CLASSES, 3, SIZE, SIZE]. Its picture is put into out."""
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    device = next(model.parameters()).device
    network = quantized(model) if name.startswith("int8") else model
    cache = open_cache(out) if name in KEPT else None
    compiled = CompiledModule(CompileOptions(dynamic=True, blocks_only=True, title=TITLES[name], background=name in KEPT), device, cache)

    def call(step):
        if name == "eager":
            return step()
        return compiled.run(network, step, filter_guards=True, passthrough=lambda error: False)

    print(f"{TITLES[name]} ...", flush=True)
    times, images = [], []
    for seed in (SAME_SEED, SECOND_SEED):
        start = time.perf_counter()
        images.append(sample(network, call, seed, steps, device)[0])
        times.append(time.perf_counter() - start)
    if name == "int8_background" and cache:
        print("  another process compiles ...", flush=True)
        cache.builder.wait(lambda left: None)
    warm = [sample(network, call, seed, steps, device) for seed in WARM_SEEDS]
    picture(images[0], out / f"{name}.png")
    images += [image for image, _ in warm]
    calls, said = compiled.report.last_calls, compiled.report.fallbacks
    error = compiled.report.failure or (f"not compiled: {calls} {said}" if name in KEPT and calls["eager"] else "")
    variant = Variant(name, min(seconds for _, seconds in warm), *times, megabytes(network), limits=limits(name, "float32"), error=error)
    return variant, torch.stack(images)


def run(out: Path, steps: int) -> list[Variant]:
    """The variants through the pack's engine; pictures in out."""
    import_pack()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = out / WEIGHTS
    if not weights.exists():
        print("Training the embedded model to draw coloured shapes, once; about a minute on a CPU ...", flush=True)
        torch.save(train(device).state_dict(), weights)
    model, variants, reference = load(out, device), [], None
    shutil.rmtree(out / "compile_cache", ignore_errors=True)
    for name in TITLES:
        if name == "int8_next":
            subprocess.run([sys.executable, __file__, str(out), str(steps)], check=True)
            variant, images = Variant(**json.loads((out / "next_start.json").read_text())), torch.load(out / "next_start.pt")
        else:
            variant, images = measure(name, model, out, steps)
        reference = images if name == "eager" else reference
        variant.difference = max(relative_difference(*pair) for pair in zip(images, reference))
        variants.append(variant)
    return variants


def load(out: Path, device: torch.device) -> DiT:
    """The model that run() has trained."""
    model = DiT().to(device).eval()
    model.load_state_dict(torch.load(out / WEIGHTS, map_location=device, weights_only=True))
    return model


def next_start(out: Path, steps: int) -> None:
    """The last variant, in a process that compiles nothing; next_start.json and next_start.pt in out."""
    from benchmarks import embedded  # as the process that compiled it named its classes

    import_pack()
    model = embedded.load(out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    variant, images = embedded.measure("int8_next", model, out, steps)
    torch.save(images, out / "next_start.pt")
    (out / "next_start.json").write_text(json.dumps(asdict(variant)))


if __name__ == "__main__":
    next_start(Path(sys.argv[1]), int(sys.argv[2]))
