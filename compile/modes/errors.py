"""What can go wrong with modes. Each message says what to change."""
from __future__ import annotations


class ApplyModeError(RuntimeError):
    """A mode could not be applied or restored; the model that came in is as it was. What a mode raises of its own (out of memory, an
    interrupt) is passed on as it is."""


class ModeOrderError(ApplyModeError):
    """A mode may not follow those before it."""


class ModeConfigError(ApplyModeError, ValueError):
    """A configuration, or an argument of a mode, is wrong."""


class UnknownModeError(ApplyModeError, LookupError):
    """No such mode is registered."""


class ModeRecordError(ApplyModeError, ValueError):
    """A saved record of modes is damaged, hostile, or newer than this pack."""


class ModeRegistryError(ValueError):
    """A mode's definition is wrong, or its name is taken."""
