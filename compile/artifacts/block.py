"""A block without its weights: what a process that has none needs to build an artifact of it, and where this process finds them.

Parameters are inputs of an artifact: one serves every block of a class, with a LoRA, offloaded, or replaced.
"""
from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys
import types

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards  # dynamo's own comparison, in C++
except ImportError:
    TensorGuards = None

from ...int8.artifact_layer import has_artifact_replacement, has_artifact_tensors
from .call import layout
from .values import Unsupported

TensorSpec = tuple[str, tuple[int, ...], str]  # dtype, shape, layout


def tensors_of(block: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of block, as plain tensors. Raises Unsupported where one is of another kind."""
    found: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for prefix, module in block.named_modules():
        own = {**module._parameters, **module._buffers}
        for name, tensor in (module.artifact_tensors() if has_artifact_tensors(module) else own).items():
            if tensor is None or id(tensor) in seen:
                continue
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                raise Unsupported(f"its {prefix}.{name} is a {type(tensor).__name__}")
            seen.add(id(tensor))
            found.append((f"{prefix}.{name}" if prefix else name, tensor))
    return found


def tensor_spec(tensor: Tensor) -> TensorSpec:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), layout(tensor)


def structure_of(block: torch.nn.Module) -> list:
    """What is known of a block before it is traced, as JSON: classes, and names and specs of its tensors."""
    return [[[name, *_kind(m)] for name, m in block.named_modules()],
            [[name, *tensor_spec(tensor)] for name, tensor in tensors_of(block)]]


def _kind(module: torch.nn.Module) -> list:
    if has_artifact_replacement(module):
        kind, arguments = module.artifact_replacement()
        return [f"{kind.__qualname__}{arguments!r}", module.training]
    return [f"{type(module).__module__}.{type(module).__qualname__}", module.training]


class _Pickler(pickle.Pickler):
    def __init__(self, file, block: torch.nn.Module):
        super().__init__(file, protocol=4)
        self._known = {id(t): index for index, (_, t) in enumerate(tensors_of(block))}

    def persistent_id(self, value):
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._known:
            raise Unsupported("it holds a tensor that is neither a parameter nor a buffer")
        return self._known[id(value)], isinstance(value, torch.nn.Parameter)

    def reducer_override(self, value):
        if isinstance(value, torch.nn.Module) and has_artifact_replacement(value):
            return value.artifact_replacement()
        if isinstance(value, types.FunctionType) and "<lambda>" in value.__qualname__:
            for name, table in vars(sys.modules.get(value.__module__)).copy().items():
                for key, item in dict(table).items() if isinstance(table, dict) else ():
                    if item is value:  # a table of activations
                        return _item_of, (value.__module__, name, key)
        return NotImplemented


def _item_of(module: str, table: str, key):
    return getattr(importlib.import_module(module), table)[key]


def copy_skeleton(block: torch.nn.Module) -> torch.nn.Module:
    """block without the content of its tensors, for this process."""
    memo: dict = {id(t): torch.nn.Parameter(torch.empty(0), requires_grad=False) if isinstance(t, torch.nn.Parameter) else torch.empty(0)
                  for _, t in tensors_of(block)}
    for module in block.modules():
        if has_artifact_replacement(module):
            function, arguments = module.artifact_replacement()
            memo[id(module)] = function(*arguments)
    return copy.deepcopy(block, memo)


def dump_skeleton(block: torch.nn.Module) -> bytes:
    """The same for another process. Raises Unsupported."""
    file = io.BytesIO()
    hidden = block.__dict__.pop("_compiled_call_impl", None)
    try:
        _Pickler(file, block).dump(block)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Unsupported(f"it cannot be described to another process ({error})") from None
    finally:
        if hidden is not None:
            block.__dict__["_compiled_call_impl"] = hidden
    return file.getvalue()


def load_skeleton(content: bytes) -> torch.nn.Module:
    """The block of dump_skeleton, with tensors of no content. content: from this pack's own process only."""
    made: dict[int, Tensor] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid):
            index, is_parameter = pid
            if index not in made:
                tensor = torch.empty(0)
                made[index] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            return made[index]
    return Unpickler(io.BytesIO(content)).load()
