"""What a mode is."""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import ApplyModeError, ModeOrderError


@dataclass(frozen=True)
class NoConfig:
    """Of a mode that has nothing to set."""


class Mode:
    """One thing that can be done to a model, and redone from its record. Subclass it, set ``name``, write ``convert`` and ``restore``,
    and register the class (see ModeRegistry.register). ModelOpt's ModeDescriptor is the model of this interface.

    name: unique; lower case letters, digits, ``_ - .`` (of another pack: ``pack.mode``).
    config_class: a frozen dataclass whose fields have defaults (see config.check_config_class).
    next_modes: the only modes that may follow at once, or before export_mode has been applied; empty: none may; None: any.
    next_prohibited_modes: modes that may not be applied after this one, at any distance, until its export_mode has been applied.
    export_mode: the mode that finishes what this one began, None where nothing is to be finished.
    is_export_mode: it finishes the modes that name it: all those that were applied last without being finished.
    require_model_like: convert and restore get a ModelRecipe instead of a module, so the mode can be first only.
    save_mode_in_state: False: left out of saved records, to be applied again in each process; refused in a file's record.
    """

    name: ClassVar[str]
    config_class: ClassVar[type] = NoConfig
    next_modes: ClassVar[Collection[str] | None] = None
    next_prohibited_modes: ClassVar[Collection[str] | None] = None
    export_mode: ClassVar[str | None] = None
    is_export_mode: ClassVar[bool] = False
    require_model_like: ClassVar[bool] = False
    save_mode_in_state: ClassVar[bool] = True

    def convert(self, model, config, **kwargs) -> tuple[Any, dict]:
        """Does it: (the changed model, metadata). model is a copy that shares its parameters with the model that came in: put new tensors
        in the place of old ones, never write into them. metadata: JSON values only; tensors belong into the model's state_dict.
        kwargs: mode_kwargs of apply_modes, which are in no record."""
        raise NotImplementedError(f"{type(self).__name__}.convert")

    def restore(self, model, config, metadata: dict):
        """The changed model, its structure only: weights come by load_state_dict afterwards. Needs no data and searches nothing. metadata
        comes from a file: check it."""
        raise NotImplementedError(f"{type(self).__name__}.restore")

    def finish(self, model, config, **kwargs) -> None:
        """After every mode of a call has been converted and recorded: the place to write files, so that a failure leaves none."""

    def update_for_new_mode(self, model, config, metadata: dict) -> tuple[Any, dict]:
        """(config, metadata) as they shall be recorded once another mode follows this one."""
        return config, metadata

    def update_for_save(self, model, config, metadata: dict) -> tuple[Any, dict]:
        """(config, metadata) as they shall be saved; the model's own record stays."""
        return config, metadata

    def update_for_restore(self, config, metadata: dict) -> tuple[Any, dict]:
        """(config, metadata) of a file's record as they shall count. Anybody may have made the file: what this mode does not write is
        refused (ModeRecordError, ModeConfigError) or left out, so that a record can ask for structure only. The opposite of
        update_for_save."""
        return config, metadata

    def needs_search(self, config) -> bool:
        """Whether something in config is still to be found by search_algorithm."""
        return False

    @property
    def search_algorithm(self) -> type:
        """A Searcher, which gives the config that convert then gets and that is recorded. Raises ApplyModeError where there is none."""
        raise ApplyModeError(f"{self.name} has nothing to search for.")

    def assert_compatibility_as_next_mode_of(self, other: Mode) -> None:
        """Raises ModeOrderError unless this mode may follow other at once."""
        self.check_next_modes_of(other)
        self.check_prohibitions_of(other)

    def check_next_modes_of(self, other: Mode) -> None:
        if other.next_modes is None or self.name in other.next_modes:
            return
        if not other.next_modes:
            remedy = "Apply it once" if self.name == other.name else f"Put {self} before it"
            raise ModeOrderError(f"Cannot add {self} after {other}: nothing may follow {other}. {remedy}.")
        raise ModeOrderError(f"Cannot add {self} after {other}: only {', '.join(sorted(other.next_modes))} may follow {other}.")

    def check_prohibitions_of(self, other: Mode) -> None:
        if self.name in (other.next_prohibited_modes or ()):
            ways = [] if self.name == other.name else [f"put {self} before it"]
            ways += [f"apply {other.export_mode} between them"] if other.export_mode else []
            remedy = " or ".join(ways or ["apply it once"]).capitalize()
            raise ModeOrderError(f"Cannot add {self} after {other}: {other} does not allow {self} after it. {remedy}.")

    def __str__(self):
        return self.name

    def __repr__(self):
        return f"<{type(self).__name__}: '{self.name}'>"
