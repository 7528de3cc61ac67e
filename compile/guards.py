"""Which guards on ComfyUI's transformer_options a compiled block can do without."""
from __future__ import annotations

import re

# What ComfyUI writes there for patches to read, anew for every block, step or prompt. Blocks themselves read it for nothing else
# (comfy/ldm, 0.33), so that without patches it cannot change a result; guards on it would compile again for each block.
BOOKKEEPING = {
    "block", "block_index", "block_type", "total_blocks", "transformer_index", "img_slice", "grid_sizes", "original_shape",
    "activations_shape", "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars",
}
# The options as keyword (kwargs['transformer_options']['block']) or, in UNets, by position: a block takes no other dict (args[2]['block']).
_OPTIONS = re.compile(r"transformer_options'\]|(?:L\[')?args(?:'\])?\[\d+\](?=\['\w+'\])")
_DICT_ARGUMENT = re.compile(r"(?:L\[')?args(?:'\])?\[\d+\]")
# Kinds of guards on the dict as a whole that change with the bookkeeping and say nothing about one key. Any other kind stays: torch 2.14
# has DICT_NOT_CONTAINS where older ones have DICT_CONTAINS for a key that is absent.
_OF_THE_WHOLE = {"TYPE_MATCH", "ID_MATCH", "DICT_LENGTH", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "DICT_CONST_KEYS", "DICT_VERSION",
                 "MAPPING_KEYS_CHECK"}
_KEY = re.compile(r"\['(\w+)'")


def needed(name: str, guard_type: str, value=None) -> bool:
    """Whether a guard must stay where no patch is active. name: its source, such as ``kwargs['transformer_options']['run_vx']``;
    value: what it is about, where dynamo tells.

    A flag or number that a block reads, and whether a key is there at all, can change the result: their guards stay.
    """
    options = _OPTIONS.search(name)
    if not options and not (isinstance(value, dict) and _DICT_ARGUMENT.fullmatch(name)):
        return True
    key = _KEY.match(name, options.end()) if options else None
    return key[1] not in BOOKKEEPING if key else guard_type not in _OF_THE_WHOLE


def without_bookkeeping(entries) -> list[bool]:
    """A guard_filter_fn for torch.compile."""
    return [needed(entry.name, entry.guard_type, entry.value if entry.has_value else None) for entry in entries]
