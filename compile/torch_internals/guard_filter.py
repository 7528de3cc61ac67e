"""Which guards on ComfyUI's transformer_options a compiled block can do without."""
from __future__ import annotations

import collections.abc
import dataclasses
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator

import torch

from ...pack import ROOT
from . import leftovers, varied
from .absent import ABSENT
from .unguarded import Unguarded

# What ComfyUI writes there for patches to read, anew for every block, step or prompt. Blocks themselves read it for nothing else
# (comfy/ldm, 0.33), so that without patches it cannot change a result; guards on it would compile again for each block.
BOOKKEEPING = {
    "block", "block_index", "block_type", "total_blocks", "transformer_index", "img_slice", "grid_sizes", "original_shape",
    "activations_shape", "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars",
}
# Of these, what the model itself writes for its blocks. The model as a whole does read the others (wrappers run inside it).
WRITTEN_BY_MODEL = {"block", "block_index", "block_type", "total_blocks", "transformer_index", "img_slice", "grid_sizes", "original_shape",
                    "activations_shape"}
# Where patches are that reach into blocks, and may read the bookkeeping; attention can be an operation of compiled code.
INNER_PATCHES = ("patches", "patches_replace")
OVERRIDE = "optimized_attention_override"
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
# Of these, what is left where code goes through all keys: it then depends on which there are.
_OF_ALL_KEYS = {"DICT_KEYS_MATCH", "DICT_CONST_KEYS", "DICT_VERSION", "MAPPING_KEYS_CHECK"}


def options_of(args: tuple, kwargs: dict) -> dict:
    """The transformer_options among the arguments of a block: the only dict that it takes."""
    options = kwargs.get("transformer_options")
    if type(options) is dict:
        return options
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, dict)), {})


def has_patches(options: dict) -> bool:
    # As ComfyUI asks for them.
    return any(map(options.get, INNER_PATCHES)) or OVERRIDE in options


def keep_guard(name: str, guard_type: str, value=None, by_core: bool = True, unread: Iterable[str] = frozenset(BOOKKEEPING)) -> bool:
    """Whether a guard must stay where no patch is active. name: its source, such as ``kwargs['transformer_options']['run_vx']``;
    value: what it is about, where dynamo tells. by_core: it is ComfyUI's own code that reads it. unread: keys that nothing is computed
    with.

    A flag or number that a block reads, whether a key is there at all, and that there are options, can change the result: their guards
    stay. So does whatever other code than ComfyUI's reads.
    """
    options = _OPTIONS.search(name)
    if not by_core or (not options and not (isinstance(value, dict) and (
            _DICT_ARGUMENT.fullmatch(name) or (name.endswith(".cell_contents") and not BOOKKEEPING.isdisjoint(value))))):
        return True
    key = _KEY.match(name, options.end()) if options else None
    if key:
        return key[1] not in unread
    return guard_type not in _OF_THE_WHOLE or (guard_type in _OF_ALL_KEYS and name.endswith(".cell_contents"))


class GuardFilter:
    """A guard_filter_fn for torch.compile. drop_bookkeeping: no patch is active. whole_model: it is the model that is compiled, not its
    blocks. code: what is compiled. traced: fills with the code that was. environment: of the process when it was compiled, where that asked
    os.environ, which dynamo takes for a constant. option_keys: of transformer_options beside the bookkeeping, where code went through all
    keys. unguarded: see there. classes: those that it read, and of the objects that it read: dynamo guards which they are, not what they
    hold."""

    def __init__(self, drop_bookkeeping: bool, whole_model: bool = False, code: types.CodeType | None = None):
        self._code = code
        self._drop_bookkeeping = drop_bookkeeping
        self._unread = frozenset(WRITTEN_BY_MODEL if whole_model else BOOKKEEPING)
        self.traced: Iterable[types.CodeType] = ()
        self.environment: dict[str, str] | None = None
        self.option_keys: frozenset | None = None
        self.unguarded = Unguarded()
        self.classes: set[type] = set()

    def __call__(self, entries) -> list[bool]:
        leftovers.drop()
        entries = [dataclasses.replace(entry, has_value=False) if entry.value is ABSENT else entry for entry in entries]
        values = [entry.value for entry in entries if entry.has_value]
        self.classes.update(value if isinstance(value, type) else type(value) for value in values)
        if self.environment is None and (any(value is os.getenv or value is os.environ for value in values)
                                         or any("environ" in code.co_names for code in self.traced)):
            self.environment = dict(os.environ)
        for entry in entries:
            if entry.has_value and hasattr(entry, "orig_guard"):
                self.unguarded.add(entry.orig_guard.name, entry.value)
        if not self._drop_bookkeeping:
            return [True] * len(entries)
        unread = self._unread - set(_keys_of_others(self.traced))
        kept = [keep_guard(entry.name, entry.guard_type, entry.value if entry.has_value else None, _is_by_core(entry), unread)
                for entry in entries]
        for entry, stays in zip(entries, kept):
            if not stays and entry.guard_type in _OF_ALL_KEYS and entry.has_value and isinstance(entry.value, dict):
                self.option_keys = self.keys(entry.value)
        if self._code is not None:
            varied.forget(self._code, [entry.orig_guard.name for entry, stays in zip(entries, kept)
                                       if not stays and hasattr(entry, "orig_guard")])
        return kept

    def keys(self, options: dict) -> frozenset:
        """Those beside the bookkeeping. ComfyUI goes through them to copy them: their order says nothing."""
        return frozenset(key for key in options if key not in self._unread)


def _keys_of_others(traced: Iterable[types.CodeType]) -> Iterator[str]:
    """The keys of bookkeeping that other code than ComfyUI's names. Where ComfyUI's has read one before, dynamo guards it for ComfyUI."""
    modules = None
    for code in traced:
        if code.co_filename.startswith(_NOT_READERS) or _is_in_comfyui(code.co_filename):
            continue
        yield from _texts(code.co_consts)
        if modules is None:
            modules = {file: module for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
        if (module := modules.get(code.co_filename)) is not None:
            yield from (value for name in code.co_names if isinstance(value := vars(module).get(name), str))


def _texts(constants: tuple) -> Iterator[str]:
    for value in constants:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (tuple, frozenset)):
            yield from _texts(tuple(value))


def _is_in_comfyui(path: str) -> bool:
    core = sys.modules.get("comfy")
    return core is not None and any(path.startswith(os.path.join(folder, "")) for folder in core.__path__)


def _is_by_core(entry) -> bool:
    """Whether the innermost code that made dynamo guard a value, torch's and Python's aside, is ComfyUI's."""
    stack = getattr(getattr(entry, "orig_guard", None), "user_stack", None) or ()
    reader = next((frame.filename for frame in reversed(stack) if not frame.filename.startswith(_NOT_READERS)), "")
    # Where no reader is known dynamo guards what it writes back at the end, not what was read.
    return not reader or _is_in_comfyui(reader)
