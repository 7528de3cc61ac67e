"""The modes that a model has, in order, and which may come next."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApplyModeError, ModeOrderError
from .mode import Mode


@dataclass(frozen=True)
class ModeEntry:
    """config: an instance of the mode's config_class. metadata_json: what convert returned, as JSON text, so that no one changes it
    behind the record's back. saved: see Mode.save_mode_in_state."""

    name: str
    config: Any
    metadata_json: str = "{}"
    saved: bool = True

    @classmethod
    def of(cls, mode: Mode, config, metadata) -> ModeEntry:
        """Raises ApplyModeError for metadata that JSON does not give back as they are."""
        try:
            text = json.dumps(metadata, allow_nan=False)
            same = isinstance(metadata, dict) and json.loads(text) == metadata
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise ApplyModeError(f"{mode}: its metadata must be a dict of JSON values (text keys, lists, no tuples, sets, tensors or NaN). "
                                 "Tensors belong into buffers of the model.")
        if not isinstance(config, mode.config_class):
            raise ApplyModeError(f"{mode}: its config became a {type(config).__name__}, not a {mode.config_class.__name__}.")
        return cls(mode.name, config, text, mode.save_mode_in_state)

    @property
    def metadata(self) -> dict:
        """A fresh copy."""
        return json.loads(self.metadata_json)


@dataclass(frozen=True)
class ModeState:
    """The record of a model: immutable, so that copies of the model share it."""

    entries: tuple[ModeEntry, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @property
    def last(self) -> ModeEntry | None:
        return self.entries[-1] if self.entries else None

    def plus(self, entry: ModeEntry) -> ModeState:
        return ModeState((*self.entries, entry))

    def with_last(self, entry: ModeEntry) -> ModeState:
        return ModeState((*self.entries[:-1], entry))

    def saved(self) -> ModeState:
        return ModeState(tuple(entry for entry in self.entries if entry.saved))

    def __iter__(self) -> Iterator[ModeEntry]:
        return iter(self.entries)

    def __reduce__(self):
        # copy.deepcopy and pickle of a model: what is not saved (compile) does not come along either.
        return ModeState, (self.saved().entries,)


def pending_modes(registry, names: Sequence[str]) -> tuple[list[Mode], list[Mode]]:
    """(modes that wait for their export mode, modes whose prohibitions hold), both in order, after names have been applied."""
    pending: list[tuple[int, Mode]] = []
    exported = set()
    modes = [registry[name] for name in names]
    for index, mode in enumerate(modes):
        if mode.is_export_mode:
            while pending and pending[-1][1].export_mode == mode.name:
                exported.add(pending.pop()[0])
        elif mode.export_mode:
            pending.append((index, mode))
    return [mode for _, mode in pending], [mode for index, mode in enumerate(modes) if index not in exported]


def check_next(registry, names: Sequence[str], name: str) -> None:
    """Raises ModeOrderError unless the mode may follow names; UnknownModeError."""
    mode = registry[name]
    pending, in_force = pending_modes(registry, names)
    if mode.is_export_mode and not (pending and pending[-1].export_mode == mode.name):
        if pending:
            raise ModeOrderError(f"Cannot add {mode}: {pending[-1]} waits for {pending[-1].export_mode}. "
                                 f"Apply {pending[-1].export_mode} first.")
        what = " or ".join(sorted(other.name for other in registry if other.export_mode == mode.name))
        raise ModeOrderError(f"Cannot add {mode}: there is nothing to export. Apply {what} first.")
    if names:
        mode.assert_compatibility_as_next_mode_of(registry[names[-1]])
    for other in reversed(pending):
        mode.check_next_modes_of(other)
    for other in reversed(in_force):
        mode.check_prohibitions_of(other)


def check_chain(registry, names: Sequence[str], start: int = 0) -> None:
    """Raises ModeOrderError unless each of names from start on may follow those before it; UnknownModeError."""
    for index in range(start, len(names)):
        check_next(registry, names[:index], names[index])
