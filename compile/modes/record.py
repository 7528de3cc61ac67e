"""The record of modes as JSON, which goes into a file's metadata and comes from files that anybody may have made."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ...int8.echo import echo
from .config import dump_config, parse_config
from .errors import ModeRecordError
from .registry import ModeRegistry
from .state import ModeEntry, ModeState

# The key in a safetensors file's metadata.
METADATA_KEY = "int8_compile.modes"
VERSION = 1
# version -> what makes a record of version + 1 of one of that version.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
# An honest record of a model with 3000 layers has 0.3 MB, 6 levels and a handful of modes.
MAX_CHARACTERS = 4 << 20
MAX_DEPTH = 16
MAX_MODES = 64


def dump_state(state: ModeState) -> dict:
    """The record of state as JSON values; json.dumps of it is what a file holds."""
    return {"version": VERSION,
            "modes": [{"name": entry.name, "config": dump_config(entry.config), "metadata": entry.metadata} for entry in state]}


def parse_state(record: str | dict, registry: ModeRegistry, version: int = VERSION,
                migrations: Mapping[int, Callable[[dict], dict]] = MIGRATIONS) -> ModeState:
    """The state of a record, JSON text or the object itself. Executes nothing of it.

    Raises ModeRecordError for text of more than MAX_CHARACTERS, more than MAX_DEPTH levels or MAX_MODES modes, anything that is no
    record, one of a newer version, and a mode that is never saved (a file does not switch compile on) or that has what it never writes;
    UnknownModeError and ModeConfigError as apply_modes.
    """
    content: Any = _load(record)
    _check_depth(content)
    found = content.get("version") if isinstance(content, dict) else None
    if type(found) is not int or found < 0:
        raise ModeRecordError('The record of modes is not an object with a whole number as "version".')
    if found > version:
        raise ModeRecordError(f"The record of modes has version {echo(found)}; this INT8 Compile reads up to {version}. Update INT8 "
                              "Compile.")
    for step in range(found, version):
        if step not in migrations:
            raise ModeRecordError(f"The record of modes has version {found}, which cannot be read any more. Apply the modes again.")
        content = migrations[step](content)
    modes = content.get("modes")
    if not isinstance(modes, list) or len(modes) > MAX_MODES:
        raise ModeRecordError(f'The record\'s "modes" must be a list of at most {MAX_MODES}.')
    return ModeState(tuple(_entry(item, registry) for item in modes))


def _entry(item, registry: ModeRegistry) -> ModeEntry:
    if not isinstance(item, dict) or set(item) != {"name", "config", "metadata"} or not isinstance(item["name"], str):
        raise ModeRecordError('A mode in the record must be an object with "name", "config" and "metadata".')
    mode = registry[item["name"]]
    if not mode.save_mode_in_state:
        raise ModeRecordError(f"The record has the mode {mode}, which is never saved: the file was not made by INT8 Compile.")
    if not isinstance(item["metadata"], dict):
        raise ModeRecordError(f"{mode}: in the record, its metadata must be an object.")
    config = parse_config(mode.config_class, item["config"], f"{mode} in the record")
    return ModeEntry.of(mode, *mode.update_for_restore(config, item["metadata"]))


def _load(record):
    if not isinstance(record, str):
        return record
    if len(record) > MAX_CHARACTERS:
        raise ModeRecordError(f"The record of modes has {len(record)} characters; {MAX_CHARACTERS} are the limit.")

    def no_duplicates(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def finite(text):
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is no finite number")
        return float(text)

    try:
        return json.loads(record, object_pairs_hook=no_duplicates, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ModeRecordError(f"The record of modes is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise ModeRecordError(f"The record of modes is not JSON: {error}.") from None


def _check_depth(value) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for parent in level if isinstance(parent, (dict, list))
                 for item in (parent.values() if isinstance(parent, dict) else parent)]
        if not level:
            return
    raise ModeRecordError(f"The record of modes is nested deeper than {MAX_DEPTH} levels.")

