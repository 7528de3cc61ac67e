"""Which guards on ComfyUI's transformer_options a compiled block can do without."""
from __future__ import annotations

import collections.abc
import os
import re
import sys

import torch

from ...pack import ROOT
from .unguarded import Unguarded

# What ComfyUI writes there for patches to read, anew for every block, step or prompt. Blocks themselves read it for nothing else
# (comfy/ldm, 0.33), so that without patches it cannot change a result; guards on it would compile again for each block.
BOOKKEEPING = {
    "block", "block_index", "block_type", "total_blocks", "transformer_index", "img_slice", "grid_sizes", "original_shape",
    "activations_shape", "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars",
}
# The options as keyword (kwargs['transformer_options']['block']) or, in UNets, by position: a block takes no other dict (args[2]['block']).
# Or in a function among the arguments (args[3].__closure__[1].cell_contents['block']).
_OPTIONS = re.compile(r"transformer_options'\]|(?:L\[')?args(?:'\])?\[\d+\](?=\['\w+'\])|\.cell_contents(?=\['\w+'\])")
_DICT_ARGUMENT = re.compile(r"(?:L\[')?args(?:'\])?\[\d+\]")
_NOT_READERS = ("<frozen", os.path.dirname(torch.__file__), os.path.dirname(collections.__file__), collections.abc.__file__,
                str(ROOT / "compile"))
# Kinds of guards on the dict as a whole that change with the bookkeeping and say nothing about one key. Any other kind stays: torch 2.14
# has DICT_NOT_CONTAINS where older ones have DICT_CONTAINS for a key that is absent. (TYPE_MATCH compares the length too.)
_OF_THE_WHOLE = {"TYPE_MATCH", "ID_MATCH", "DICT_LENGTH", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "DICT_CONST_KEYS", "DICT_VERSION",
                 "MAPPING_KEYS_CHECK"}
_KEY = re.compile(r"\['(\w+)'")


def keep_guard(name: str, guard_type: str, value=None, by_core: bool = True) -> bool:
    """Whether a guard must stay where no patch is active. name: its source, such as ``kwargs['transformer_options']['run_vx']``;
    value: what it is about, where dynamo tells. by_core: it is ComfyUI's own code that reads it.

    A flag or number that a block reads, whether a key is there at all, and that there are options, can change the result: their guards
    stay. So does whatever other code than ComfyUI's reads.
    """
    options = _OPTIONS.search(name)
    if not by_core or (not options and not (isinstance(value, dict) and (
            _DICT_ARGUMENT.fullmatch(name) or (name.endswith(".cell_contents") and not BOOKKEEPING.isdisjoint(value))))):
        return True
    key = _KEY.match(name, options.end()) if options else None
    return key[1] not in BOOKKEEPING if key else guard_type not in _OF_THE_WHOLE


class GuardFilter:
    """A guard_filter_fn for torch.compile. drop_bookkeeping: no patch is active. environment: of the process when it was compiled, where
    that asked os.getenv, which dynamo takes for a constant. unguarded: see there. classes: those that it read, and of the objects
    that it read: dynamo guards which they are, not what they hold."""

    def __init__(self, drop_bookkeeping: bool):
        self._drop_bookkeeping = drop_bookkeeping
        self.environment: dict[str, str] | None = None
        self.unguarded = Unguarded()
        self.classes: set[type] = set()

    def __call__(self, entries) -> list[bool]:
        values = [entry.value for entry in entries if entry.has_value]
        self.classes.update(value if isinstance(value, type) else type(value) for value in values)
        if self.environment is None and any(value is os.getenv for value in values):
            self.environment = dict(os.environ)
        for entry in entries:
            if entry.has_value and hasattr(entry, "orig_guard"):
                self.unguarded.add(entry.orig_guard.name, entry.value)
        if not self._drop_bookkeeping:
            return [True] * len(entries)
        return [keep_guard(entry.name, entry.guard_type, entry.value if entry.has_value else None, _is_by_core(entry)) for entry in entries]


def _is_by_core(entry) -> bool:
    """Whether the innermost code that made dynamo guard a value, torch's and Python's aside, is ComfyUI's."""
    core = sys.modules.get("comfy")
    stack = getattr(getattr(entry, "orig_guard", None), "user_stack", None) or ()
    reader = next((frame.filename for frame in reversed(stack) if not frame.filename.startswith(_NOT_READERS)), "")
    # Where no reader is known dynamo guards what it writes back at the end, not what was read.
    return not reader or (core is not None and any(reader.startswith(os.path.join(folder, "")) for folder in core.__path__))
