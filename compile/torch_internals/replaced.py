"""A function of torch's own that another stands in for, while something is compiled."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def replaced(owner, name: str, mended: Callable[[Callable], Callable]) -> Iterator[None]:
    """A context in which owner's name is mended(what it was), for the whole process: see compile_settings."""
    plain = getattr(owner, name)
    setattr(owner, name, mended(plain))
    try:
        yield
    finally:
        setattr(owner, name, plain)
