"""A block without its weights: what a process that has none needs to build an artefact of it, and where this process finds them.

Parameters are inputs of an artefact: one serves every block of a class, with a LoRA, offloaded, or replaced.
"""
from __future__ import annotations

import copy
import io
import pickle
import types

import torch
from torch import Tensor

from .cache_call import CONSTANTS, Unsupported, layout
from .cache_sources import describe

# A layer of this pack whose parameters are tensor subclasses gives, with these methods, its plain tensors by name (none while it computes
# otherwise), and (class, arguments) that make a module with buffers of these names that computes the same. What it computes is known by
# these and by the version of the pack, so its attributes and methods are not looked at.
TENSORS, REPLACEMENT = "artefact_tensors", "artefact_replacement"
# nn.Module's own, apart from the hooks.
_MODULE_STATE = frozenset(torch.nn.Module().__dict__) | {"_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Spec = tuple[str, tuple[int, ...], str]  # dtype, shape, layout


def tensors_of(block: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of block, as plain tensors. Raises Unsupported where one is of another kind."""
    found: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for prefix, module in block.named_modules():
        own = {**module._parameters, **module._buffers}
        for name, tensor in (getattr(module, TENSORS)() if hasattr(module, TENSORS) else own).items():
            if tensor is None or id(tensor) in seen:
                continue
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                raise Unsupported(f"its {prefix}.{name} is a {type(tensor).__name__}")
            seen.add(id(tensor))
            found.append((f"{prefix}.{name}" if prefix else name, tensor))
    return found


def spec_of(tensor: Tensor) -> Spec:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), layout(tensor)


def structure_of(block: torch.nn.Module) -> list:
    """What is known of a block before it is traced, as JSON: classes, and names and specs of its tensors."""
    return [[[name, *_kind(m)] for name, m in block.named_modules()],
            [[name, *spec_of(tensor)] for name, tensor in tensors_of(block)]]


def _kind(module: torch.nn.Module) -> list:
    if hasattr(module, REPLACEMENT):
        kind, arguments = getattr(module, REPLACEMENT)()
        return [f"{kind.__qualname__}{arguments!r}", module.training]
    return [f"{type(module).__module__}.{type(module).__qualname__}", module.training]


def attributes_of(block: torch.nn.Module, names: set[str] | None = None) -> list[list]:
    """[[module, attribute, value]] of the attributes that code with these names in it may have read (None: of all), where they differ
    from the class's own; see attribute_value."""
    return [[path, name, described] for path, module in block.named_modules() if not hasattr(module, TENSORS)
            for name, value in sorted(module.__dict__.items()) if (names is None or name in names) and name not in _MODULE_STATE
            and (described := attribute_value(value)) != attribute_value(getattr(type(module), name, _ABSENT))]


_ABSENT = object()


def attribute_value(value):
    if isinstance(value, CONSTANTS):
        return [type(value).__name__, value]
    if isinstance(value, (list, tuple, dict, set)):
        return ["size", len(value)]
    return ["kind", type(value).__name__]


def methods_of(block: torch.nn.Module, names: set[str]) -> list[list]:
    """[[class, name, what it is]] of the functions of these names, and forward, that the classes of block's modules have: another pack
    may have put its own there."""
    classes = {f"{type(m).__module__}.{type(m).__qualname__}": type(m) for m in block.modules() if not hasattr(m, TENSORS)}
    return [[path, name, describe(value)] for path, kind in classes.items() for name, value in _functions(kind, names)]


def _functions(kind: type, names: set[str]) -> list[tuple[str, object]]:
    found = [(name, getattr(kind, name, None)) for name in sorted({*names, "forward"})]
    return [(name, value) for name, value in found if isinstance(value, (types.FunctionType, property))]


class BlockState:
    """Checks that a block's modules are as they were when an artefact was traced. Made once a block, asked at every call.

    attributes, methods: of attributes_of and methods_of. Raises Unsupported where they differ now.
    """

    __slots__ = ("_checks", "_containers", "_hooks", "_methods", "_sizes")

    def __init__(self, block: torch.nn.Module, attributes: list[list], methods: list[list], names: set[str]):
        if attributes_of(block, names) != attributes:
            raise Unsupported("attributes of its modules differ")
        if methods_of(block, names) != methods:
            raise Unsupported("methods of its modules are others")
        modules = [module for module in block.modules() if not hasattr(module, TENSORS)]
        self._methods = [(kind, *function) for kind in {type(m) for m in modules} for function in _functions(kind, names)]
        states = [module.__dict__ for module in modules]
        self._sizes = [(state, len(state)) for state in states]
        self._hooks = [state[name] for state in states for name in _HOOKS]
        read = [(state, name, value) for state in states for name, value in state.items() if name in names and name not in _MODULE_STATE]
        self._containers = [(state, name, len(value)) for state, name, value in read if isinstance(value, (list, tuple, dict, set))]
        self._checks = [check for check in read if not isinstance(check[2], (list, tuple, dict, set))]
        self._checks += [(state, "training", state["training"]) for state in states]

    def holds(self) -> bool:
        for hooks in self._hooks:
            if hooks:
                return False
        for state, size in self._sizes:
            if len(state) != size or "forward" in state:
                return False
        for kind, name, value in self._methods:
            if getattr(kind, name, None) is not value:
                return False
        for state, name, value in self._checks:
            if (now := state.get(name)) is not value and (now != value or type(now) is not type(value)):
                return False
        return all(len(state[name]) == size for state, name, size in self._containers)


class Weights:
    """The plain tensors of a block, looked up at every call: an offload, a LoRA or a loader may have put others there.

    specs: those the artefact was made for, on device."""

    __slots__ = ("_places", "_specs", "device")

    def __init__(self, block: torch.nn.Module, specs: list[Spec], device: torch.device):
        modules = dict(block.named_modules())
        names = [name for name, _ in tensors_of(block)]
        self._places: list[tuple] = []
        for name in names:
            path, _, last = name.rpartition(".")
            module = modules[path]
            if hasattr(module, TENSORS):
                self._places.append((getattr(module, TENSORS), last))
            else:
                self._places.append((module._parameters if last in module._parameters else module._buffers, last))
        self._specs = [(getattr(torch, dtype), torch.Size(shape), kind) for dtype, shape, kind in specs]
        self.device = device

    def get(self) -> list[Tensor] | None:
        """In the order of tensors_of; None where one is not what the artefact was made for."""
        result, made = [], {}
        for (place, name), (dtype, shape, kind) in zip(self._places, self._specs):
            if isinstance(place, dict):
                tensor = place[name]
            else:
                if place not in made:
                    made[place] = place()
                tensor = made[place].get(name)
            if (tensor is None or tensor.shape != shape or tensor.dtype is not dtype or tensor.device != self.device
                    or type(tensor) not in (Tensor, torch.nn.Parameter)
                    or not (tensor.is_contiguous() if kind == "c" else layout(tensor) == kind)):
                return None
            result.append(tensor)
        return result


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
        return getattr(value, REPLACEMENT)() if isinstance(value, torch.nn.Module) and hasattr(value, REPLACEMENT) else NotImplemented


def copy_skeleton(block: torch.nn.Module) -> torch.nn.Module:
    """block without the content of its tensors, for this process."""
    memo: dict = {id(t): torch.nn.Parameter(torch.empty(0), requires_grad=False) if isinstance(t, torch.nn.Parameter) else torch.empty(0)
                  for _, t in tensors_of(block)}
    for module in block.modules():
        if hasattr(module, REPLACEMENT):
            function, arguments = getattr(module, REPLACEMENT)()
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
