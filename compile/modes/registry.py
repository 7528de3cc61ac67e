"""Which modes there are for one kind of model."""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from ...int8.echo import echo
from .config import check_config_class
from .errors import ModeRegistryError, UnknownModeError
from .host import Host, ModuleHost
from .mode import Mode

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class ModeRegistry:
    """host: how that kind of model is copied, and where its record of modes is."""

    def __init__(self, host: Host):
        self.host = host
        self._modes: dict[str, Mode] = {}

    def register(self, cls: type[Mode]) -> type[Mode]:
        """Adds a mode; also as a class decorator. Raises ModeRegistryError for a name that is taken, always, and for a wrong definition."""
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ModeRegistryError(f"{cls.__name__}.name must be lower case letters, digits, '_', '-' or '.', 64 at most, not {name!r}.")
        if name in self._modes:
            raise ModeRegistryError(f"The mode '{name}' is registered already, by {type(self._modes[name]).__module__}. "
                                    "Choose another name, such as <pack>.<mode>.")
        check_config_class(cls.config_class)
        if cls.is_export_mode and cls.export_mode:
            raise ModeRegistryError(f"{name}: an export mode has no export mode of its own.")
        self._modes[name] = cls()
        return cls

    def remove(self, name: str) -> None:
        """Takes a mode out. Raises UnknownModeError."""
        del self._modes[self[name].name]

    def get(self, name: str) -> Mode | None:
        return self._modes.get(str(name))

    def __getitem__(self, name: str) -> Mode:
        """Raises UnknownModeError with the near matches."""
        mode = self.get(name)
        if mode is None:
            near = difflib.get_close_matches(str(name)[:64], self._modes, n=2)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UnknownModeError(f"There is no mode '{echo(str(name)[:64])}'. {hint}The modes are: "
                                   f"{', '.join(sorted(self._modes)) or 'none'}. A mode of another pack is there once that pack is loaded.")
        return mode

    def __contains__(self, name: str) -> bool:
        return str(name) in self._modes

    def __iter__(self) -> Iterator[Mode]:
        return iter(self._modes.values())

    def check(self) -> None:
        """Raises ModeRegistryError with every rule that names a mode that does not exist, and every export mode that exports nothing."""
        problems = []
        for mode in self:
            for rule in ("next_modes", "next_prohibited_modes"):
                problems += [f"{mode}.{rule} names '{name}', which is no mode" for name in sorted(getattr(mode, rule) or ())
                             if name not in self]
            if mode.export_mode and not (mode.export_mode in self and self[mode.export_mode].is_export_mode):
                problems.append(f"{mode}.export_mode names '{mode.export_mode}', which is no export mode")
            if mode.is_export_mode and not any(other.export_mode == mode.name for other in self):
                problems.append(f"{mode} is the export mode of no mode")
        if problems:
            raise ModeRegistryError("; ".join(problems) + ".")


# The modes of plain torch models. Another pack adds its own: MODES.register(TheirMode).
MODES = ModeRegistry(ModuleHost())
