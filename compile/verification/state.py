"""What a block's call changes beside its arguments (the block, what it holds, random generators), and how it is put back."""
from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...int8.artifact_layer import has_artifact_tensors
from ...pack import PACKAGE
from ..artifacts.foreign_layer import unwatched
from ..torch_internals.described import slots_of
from .second_run import TENSORS, Unverifiable

# How many objects of a block are looked at, those near it first.
MOST = 20_000
_SEQUENCES = (list, deque)
_CONSTANTS = (type(None), str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType)
_DECIDING = {f"aten::{name}" for name in ("topk", "argmax", "argmin", "sort", "argsort", "searchsorted", "bucketize", "kthvalue")}
# Objects from there are no block's state: other threads may change them meanwhile.
_OF_OTHERS = {"torch", "triton", "numpy", "comfy_kitchen", "comfy_aimdo", PACKAGE.partition(".")[0], *sys.stdlib_module_names}
_OF_COMFYUI, _OF_ITS_BLOCKS = "comfy.", "comfy.ldm."


@dataclass
class Trace:
    """is_left: whether something had to be put back. dtypes: of what operations gave. decides: whether one of them chose (a top-k), where
    the last bit of a near tie changes whole rows."""

    is_left: bool = False
    dtypes: set[torch.dtype] = field(default_factory=set)
    decides: bool = False


@contextlib.contextmanager
def nothing_left(module: torch.nn.Module, device: torch.device) -> Iterator[Trace]:
    """What a call changes in the module (attributes, containers and objects in them, tensors, arrays) and in random generators is put
    back. Raises Unverifiable where it has drawn random numbers, or may read an iterator."""
    state, trace = _State(module), Trace()
    generators = [(get(), get, put) for get, put in [*_generators(device), *state.generators]]
    drawn = False
    try:
        with _Writes(state.storages, trace) as writes, unwatched():
            yield trace
        drawn = any(_differs(before, get()) for before, get, _ in generators)
    finally:
        for before, _, put in generators:
            put(before)
        trace.is_left |= state.restore()
        trace.is_left |= writes.undo()
    if drawn:
        raise Unverifiable("it draws random numbers")


class _State:
    """Of a module, all modules in it, and what their attributes hold."""

    def __init__(self, module: torch.nn.Module):
        self.storages: set[int] = set()
        self.generators: list[tuple[Callable, Callable]] = []
        self._containers: list[tuple] = []  # (dict, list, ..., a copy)
        self._slots: list[tuple[object, dict]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._own = set(map(id, module.modules()))
        seen: dict[int, object] = {}  # kept: their ids are in use
        waiting: deque[object] = deque([module])
        while waiting and len(seen) < MOST:
            value = waiting.popleft()
            if id(value) not in seen and not isinstance(value, _CONSTANTS):
                seen[id(value)] = value
                waiting.extend(self._look_at(value))

    def _look_at(self, value) -> list:
        """What is in it."""
        if isinstance(value, Tensor):
            if type(value) in TENSORS and value.layout is torch.strided and value.device.type != "meta":
                self.storages.add(value.untyped_storage().data_ptr())
            return []
        if type(value) in (tuple, frozenset):
            return list(value)
        if type(value) in _SEQUENCES or isinstance(value, set):
            self._containers.append((value, list(value)))
            return list(value)
        if isinstance(value, dict):
            self._containers.append((value, dict(value)))
            return list(value.values())
        if type(value) is np.ndarray:
            self._arrays.append((value, value.copy()))
            return []
        if own := _own_generator(value):
            self.generators.append(own)
            return []
        return self._in_object(value)

    def _in_object(self, value) -> list:
        where = type(value).__module__
        if isinstance(value, torch.nn.Module):
            is_state = id(value) in self._own and not has_artifact_tensors(value)  # the pack's own note for good what they find out
        else:
            is_state = (where.partition(".")[0] not in _OF_OTHERS
                        and (not where.startswith(_OF_COMFYUI) or where.startswith(_OF_ITS_BLOCKS)))
        if hasattr(type(value), "__next__") and not isinstance(value, torch.nn.Module):
            raise Unverifiable("it holds an iterator")
        if not is_state:
            return []
        slots = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}
        if slots:
            self._slots.append((value, slots))
        return [*slots.values(), *([value.__dict__] if type(getattr(value, "__dict__", None)) is dict else [])]

    def restore(self) -> bool:
        """Whether something was another."""
        changed = False
        for container, before in self._containers:
            if _holds_other(container, before):
                changed = True
                container.clear()
                (container.extend if type(container) in _SEQUENCES else container.update)(before)
        for value, before in self._slots:
            for name, item in before.items():
                if getattr(value, name, None) is not item:
                    changed = True
                    setattr(value, name, item)
        for array, before in self._arrays:
            if array.tobytes() != before.tobytes():
                changed = True
                array[...] = before
        return changed


class _Writes(TorchDispatchMode):
    """Keeps what is in some storages before an operation writes into them, and says in trace what ran. storages: their addresses."""

    def __init__(self, storages: set[int], trace: Trace):
        super().__init__()
        self._storages = storages
        self._trace = trace
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = getattr(function, "_schema", None)
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
                    for tensor in given if isinstance(given, (list, tuple)) else [given]:
                        if type(tensor) in TENSORS:
                            self._keep(tensor.untyped_storage())
        self._trace.decides |= schema is not None and schema.name in _DECIDING
        result = function(*args, **kwargs)
        results = result if isinstance(result, (list, tuple)) else [result]
        self._trace.dtypes.update(one.dtype for one in results if isinstance(one, Tensor))
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address in self._storages and address not in self._before:
            self._before[address] = storage, storage.clone()

    def undo(self) -> bool:
        """Whether something was written."""
        for storage, before in self._before.values():
            storage.copy_(before)
        return bool(self._before)


def _holds_other(container, before) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, dict):
        return any(map(operator.is_not, container, before)) or any(container.get(key, before) is not value for key, value in before.items())
    return container != set(before) if isinstance(container, set) else any(map(operator.is_not, container, before))


def _generators(device: torch.device) -> list[tuple[Callable, Callable]]:
    """(what gives the state, what sets it) of each that a block on device may draw from."""
    known = [(random.getstate, random.setstate), (torch.get_rng_state, torch.set_rng_state), (np.random.get_state, np.random.set_state)]
    own = getattr(torch, device.type, None)
    if device.type == "mps":
        known.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
    elif device.type != "cpu" and hasattr(own, "get_rng_state"):
        known.append((functools.partial(own.get_rng_state, device), functools.partial(own.set_rng_state, device=device)))
    return known


def _own_generator(value) -> tuple[Callable, Callable] | None:
    """As of _generators, where value is one."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return (lambda: bits.state), functools.partial(setattr, bits, "state")
    return None


def _differs(before, after) -> bool:
    if isinstance(before, Tensor):
        return not torch.equal(before, after)
    if isinstance(before, (dict, tuple)):
        items = [list(each.values() if isinstance(each, dict) else each) for each in (before, after)]
        return any(map(_differs, *items))
    return not np.array_equal(before, after) if isinstance(before, np.ndarray) else before != after
