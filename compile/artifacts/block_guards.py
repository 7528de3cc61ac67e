"""Whether a block, its classes and its weights are what they were when it was compiled."""
from __future__ import annotations

import functools
import operator
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...int8.artifact_layer import HasArtifactTensors, has_artifact_tensors
from .block import TensorSpec, tensor_spec, tensors_of
from .call import layout
from .code_names import identifiers
from .describe import Describer, Names, as_its_class
from .origins import is_pristine_package, path_of
from .values import Unsupported
from .watch import Watch

try:
    from torch._C._dynamo.guards import TensorGuards  # dynamo's own comparison, in C++
except ImportError:
    TensorGuards = None


# nn.Module's own, apart from the hooks.
_MODULE_STATE = frozenset(torch.nn.Module().__dict__) | {"_compiled_call_impl"}


def attributes_of(block: torch.nn.Module, names: Names, watch: Watch | None = None, lenient: bool = False,
                  without: frozenset[str] = frozenset()) -> list[list]:
    """[[module, attribute, description]] of the attributes with these names, and of those that stand before their class's
    (forward). lenient: for a key only: what cannot be described is named by its type. without: the block's own of these names.

    Raises Unsupported."""
    modules = dict(block.named_modules())
    describe = Describer(names, watch, {id(module): path for path, module in modules.items()}, lenient)
    result = []
    for path, module in modules.items():
        if has_artifact_tensors(module):
            continue
        state, read = module.__dict__, _read_by_torch(type(module))  # type: ignore[arg-type]
        for name in sorted(state):
            if name not in _MODULE_STATE and (path or name not in without) and (
                    name in names or name in read or hasattr(type(module), name) or name in module._parameters or name in module._buffers):
                if watch is not None:
                    watch.binding(state, name, state[name])
                if as_its_class(module, name, names):
                    continue
                try:
                    result.append([path, name, describe(state[name])])
                except Unsupported as error:
                    raise Unsupported(f"its attribute {path}.{name}: {error}") from None
        result.append([path, "training", str(module.training)])
    return result


@functools.lru_cache(1024)
def _read_by_torch(kind: Any) -> frozenset[str]:
    """Names of attributes that torch's own layers among kind's bases read (eps, padding_mode)."""
    functions = [value for base in kind.__mro__ if base not in (object, torch.nn.Module) and is_pristine_package(base.__module__)
                 for value in list(vars(base).values()) if isinstance(value, types.FunctionType) and value.__name__ != "__init__"]
    return frozenset(name for function in functions for name in identifiers(function.__code__))


def module_classes(block: torch.nn.Module) -> list[type]:
    return list(dict.fromkeys(type(m) for m in block.modules() if not has_artifact_tensors(m)))


def classes_of(kinds: list[type], names: Names, watch: Watch | None = None, lenient: bool = False) -> list[list]:
    """[[class, description]] of the classes of a block's modules, with forward and the methods and class attributes of these names: another
    pack may have put its own there. Raises Unsupported."""
    describe = Describer(names, watch, lenient=lenient)
    return sorted([path_of(kind), describe(kind)] for kind in kinds)


class ClassGuards:
    """Checks that the classes of a block's modules are as they were when an artifact was traced. Asked once a step.

    kinds: these. expected: classes_of those of the traced block."""

    def __init__(self, kinds: list[type], expected: list[list], names: Names, lenient: bool = False):
        self._kinds = kinds
        self._expected = expected
        self._names = names
        self._lenient = lenient
        self._watch: Watch | None = None
        self._difference = ""

    def difference(self) -> str:
        """A class that is another one now, empty where there is none."""
        if self._watch is None or not self._watch.unchanged():
            self._watch = Watch(Watch())
            try:
                found = classes_of(self._kinds, self._names, self._watch, self._lenient)
            except Unsupported as error:
                self._difference = str(error)
            else:
                self._difference = next((path for path, _ in _differing(found, self._expected)), "")
        return self._difference

    def values_unchanged(self) -> bool:
        """Whether the class attributes that are no methods are those of the last look. Asked at every call."""
        return self._watch is not None and self._watch.values.unchanged()


class BlockGuards:
    """Checks that a block's modules are as they were when an artifact was traced. Asked at every call.

    expected: attributes_of the traced block, without those of these names. Slots and classes are looked at once a step, for all blocks
    (block_tree, ClassGuards)."""

    __slots__ = ("_expected", "_layout", "_names", "_watch", "_without", "block", "difference")

    def __init__(self, block: torch.nn.Module, expected: list[list], names: Names, without: frozenset[str] = frozenset()):
        self.block = weakref.ref(block)
        self.difference = ""  # what is another
        self._expected = expected
        self._names = names
        self._without = without
        self._look(block)

    def _look(self, block: torch.nn.Module) -> None:
        self._watch = Watch()
        states = [module.__dict__ for module in block.modules() if not has_artifact_tensors(module)]
        self._layout = states, _layout(states)
        try:
            found = attributes_of(block, self._names, self._watch, without=self._without)
        except Unsupported as error:
            self.difference = str(error)
        else:
            self.difference = next((f"{path}.{name}".strip(".") for path, name, _ in _differing(found, self._expected)), "")

    def is_unchanged(self) -> bool:
        """Whether the block is as the artifact's. What was changed once and is put back is so again."""
        states, layout = self._layout
        if _layout(states) != layout or not self._watch.unchanged():
            block = self.block()
            if block is None:
                return False
            self._look(block)
        return not self.difference


