"""The record of modes of a ComfyUI MODEL: from its nodes, from its file, into its file, and in words."""
from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import folder_paths

from ...int8.echo import OF_A_PROMPT, echo
from ...int8.files.owners import open_regular
from ...int8.options import Int8Options
from ...int8.report import ProgressCallback, no_progress
from ..modes.apply import apply_modes, parse_modes, updated
from ..modes.config import dump_config, parse_config
from ..modes.convrot import ConvRot
from ..modes.errors import ApplyModeError, ModeRecordError
from ..modes.int8 import Int8
from ..modes.mode import NoConfig
from ..modes.record import METADATA_KEY, parse_state
from ..modes.restore import mode_state, replay
from ..modes.smoothquant import SmoothQuant
from ..modes.state import ModeEntry, ModeState, check_chain
from ..options import check_path
from .checkpoint_file import read_header
from .int8_calibrate import quantize_model
from .int8_model import int8_layers
from .modes import PATCHER_MODES, Int8Record, PatcherCompile, PatcherInt8, PatcherInt8Config, PatcherSmoothQuantConfig, int8_metadata

logger = logging.getLogger(__name__)


def quantize_and_record(patcher, options: Int8Options, on_progress: ProgressCallback = no_progress):
    """quantize_model, recorded as the modes that it is. Raises what quantize_model raises."""
    clone = quantize_model(patcher, options, on_progress)
    state = PATCHER_MODES.host.get_state(patcher)
    if Int8.name in state.names or int8_layers(patcher):
        return clone  # recorded, or to be read off its layers
    config = PatcherInt8Config(options.keep_layers, options.min_sqnr_db, options.kernel)
    preparing = [entry for entry in _modes_before_int8(options.method) if entry.name not in state.names]
    PATCHER_MODES.host.set_state(clone, ModeState((*state, *preparing, _entry(Int8.name, config, int8_metadata(clone)))))
    return clone


def _modes_before_int8(method: str) -> list[ModeEntry]:
    """What comes before int8 where it quantizes by that method of Int8Options."""
    if method == "convrot":
        return [_entry(ConvRot.name, NoConfig())]
    where: Any = {"auto": "better", "smoothquant": "all"}.get(method)
    return [_entry(SmoothQuant.name, PatcherSmoothQuantConfig(where))] if where else []


def _entry(name: str, config, metadata: dict | None = None) -> ModeEntry:
    return ModeEntry.of(PATCHER_MODES[name], config, metadata or {})


@dataclass(frozen=True)
class ModesReport:
    """modes: the names of all that the model now has, in order."""

    modes: tuple[str, ...]

    def status(self) -> str:
        return f"modes: {', '.join(self.modes)}" if self.modes else "no modes: the model is as it was loaded"

    def short(self) -> list[str]:
        return [self.status()]

    def text(self) -> str:
        return self.status()

    def warnings(self) -> list[str]:
        return []

    def to_dict(self) -> dict:
        return {"modes": list(self.modes)}


def apply_to_patcher(patcher, modes, on_progress: ProgressCallback = no_progress, compile_kwargs: Mapping[str, Any] = MappingProxyType({})):
    """apply_modes on a MODEL from any loader: its record is that of its file. on_progress: called with a ModesReport, and with what int8
    and compile report, when the model first samples too. compile_kwargs: see PatcherCompile.convert."""
    patcher = recorded(patcher)
    wanted = parse_modes(modes, PATCHER_MODES)
    names = (*PATCHER_MODES.host.get_state(patcher).names, *(mode.name for mode, _ in wanted))
    on_progress(ModesReport(names))
    kwargs = [{"on_progress": on_progress} if isinstance(mode, PatcherInt8) else
              {"on_progress": on_progress, **compile_kwargs} if isinstance(mode, PatcherCompile) else {} for mode, _ in wanted]
    return apply_modes(patcher, wanted, kwargs, registry=PATCHER_MODES)


def recorded(patcher):
    """patcher, or where it has INT8 layers from a file and no record yet, a clone with the record of that file and its modes restored; one
    made from the layers where the file has none, or one that says otherwise.

    Raises ModeRecordError for a record that cannot be read.
    """
    if patcher.get_attachment(METADATA_KEY) or not int8_layers(patcher):
        return patcher
    derived, path = _derived(patcher), _file_of(patcher)
    text = _metadata(path).get(METADATA_KEY) if path else None
    state = derived
    if text is not None:
        try:
            state = parse_state(text, PATCHER_MODES)
            check_chain(PATCHER_MODES, state.names)
            agrees = _recorded_layers(state) == _recorded_layers(derived)
        except ApplyModeError as error:
            raise ModeRecordError(f"{echo(path.name)}: {error} To use the file without its record of modes, connect Load Diffusion "
                                  "Model, and INT8 Quantize Model for this pack's kernels.") from error
        if not agrees:
            logger.warning("%s: its record of modes does not agree with its INT8 layers. The layers hold: %s.", echo(path.name),
                           ", ".join(derived.names), extra={OF_A_PROMPT: True})
            state = derived
    return replay(patcher, state, PATCHER_MODES)


