"""A block's call made a second time, eager, with arguments of its own; see state for what else it may change."""
from __future__ import annotations

import contextlib
import enum
import types
import uuid
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..artifacts import records
from ..torch_internals.block_tree import attributes_of_tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
          uuid.UUID, enum.Enum, torch.dtype, torch.device, torch.Size, torch.nn.Module)
TENSORS = (Tensor, torch.nn.Parameter)


class Unverifiable(Exception):
    """Why a call is not made twice."""


class CallCopy:
    """args and kwargs with tensors and containers of its own. dtype: of what is floating-point among them, None: as it is. Memory that
    tensors share is shared by the copies, and lies as it did; not with another dtype."""

    def __init__(self, args: tuple, kwargs: dict, dtype: torch.dtype | None = None):
        self._dtype = dtype
        self._copies: dict[int, object] = {}
        self._originals: list = []  # whose ids are in use
        self._storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.args: tuple = self._copy(args)
        self.kwargs: dict = {name: self._copy(value) for name, value in kwargs.items()}

    def _copy(self, value, is_option: bool = False):
        """is_option: it is in a dict, where ComfyUI and packs keep objects of theirs (wrappers), which a block hands on."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) not in self._copies:
            self._originals.append(value)
            self._copies[id(value)] = self._made(value, is_option)
        return self._copies[id(value)]

    def _made(self, value, is_option: bool):
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) is dict:
            return {key: self._copy(item, True) for key, item in value.items()}
        if type(value) in (list, tuple, set, deque):
            return type(value)(self._copy(item, is_option) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return value._make(self._copy(item, is_option) for item in value)
        if records.is_record(value) and not is_option:
            return records.filled(object.__new__(type(value)), {name: self._copy(item) for name, item in records.state(value).items()})
        if isinstance(value, (dict, list)) or (not is_option and any(
                isinstance(item, (Tensor, list, dict)) for item in getattr(value, "__dict__", {}).values())):
            raise Unverifiable(f"an argument is a {type(value).__name__}")
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if type(tensor) not in TENSORS or tensor.layout is not torch.strided:
            raise Unverifiable(f"an argument is a {type(tensor).__name__}")
        if attributes_of_tensors([tensor]):
            raise Unverifiable("an argument is a tensor with attributes")
        if self._dtype is not None:
            return tensor.to(self._dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage, storage.clone()
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            self._storages[storage.data_ptr()][1], tensor.storage_offset(), tensor.size(), tensor.stride())
        made = made.neg() if tensor.is_neg() else made
        return made.conj() if tensor.is_conj() else made

    def write_back(self, result):
        """Makes of the originals what a call has made of the copies. result: of that call; its with the originals in it."""
        known = {id(self._copies[id(original)]): original for original in self._originals}

        def original_of(value):
            return known.get(id(value), value)
        for storage, copied in self._storages.values():
            storage.copy_(copied)
        for original in self._originals:
            copy = self._copies[id(original)]
            if isinstance(original, dict):
                items = {key: original_of(item) for key, item in copy.items()}
                original.clear()
                original.update(items)
            elif isinstance(original, (list, deque)):
                items = list(map(original_of, copy))
                original.clear()
                original.extend(items)
            elif copy is not original and records.is_record(original):
                records.filled(original, {name: original_of(item) for name, item in records.state(copy).items()})
        return tree_map_only(Tensor, original_of, result)


def is_same(value, other) -> bool:
    """Whether a copy is still what it is a copy of."""
    if value is other:
        return True
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and torch.equal(value, other)
    if isinstance(value, _PLAIN):
        return type(value) is type(other) and value == other
    if isinstance(value, (list, tuple, deque, dict)):
        keys = not isinstance(value, dict) or list(value) == list(other)
        items = (one.values() if isinstance(one, dict) else one for one in (value, other))
        return len(value) == len(other) and keys and all(map(is_same, *items))
    if records.is_record(value):
        return is_same(records.state(value), records.state(other))
    return value == other


@contextlib.contextmanager
def weights_in(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The block's plain weights in another dtype while it is entered."""
    spaces = [(space, dict(space)) for one in module.modules() for space in (one._parameters, one._buffers)]
    try:
        for space, before in spaces:
            space.update({name: tensor.detach().to(dtype) for name, tensor in before.items()
                          if tensor is not None and type(tensor) in TENSORS and tensor.is_floating_point()})
        yield
    finally:
        for space, before in spaces:
            space.update(before)
