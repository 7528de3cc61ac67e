"""How a block's arguments are given to what torch compiled: sizes marked as varying, odd layouts as dense copies."""
from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .any_batch import is_batch_of_one, with_more
from .artifacts import current_block, records
from .artifacts.call import may_be_size
from .artifacts.job import dynamic_dims_of_rank
from .artifacts.origins import is_comfyuis
from .errors import is_out_of_memory
from .torch_compiler import Compiled
from .torch_internals.settings import varying

_VARYING = {dims: frozenset(dynamic_dims_of_rank(dims)) for dims in range(16)}


def _strided(value: Tensor) -> bool:
    """Whether value, which is not contiguous, has a layout that only some of the blocks get: not one of the formats that a model
    keeps on purpose. An expanded tensor stays: to write it out would cost its memory."""
    return (0 not in value.stride()
            and not (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
            and not (value.dim() == 5 and value.is_contiguous(memory_format=torch.channels_last_3d)))


def _mark(value):
    """What torch._dynamo.maybe_mark_dynamic and mark_static set, at a tenth of their cost."""
    if isinstance(value, Tensor):
        ones = {dim for dim, size in enumerate(value.shape) if size == 1}
        value._dynamo_weak_dynamic_indices = set(_VARYING[value.dim()] - ones)  # its own: torch adds to it
        value._dynamo_static_indices = ones  # it may be there to broadcast, which a size that varies does not
    elif isinstance(value, (tuple, list)):
        for item in value:
            _mark(item)
    elif records.is_record(value):
        for item in records.state(value).values():
            _mark(item)


def _sizes(value, name: str) -> Iterator[str]:
    """What torch calls the integers in an argument of that name that may be sizes."""
    if may_be_size(value):
        yield name
    elif type(value) in (tuple, list):
        for index, item in enumerate(value):
            yield from _sizes(item, f"{name}[{index}]")
    elif records.is_record(value):
        for key, item in records.state(value).items():
            yield from _sizes(item, f"{name}.{key}")


def _sizes_of_call(module: torch.nn.Module, numbers: tuple[str, ...], args: tuple, kwargs: dict) -> list[str]:
    """What torch calls the integers that are to be taken for sizes. Of a pack's block torch learns them itself."""
    if not is_comfyuis(type(module).__module__):
        return []
    found = [f"L['module'].{name}" for name in numbers if may_be_size(module.__dict__.get(name))]
    for name, value in (("L['args']", args), *((f"L['kwargs']['{key}']", value) for key, value in kwargs.items() if key.isidentifier())):
        found += _sizes(value, name)
    return found


def tensors_in(value) -> Iterator[Tensor]:
    """To the end of containers, transformer_options and objects that only keep values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif records.is_record(value):
        for item in records.state(value).values():
            yield from tensors_in(item)


def _memory(tensor: Tensor) -> int:
    """Where it is; 0 for a tensor of a class that is made of others (INT8 weights)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _dense_copies(module: torch.nn.Module, values: tuple, inside: list) -> dict[int, tuple[Tensor, Tensor]]:
    """{id: (tensor, dense copy)} of those that only some blocks get in another layout. Empty while gradients are wanted: to write into the
    original afterwards would break them. Empty where memory is shared, with module's own too, or the original may not be written.
    inside: what functions among values close over."""
    loose = [v for v in values if isinstance(v, Tensor) and not v.is_contiguous() and _strided(v)]
    if not loose or torch.is_grad_enabled():
        return {}
    if not torch.is_inference_mode_enabled() and any(value.is_inference() for value in loose):
        return {}
    memory = [found for tensor in tensors_in((*values, *inside)) if (found := _memory(tensor))]
    own = {_memory(tensor) for tensor in (*module.parameters(), *module.buffers())}
    if len(set(memory)) < len(memory) or not own.isdisjoint(map(_memory, loose)):
        return {}
    return {id(value): (value, value.contiguous()) for value in loose}


def call_compiled(compiled: Compiled, module: torch.nn.Module, args: tuple, kwargs: dict, inside: list, mark: bool,
                  numbers: tuple[str, ...] = ()):
    """compiled's result for a call of module. inside: what functions among the arguments close over. mark: its sizes as varying, and its
    attributes of these names."""
    copies = _dense_copies(module, (*args, *kwargs.values()), inside) if compiled.takes_copies else {}
    if mark:
        _mark((*args, *kwargs.values(), *inside, *copies.values()))
    one_apart = compiled.one_apart
    try:
        with (current_block.settings(tensors_in((*args, *kwargs.values()))),
              varying(_sizes_of_call(module, numbers, args, kwargs), not one_apart) if mark else contextlib.nullcontext()):
            if mark and not one_apart and is_batch_of_one(tensors_in((*args, *kwargs.values()))):
                result = _call_of_one(compiled, module, args, kwargs, inside, copies)
            else:
                result = _call_with_copies(compiled, module, args, kwargs, copies)
    except Exception as error:
        if compiled.one_apart == one_apart:
            if not mark or one_apart or compiled.may_have_run(error) or compiled.backend.refused is not None:
                raise
            compiled.backend.compile_one_apart()  # it may be this that torch cannot do
        return call_compiled(compiled, module, args, kwargs, inside, mark, numbers)
    compiled.look(module)
    return result


def _call_of_one(compiled: Compiled, module: torch.nn.Module, args: tuple, kwargs: dict, inside: list, copies: dict):
    """A call of a batch of 1. What is compiled for it is for any batch, if that can be."""
    backend = compiled.backend
    if backend.has_made:  # which may serve it
        asks = backend.asks_for_more = threading.get_ident() if compiled.can_compile_for_more else 0
        try:
            return _call_with_copies(compiled, module, args, kwargs, copies)
        except Exception:
            if backend.asks_for_more == asks:
                raise  # it has not asked
        finally:
            backend.asks_for_more = 0
    _compile_for_more(compiled, module, args, kwargs, inside, copies)
    return _call_with_copies(compiled, module, args, kwargs, copies)


def _compile_for_more(compiled: Compiled, module: torch.nn.Module, args: tuple, kwargs: dict, inside: list, copies: dict) -> None:
    """What torch makes of a call of a batch of 1, for any batch, if that can be."""
    made: dict = {id(value): with_more(copy, {}) for value, copy in copies.values()}
    try:
        more, more_kwargs = with_more(args, made), {key: with_more(value, made) for key, value in kwargs.items()}
        _mark((*more, *more_kwargs.values()))
        memory = {id(tensor): _memory(tensor) for tensor in (*tensors_in((*args, *kwargs.values(), *inside)), *module.parameters(),
                                                             *module.buffers())}
        often = {where for where, count in Counter(memory.values()).items() if where and count > 1}
        shared = {id(made[key]) if key in made else key for key, where in memory.items() if where in often}
        with compiled.given_copies() if copies else contextlib.nullcontext():
            compiled.compile_for_more(shared, module, *more, **more_kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def _call_with_copies(compiled: Compiled, module: torch.nn.Module, args: tuple, kwargs: dict, copies: dict):
    if not copies:
        return compiled.call(module, *args, **kwargs)
    # The first block often gets a transposed tensor, the others dense ones: that would be a graph more.
    dense = [copies[id(v)][1] if id(v) in copies else v for v in args]
    dense_kwargs = {k: copies[id(v)][1] if id(v) in copies else v for k, v in kwargs.items()}
    try:
        with compiled.given_copies():
            result = compiled.call(module, *dense, **dense_kwargs)
    except Exception:
        if compiled.takes_copies:
            raise
        return compiled.call(module, *args, **kwargs)  # found out while it compiled
    originals = {}
    for value, copy in copies.values():
        value.copy_(copy)  # a block may have written into its input, or return it
        originals[id(copy)] = value
    return tree_map_only(Tensor, lambda t: originals.get(id(t), t), result)


def kind_of_call(args: tuple, kwargs: dict) -> Hashable:
    """What a compile may depend on that a call shows: how its tensors lie in memory and which share some, what else there is of which
    type, plain values."""
    memory: list[int] = []

    def kind(value) -> Hashable:
        if isinstance(value, Tensor):
            memory.append(_memory(value))
            return type(value), value.dtype, value.device, value.shape, value.stride(), value.requires_grad, memory.index(memory[-1])
        if isinstance(value, dict):
            return tuple((key, type(item)) for key, item in value.items())
        if isinstance(value, (tuple, list)):
            return type(value), *map(kind, value)
        return type(value), value if isinstance(value, (bool, int, float, str, bytes)) else None
    return torch.is_grad_enabled(), tuple(map(kind, args)), tuple((key, kind(value)) for key, value in kwargs.items())
