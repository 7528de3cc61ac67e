"""Applies modes to a model, saves which it has, and restores them."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...int8.echo import echo
from .config import parse_config
from .errors import ApplyModeError, ModeConfigError
from .host import Host, ModelRecipe
from .mode import Mode
from .record import MAX_MODES
from .registry import MODES, ModeRegistry
from .search import run_search
from .state import ModeEntry, ModeState, check_chain


def parse_modes(modes, registry: ModeRegistry) -> list[tuple[Mode, object]]:
    """[(mode, config)] of a name, a Mode, a (name, config) pair, an object {"name", "config"}, or a list of such, of MAX_MODES at most;
    config: an object, an instance of the mode's config_class, or None. Raises UnknownModeError and ModeConfigError."""
    if isinstance(modes, (str, Mode, Mapping)) or (isinstance(modes, tuple) and len(modes) == 2 and not _is_mode(modes[1])):
        modes = [modes]
    if not isinstance(modes, Sequence):
        raise ModeConfigError(f"A mode is a name, or a name and its configuration, not a {type(modes).__name__}.")
    if len(modes) > MAX_MODES:
        raise ModeConfigError(f"{len(modes)} modes; {MAX_MODES} are the limit.")
    result = []
    for item in modes:
        if isinstance(item, Mapping):
            if not set(item) <= {"name", "config"} or "name" not in item:
                raise ModeConfigError('A mode is {"name": ..., "config": ...}, not an object with '
                                      f'{echo(", ".join(map(str, item))) or "no keys"}.')
            item = item["name"], item.get("config")
        name, config = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(name, (str, Mode)):
            raise ModeConfigError(f"A mode is a name, or a name and its configuration, not a {type(item).__name__}.")
        mode = registry[name]  # type: ignore[index]  # which says what it is that is no name
        if not isinstance(config, mode.config_class):
            config = parse_config(mode.config_class, {} if config is None else config, mode.name)
        result.append((mode, config))
    return result


def _is_mode(item) -> bool:
    return isinstance(item, (str, Mode, list, tuple))


def apply_modes(model, modes, mode_kwargs: Mapping | Iterable[Mapping] | None = None, *, registry: ModeRegistry = MODES):
    """A copy of model with the modes applied in order and recorded; model itself, also after any failure, stays as it was.

    model: of the kind that registry is for, or a ModelRecipe of one. modes: see parse_modes; empty: model comes back untouched.
    mode_kwargs: what a record cannot hold (a forward loop, a path): for all modes, or a list with one for each.

    Raises UnknownModeError, ModeConfigError and ModeOrderError before anything is done; ApplyModeError; what a mode raises.
    """
    recipe = isinstance(model, ModelRecipe)
    wanted = parse_modes(modes, registry)
    if not wanted:
        return model.build() if recipe else model
    host = registry.host
    state = ModeState() if recipe else host.get_state(model)
    check_chain(registry, [*state.names, *(mode.name for mode, _ in wanted)], start=len(state.names))
    kwargs = _kwargs_of_each(mode_kwargs, wanted)
    working = start(model, [mode for mode, _ in wanted], host)
    for (mode, config), given in zip(wanted, kwargs):
        working, state = _apply_one(registry, working, state, mode, config, given)
    for (mode, _), entry, given in zip(wanted, state.entries[-len(wanted):], kwargs):
        mode.finish(working, entry.config, **given)
    return working


def _kwargs_of_each(mode_kwargs, wanted) -> list[Mapping]:
    if mode_kwargs is None or isinstance(mode_kwargs, Mapping):
        return [mode_kwargs or {}] * len(wanted)
    kwargs = list(mode_kwargs)
    if len(kwargs) != len(wanted):
        raise ModeConfigError(f"mode_kwargs has {len(kwargs)} entries for {len(wanted)} modes. Give one for each, or one mapping for all.")
    return kwargs


def start(model, modes: Sequence[Mode], host: Host):
    """What the first mode gets: a copy of model, or a recipe as it is. Raises ApplyModeError for a mode that needs a recipe."""
    recipe = isinstance(model, ModelRecipe)
    for index, mode in enumerate(modes):
        if mode.require_model_like and (index or not recipe):
            raise ApplyModeError(f"{mode} makes the model itself: apply it first, to a ModelRecipe(ModelClass, args, kwargs).")
    if recipe:
        return model if modes[0].require_model_like else model.build()
    return host.clone(model)


def _apply_one(registry: ModeRegistry, working, state: ModeState, mode: Mode, config, kwargs):
    if state.last:
        state = state.with_last(updated(registry[state.last.name], state.last, working, "update_for_new_mode"))
    if mode.needs_search(config):
        config = run_search(mode, working, config, kwargs)
    converted = mode.convert(working, config, **kwargs)
    if not isinstance(converted, tuple) or len(converted) != 2:
        raise ApplyModeError(f"{mode}.convert must return (model, metadata), not a {type(converted).__name__}.")
    working, metadata = converted
    state = state.plus(ModeEntry.of(mode, config, metadata))
    registry.host.set_state(working, state)
    return working, state


def updated(mode: Mode, entry: ModeEntry, model, hook: str) -> ModeEntry:
    """entry after the mode's update_for_new_mode or update_for_save."""
    result = getattr(mode, hook)(model, entry.config, entry.metadata)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ApplyModeError(f"{mode}.{hook} must return (config, metadata), not a {type(result).__name__}.")
    return ModeEntry.of(mode, *result)