def _layout(states: list[dict]) -> list:
    """How many attributes each module has (one more may hide its class's), and whether it trains."""
    return [*map(len, states), *map(_training, states)]


_training = operator.itemgetter("training")


def _differing(found: list[list], expected: list[list]) -> list[list]:
    """The items of one that are not in the other."""
    return [item for item in found if item not in expected] or [item for item in expected if item not in found]


@dataclass(frozen=True)
class WeightSpecs:
    """specs: of a block's plain tensors, in the order of tensors_of. constants: of its layers with artifact tensors."""

    specs: list[TensorSpec]
    constants: list[tuple]

    @classmethod
    def of(cls, block: torch.nn.Module) -> WeightSpecs:
        return cls([tensor_spec(tensor) for _, tensor in tensors_of(block)],
                   [module.artifact_constants() for module in block.modules() if has_artifact_tensors(module)])


class Weights:
    """The plain tensors of a block, looked up at every call: an offload, a LoRA or a loader may have put others there.

    wanted: those the artifact was made for, on device. INT8 layers are held weakly: one that is replaced takes its weights with it."""

    __slots__ = ("_absent", "_checked", "_columns", "_devices", "_dtypes", "_layers", "_layouts", "_owners", "_shapes", "_sizes", "_spaces",
                 "_ties")

    def __init__(self, block: torch.nn.Module, wanted: WeightSpecs, device: torch.device):
        specs, constants = wanted.specs, iter(wanted.constants)
        self._layers: list[tuple[weakref.ref, int, tuple]] = []  # (layer, its number of tensors, its constants)
        self._owners: list[tuple[Any, str]] = []
        self._absent: list[tuple[Any, str]] = []  # what was None
        self._ties: list[tuple[Any, str, int]] = []  # what was the same tensor as that of the index
        self._spaces: list[dict] = []
        seen: dict[int, int] = {}
        for _, module in block.named_modules():
            if has_artifact_tensors(module):
                space, tensors = weakref.ref(module), module.artifact_tensors()
                self._layers.append((space, len(tensors), next(constants, ())))
            else:
                space, tensors = None, {**module._parameters, **module._buffers}
                self._spaces += [module._parameters, module._buffers]
            for name, tensor in tensors.items():
                owner = space or (module._parameters if name in module._parameters else module._buffers)
                if tensor is None:
                    self._absent.append((owner, name))
                elif id(tensor) in seen:
                    self._ties.append((owner, name, seen[id(tensor)]))
                else:
                    seen[id(tensor)] = len(self._owners)
                    self._owners.append((owner, name))
        self._sizes = list(map(len, self._spaces))
        self._shapes = [torch.Size(shape) for _, shape, _ in specs]
        self._dtypes = [getattr(torch, dtype) for dtype, _, _ in specs]
        self._layouts = [kind for *_, kind in specs]
        self._devices = [device] * len(specs)
        # Of a block without INT8 layers: the same look-up in C.
        self._columns = tuple(zip(*self._owners)) if all(isinstance(owner, dict) for owner, _ in self._owners) else None
        self._checked: TensorGuards | None = None  # dtypes, sizes, strides and devices of tensors that were right

    def get(self) -> list[Tensor] | None:
        """In the order of tensors_of; None where one is not what the artifact was made for."""
        made: dict = {}
        if len(self._owners) != len(self._shapes) or list(map(len, self._spaces)) != self._sizes:
            return None
        if self._columns:
            result = list(map(dict.get, *self._columns))
        else:
            result = [owner.get(name) if isinstance(owner, dict) else _of_layer(owner, made).get(name) for owner, name in self._owners]
            for reference, count, constants in self._layers:  # one tensor more is not asked for by name
                layer = reference()
                if layer is None or len(_of_layer(reference, made)) != count or layer.artifact_constants() != constants:
                    return None
        if result and (self._checked is None or not self._checked.check(*result)):
            if not self._are_right(result):
                return None
            self._checked = TensorGuards and TensorGuards(*result, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        for owner, name in self._absent:
            if owner.get(name) is not None:
                return None
        for owner, name, index in self._ties:
            if (owner.get(name) if isinstance(owner, dict) else _of_layer(owner, made).get(name)) is not result[index]:
                return None
        return result

    def _are_right(self, tensors: list[Tensor]) -> bool:
        return (_PLAIN.issuperset(map(type, tensors)) and list(map(_shape_of, tensors)) == self._shapes
                and list(map(_dtype_of, tensors)) == self._dtypes and list(map(_device_of, tensors)) == self._devices
                and all(tensor.is_contiguous() if kind == "c" else layout(tensor) == kind for tensor, kind in zip(tensors, self._layouts)))


_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_shape_of, _dtype_of, _device_of = map(operator.attrgetter, ("shape", "dtype", "device"))


def _of_layer(owner: weakref.ref[HasArtifactTensors], made: dict) -> dict:
    if owner not in made:
        layer = owner()
        made[owner] = {} if layer is None else layer.artifact_tensors()
    return made[owner]


class BlockInfo:
    """What is found out once about a block that is made of what it is made of now."""

    __slots__ = ("block", "guards", "weights")

    def __init__(self, block: torch.nn.Module):
        self.block = weakref.ref(block)
        self.weights: Weights | None = None
        self.guards: dict[int, BlockGuards] = {}  # by id of what is loaded
