"""What was measured and decided for a model on this machine, kept so that the next start decides nothing.

A file of this user for each model, goal and machine, signed: what cannot be read, or is of somebody else, is as good as none.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ...int8.files.folders import make_folder, remove
from ...int8.files.owners import CacheError
from ...int8.files.signed import default_key_file, read_signed, signing_key, write_signed
from ...int8.files.temporary import Sweeper
from ...int8.quantize import eligible_linears
from ...int8.report import ShapeDecision
from ..artifacts.entry import digest
from ..artifacts.key import machine, settings
from ..modes.config import dump_config, parse_config
from ..modes.errors import ModeConfigError
from . import artifact_cache
from . import core as comfy_core
from .int8_layer import compute_dtype_of
from .int8_source import pristine_weight, source_of
from .object_patches import model_of

logger = logging.getLogger(__name__)

VERSION = 2
MOST_FILES = 256
MOST_SIZES = 8
MAX_BYTES = 1 << 20  # of a file; one of a model with 1000 layers has a tenth of it
# Values of a layer's weight, and layers, that tell a model's weights from those of another of the same structure.
VALUES, LAYERS = 16, 32


@dataclass(frozen=True)
class Decision:
    """chosen: (layer, method), None: not decided. shapes: what was measured for it, as values of ShapeDecision. compiled: whether
    compiling pays, None: not known. times: (size, seconds of a step as the model came in, with the layers as chosen, and compiled; 0 for
    not known), of the last sizes. trial: (size, seconds of a step as the model came in, and as INT8 uncompiled in the same moments; 0 for
    not known). weights: MB before and after. slower: seconds of a step without and with INT8 layers, where these made
    it slower all in all: then none is chosen any more. steps_timed: of each kind, for times."""

    chosen: tuple[tuple[str, Literal["float", "rowwise", "convrot"]], ...] | None = None
    shapes: tuple[tuple[int, int, int, int, int, float, float, float], ...] = ()
    compiled: bool | None = None
    times: tuple[tuple[str, float, float, float], ...] = ()
    trial: tuple[str, float, float] = ("", 0.0, 0.0)
    weights: tuple[float, float] = (0.0, 0.0)
    slower: tuple[float, float] = (0.0, 0.0)
    steps_timed: int = 0

    def shape_decisions(self) -> list[ShapeDecision]:
        return [ShapeDecision(*values) for values in self.shapes]

    @property
    def is_int8(self) -> bool:
        return any(method != "float" for _, method in self.chosen or ())

    def without_int8(self, before: float, now: float) -> Decision:
        """What is decided once INT8 has turned out slower; whether compiling pays is open again."""
        return replace(self, chosen=tuple((name, "float") for name, _ in self.chosen), compiled=None, times=(), slower=(before, now),
                       shapes=tuple((*shape[:4], 0, *shape[5:]) for shape in self.shapes))  # type: ignore[arg-type,misc]

    def with_times(self, size: str, *seconds: float, steps: int) -> Decision:
        others = tuple(entry for entry in self.times if entry[0] != size)
        return replace(self, steps_timed=steps, times=(*others, (size, *seconds))[-MOST_SIZES:])  # type: ignore[arg-type]


def key_of(patcher, goal: str, names: list[str]) -> str:
    """Of a model (ModelPatcher), what is asked for, this card and what runs on it. names: its layers that may become INT8; what was
    measured of them counts for their weights only."""
    model, device = model_of(patcher).diffusion_model, patcher.load_device  # not what another clone has put there
    own = set(eligible_linears(model))
    structure = [(name, type(module).__qualname__) for name, module in model.named_modules() if name not in own]
    tensors = [(name, tuple(t.shape), str(t.dtype)) for name, t in model.named_parameters() if name.rpartition(".")[0] not in own]
    layers = {name: pristine_weight(patcher, name).detach() for name in sorted(own)}
    tensors += [(name, tuple(t.shape), str(t.dtype)) for name, t in layers.items()]
    dtype = compute_dtype_of(patcher)
    values = [source_of(patcher, name)[0].flatten() for name in names[::max(1, len(names) // LAYERS)]]
    values = [weight[::max(1, weight.numel() // VALUES)].float().cpu() for weight in values]
    weights = hashlib.sha256(torch.cat(values).numpy().tobytes()).hexdigest() if values else ""
    return digest([VERSION, goal, machine(device.type, device.index), settings(), comfy_core.comfyui_version(), artifact_cache.host(),
                   structure, tensors, str(dtype), weights])


# What was decided in this process, the last used last.
_KNOWN: OrderedDict[str, Decision] = OrderedDict()
_PASSING: dict[str, str] = {}  # why it is not on disk
SHORT, FAILED, OFF, UNWRITTEN = "memory was short", "nothing could be compiled", "the compile cache is off", "it could not be written"
UNTIMED = "what a step takes without the node was not timed"
# How often a decision has changed so that a model that is sampled now is not as it should be: its node is to run again.
_revision = 0


def revision() -> int:
    return _revision


def changed() -> None:
    global _revision
    _revision += 1


def folder() -> Path:
    return artifact_cache.folder() / "decisions"


def read(key: str) -> Decision | None:
    """None where there is none that can be trusted."""
    if key in _KNOWN:
        return _KNOWN[key]
    try:
        path = folder() / f"{key}.json"
        if not artifact_cache.is_enabled() or not path.exists() or path.stat().st_size > MAX_BYTES:
            return None
        return parse_config(Decision, json.loads(read_signed(path, _key())), "decision")
    except (CacheError, OSError, ValueError, RecursionError, ModeConfigError) as error:
        logger.info("INT8 Compile: what was decided for this model is decided anew: %s", error)
        return None


def known(key: str) -> Decision | None:
    """What this process has decided, or read."""
    return _KNOWN.get(key)


def passing(key: str) -> str:
    """Why the next start does not know what is decided of key; empty where it does."""
    return _PASSING.get(key, "")


def write(key: str, decision: Decision, passing_because: str = "") -> None:
    """On disk, if that can be: without it the next start measures again, as it is to where memory was short for any of it, compiling
    failed, or a timing was interrupted (SHORT, FAILED, UNTIMED)."""
    _KNOWN[key] = decision
    _KNOWN.move_to_end(key)
    while len(_KNOWN) > MOST_FILES:
        _PASSING.pop(_KNOWN.popitem(last=False)[0], None)
    if passing(key) == SHORT:
        passing_because = SHORT
    if passing_because:
        _PASSING[key] = passing_because
        with contextlib.suppress(OSError):
            remove(folder() / f"{key}.json")  # the layers that were chosen before
        return
    if not artifact_cache.is_enabled():
        _PASSING[key] = OFF
        return
    _PASSING.pop(key, None)
    try:
        artifact_cache.require_apart(folder())
        make_folder(folder())
        Sweeper().sweep(folder().iterdir())
        files = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:max(0, len(files) + 1 - MOST_FILES)]:
            remove(path)
        write_signed(folder() / f"{key}.json", json.dumps(dump_config(decision)).encode(), _key())
    except (CacheError, OSError, ValueError) as error:
        _PASSING[key] = UNWRITTEN
        logger.info("INT8 Compile: what was decided for this model is not kept: %s", error)


def clear() -> int:
    """Deletes all; how many."""
    _KNOWN.clear()
    files = list(folder().glob("*.json"))
    for path in files:
        remove(path)
    return len(files)


def _key() -> bytes:
    return signing_key(default_key_file(), folder())
