"""The modes that a model has, as a record; and a record's modes on a model."""
from __future__ import annotations

import json

from .apply import start, updated
from .errors import ApplyModeError
from .host import ModelRecipe
from .record import dump_state, parse_state
from .registry import MODES, ModeRegistry
from .state import ModeState, check_chain


def mode_state(model, *, registry: ModeRegistry = MODES) -> dict:
    """The record of model's modes as JSON values, without those that are not saved; the model and its own record stay as they are.

    Raises ModeOrderError where what is left could not be restored.
    """
    entries = registry.host.get_state(model).entries
    state = ModeState(tuple(updated(registry[entry.name], entry, model, "update_for_save") for entry in entries)).saved()
    check_chain(registry, state.names)
    return dump_state(state)


def restore_modes(model, record: str | dict, *, registry: ModeRegistry = MODES):
    """A copy of model with the structure that record says; weights come by load_state_dict afterwards. model stays as it was.

    model: as it was before the modes, or a recipe of it. record: of mode_state, or its JSON text. Raises ModeRecordError,
    UnknownModeError, ModeConfigError and ModeOrderError before anything is done; ApplyModeError for a model that has modes, or that is
    another than the record's; what a mode raises.
    """
    if isinstance(record, dict):  # a copy, and the same checks as for text
        record = json.dumps(record)
    state = parse_state(record, registry)
    check_chain(registry, state.names)
    recipe = isinstance(model, ModelRecipe)
    if not recipe and (names := registry.host.get_state(model).names):
        raise ApplyModeError(f"The model has modes already: {', '.join(names)}. Restore onto the model as it was before them.")
    if not state.entries:
        return model.build() if recipe else model
    return replay(model, state, registry)


def replay(model, state: ModeState, registry: ModeRegistry):
    """A copy of model with the modes of state, which has some, restored and recorded."""
    modes = [registry[name] for name in state.names]
    working = start(model, modes, registry.host)
    for mode, entry in zip(modes, state):
        working = mode.restore(working, entry.config, entry.metadata)
    registry.host.set_state(working, state)
    return working
