"""The user's own model in each way that the nodes can run it, for the check."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...int8.options import Int8Options
from ...int8.plan import sqnr_db
from ...int8.report import QuantizeReport
from ..check.ways import NO_LIMIT_DB, Way, all_ways, measure_way, psnr_db
from ..modes.compile import Compile
from ..report import CompileReport
from .artifact_cache import get_cache
from .compile_model import is_compiled_by_core, reports
from .int8_calibrate import planned_layers
from .int8_model import int8_layers
from .mode_records import apply_to_patcher, quantize_and_record
from .modes import PATCHER_MODES

SAMPLER, SCHEDULER = "euler", "simple"
PICTURES, LATENTS = "PSNR of the picture", "SQNR of the latent"
TITLE = "INT8 Compile Check"
COMPILE = {"name": Compile.name}


@dataclass
class ModelInputs:
    """What a sampler gets: see ComfyUI's KSampler. negative: as positive where it is None. vae None: there are no pictures."""

    model: Any
    positive: list | None
    negative: list | None
    latent_image: dict | None
    vae: Any
    steps: int
    cfg: float

    def check(self) -> None:
        """Raises ValueError where they cannot be measured."""
        if self.positive is None or self.latent_image is None:
            raise ValueError(f"{TITLE}: a model is measured by sampling it. Connect positive and latent_image too, or disconnect model.")
        for name, conditioning in (("positive", self.positive), ("negative", self.positive if self.negative is None else self.negative)):
            if not (isinstance(conditioning, list) and conditioning and all(map(_is_conditioning, conditioning))):
                raise ValueError(f"{TITLE}: {name} is not what a sampler takes: a list of a tensor and a dict each, at least one. "
                                 "Connect CLIP Text Encode.")
        if not isinstance(self.latent_image, dict) or not isinstance(self.latent_image.get("samples"), torch.Tensor):
            raise ValueError(f"{TITLE}: latent_image has no tensor as samples. Connect a node for an empty latent.")
        if not math.isfinite(self.cfg):
            raise ValueError(f"{TITLE}: cfg is no number. 1 is without a negative prompt.")
        if (Compile.name in PATCHER_MODES.host.get_state(self.model).names or reports(self.model) or planned_layers(self.model)
                or int8_layers(self.model) or is_compiled_by_core(self.model)):
            raise ValueError(f"{TITLE}: this model has INT8 layers or is compiled already. Connect what is before those nodes.")

    @property
    def quality(self) -> str:
        return LATENTS if self.vae is None else PICTURES

    def title(self) -> str:
        return f"Your model, seconds of an image of {self.steps} steps ({SAMPLER}, {SCHEDULER}), cfg {self.cfg:g}:"


def measure_model(inputs: ModelInputs, tick: Callable[[int, int], object]) -> tuple[list[Way], torch.Tensor | None]:
    """Each way, and the pictures of those that ran, [N, H, W, 3] in 0..1; None without a VAE. tick(done, total): before each; what it
    raises, as an interrupt does, ends it."""
    ways, pictures, reference = all_ways(), [], None
    for done, way in enumerate(ways):
        tick(done, len(ways))
        try:
            made = _run(way, inputs, functools.partial(tick, done, len(ways)))
            if inputs.vae is not None:
                made = _decoded(inputs.vae, made)
                pictures.append(made[:1].nan_to_num())
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # of the model, the VAE, or another pack's code
            line = str(error).partition("\n")[0]
            way.error = line if line and isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__}: {line}"
            continue
        if not made.isfinite().all():
            way.error = way.error or "what it gives is NaN or infinite"
            continue
        if way is ways[0]:
            reference = made
        elif reference is not None and reference.shape == made.shape:
            way.decibels = max(-NO_LIMIT_DB, min(NO_LIMIT_DB, sqnr_db(reference, made))) if inputs.vae is None else psnr_db(made, reference)
    tick(len(ways), len(ways))
    return ways, torch.cat(pictures) if pictures else None


def _is_conditioning(entry) -> bool:
    return (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], torch.Tensor) and isinstance(entry[1], dict))


class _Reports:
    """What the modes report, kept."""

    def __init__(self):
        self.compile: CompileReport | None = None
        self.quantize: QuantizeReport | None = None

    def __call__(self, report, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if isinstance(report, CompileReport):
            self.compile = report
        elif isinstance(report, QuantizeReport):
            self.quantize = report


def _run(way: Way, inputs: ModelInputs, tick: Callable[[], object]) -> torch.Tensor:
    """Its first latent, on the CPU."""
    from nodes import common_ksampler  # ComfyUI's registry

    seen, model = _Reports(), inputs.model.clone()
    if way.method:
        model = quantize_and_record(model, Int8Options(way.method), seen)
    if way.compiled:
        model = apply_to_patcher(model, [COMPILE], seen, {"title": TITLE})

    def image(seed: int) -> torch.Tensor:
        (latent,) = common_ksampler(model, seed, inputs.steps, inputs.cfg, SAMPLER, SCHEDULER, inputs.positive,
                                    inputs.positive if inputs.negative is None else inputs.negative, inputs.latent_image)
        return latent["samples"].float().cpu()

    def check(_: int) -> None:
        tick()

    def settle() -> None:
        """The builder would take its share of the machine from the images that are timed."""
        if way.compiled and (cache := get_cache()) is not None:
            cache.builder.wait(check)
    made = measure_way(way, image, settle)
    way.weights_mb = seen.quantize.after if seen.quantize is not None else model.model_size() / 2**20
    if seen.compile is not None and seen.compile.failure:
        way.error = seen.compile.warnings()[0]
    return made


def _decoded(vae, samples: torch.Tensor) -> torch.Tensor:
    """[N, H, W, 3] in 0..1: of videos all pictures."""
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])[..., :3].float().cpu().clamp(0, 1)