def _derived(patcher) -> ModeState:
    rotated = any(group for group, _ in int8_layers(patcher).values())
    return ModeState((*_modes_before_int8("convrot" if rotated else "rowwise"),
                      _entry(Int8.name, PatcherInt8Config(), int8_metadata(patcher))))


def _recorded_layers(state: ModeState) -> set[tuple[str, int, bool]]:
    return {layer for entry in state if entry.name == Int8.name
            for layer in parse_config(Int8Record, entry.metadata, "int8 in the record").layers}


def _file_of(patcher) -> Path | None:
    """The file that patcher was loaded from, as its loader says (ModelPatcher.cached_patcher_init)."""
    arguments = patcher.cached_patcher_init[1] if patcher.cached_patcher_init else ()
    return Path(arguments[0]) if arguments and isinstance(arguments[0], str) else None


def _metadata(path: Path) -> dict[str, str]:
    try:
        with open_regular(path) as file:  # gone since, or a pipe by now
            return read_header(file)[1].get("__metadata__") or {}
    except (OSError, ValueError, RuntimeError):  # another format; CacheError, RecursionError
        return {}


def for_file(patcher):
    """A clone of patcher with the layers that its file will have, and their record: smoothed layers are written as rotated ones."""
    from .int8_checkpoint import native_model  # needs a core with native INT8; the compile modes do not

    patcher = recorded(patcher)
    ready = native_model(patcher)
    rotated = any(group for group, _ in int8_layers(ready).values())
    entries = []
    for entry in PATCHER_MODES.host.get_state(patcher):
        if entry.name == Int8.name:
            entries += [*_modes_before_int8("convrot" if rotated else "rowwise"), entry]
        elif entry.name not in (SmoothQuant.name, ConvRot.name):
            entries.append(entry)
    PATCHER_MODES.host.set_state(ready, ModeState(tuple(entries)))
    return ready


def save_model(patcher, filename_prefix: str) -> Path:
    """Writes patcher's INT8 model and its record below ComfyUI's output folder. Raises what save_int8_model raises."""
    from .int8_checkpoint import save_int8_model

    check_path(filename_prefix, "filename_prefix")
    folder, filename, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
    path = Path(folder) / f"{filename}_{counter:05}_.safetensors"
    ready = for_file(patcher)
    save_int8_model(ready, path, {METADATA_KEY: json.dumps(mode_state(ready, registry=PATCHER_MODES))})
    return path


def describe(patcher) -> str:
    """The modes of patcher in words: a line that Apply Modes takes, then a line for each mode."""
    patcher = recorded(patcher)
    entries = PATCHER_MODES.host.get_state(patcher).entries
    if not entries:
        return "[]\nNo modes: the model is as it was loaded."
    entries = tuple(updated(PATCHER_MODES[entry.name], entry, patcher, "update_for_save") for entry in entries)
    settings = [_changed_settings(entry.config) for entry in entries]
    chain = [{"name": entry.name, "config": changed} if changed else entry.name for entry, changed in zip(entries, settings)]
    lines = [json.dumps(chain)]
    for number, (entry, changed) in enumerate(zip(entries, settings), 1):
        parts = [f"{key} = {json.dumps(value)}" for key, value in changed.items()]
        if entry.name == Int8.name:
            parts = [*_describe_int8(parse_config(Int8Record, entry.metadata, entry.name)), *parts]
        lines.append(f"{number}. {entry.name}" + (f": {', '.join(parts)}" if parts else ""))
    return "\n".join(lines)


def _changed_settings(config) -> dict:
    """Those that are not the default, without what was measured, which has its own words."""
    default = dump_config(type(config)())
    return {key: value for key, value in dump_config(config).items() if value != default[key] and key != "chosen"}


def _describe_int8(record: Int8Record) -> list[str]:
    kinds = Counter("smoothed" if smoothed else "rotated" if group else "row-wise" for _, group, smoothed in record.layers)
    parts = [f"{len(record.layers)} layers ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"] if kinds else []
    if record.waiting:
        parts.append(f"{record.waiting} layers to be measured at the first sampling")
    if record.sqnr_db:
        name, least = min(record.sqnr_db, key=lambda measured: measured[1])
        parts.append(f"least SQNR {least:.1f} dB ({name})")
    return parts
