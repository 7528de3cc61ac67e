"""Patches of which it is seen which a block asks for."""
from __future__ import annotations

from collections.abc import Callable


class Watched(dict):
    """The patches of one kind. doubt: told False where one of those is asked for that only ComfyUI's models call, or all."""

    def __init__(self, patches: dict, outside: frozenset[str], doubt: Callable[[bool], None]):
        super().__init__(patches)
        self._outside = outside
        self._doubt = doubt

    def __contains__(self, key):
        self._doubt(key not in self._outside)
        return super().__contains__(key)

    def __getitem__(self, key):
        self._doubt(key not in self._outside)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._doubt(key not in self._outside)
        return super().get(key, default)

    def _all(self):
        self._doubt(False)
        return super()

    def __len__(self):
        return self._all().__len__()

    def __iter__(self):
        return self._all().__iter__()

    def keys(self):
        return self._all().keys()

    def values(self):
        return self._all().values()

    def items(self):
        return self._all().items()

    def copy(self):
        return self._all().copy()
