"""Values that a program can have among its arguments as they are."""
from __future__ import annotations

CONSTANTS = (type(None), bool, int, float, str)


class Unsupported(Exception):
    """What cannot be made an artifact of, and why."""


def constant(value) -> tuple:
    """Equal only for what is the same: zeros, which compare equal, are texts, with their sign."""
    return type(value).__name__, str(value) if type(value) is float and value == 0.0 else value


class CallAgain(RuntimeError):
    """The model is to be called once more: what was compiled could not finish, and may have written into what it got."""
