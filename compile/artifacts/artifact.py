"""An artifact as it is loaded and called. A package checks nothing of its inputs: what its trace relied on is checked before it is run."""
from __future__ import annotations

import contextlib
import functools
import importlib
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..torch_internals import warmup
from .call import LAYOUTS, Call, as_tuples, lies_as, rebuild_result
from .describe import Names
from .entry import Entry
from .shape_expressions import Evaluate, SizeConditions, parse_expression

FILES = {"aoti": "artifact.pt2", "aot": "artifact.aot"}
RUNNERS = {device: f"AOTIModelContainerRunner{device.capitalize()}" for device in ("cpu", "cuda", "xpu")}


def _load_aoti(entry: Entry, device: torch.device) -> Callable:
    """torch's own loader unpacks a package below /tmp, whatever TMPDIR says, and fails where that is full or mounted noexec. So it is
    unpacked here, and the library given to the class that torch's loader gives it to."""
    cpu = device.type == "cpu"
    runner = getattr(torch._C._aoti, RUNNERS.get(device.type, ""), None)
    if runner is None:  # this torch has none for the device that is given a folder of kernels
        def load_package(folder: Path):
            return torch._C._aoti.AOTIModelPackageLoader(str(folder / FILES["aoti"]), "model", False, 1, -1 if cpu else device.index or 0)
        return entry.load(FILES["aoti"], load_package).boxed_run

    def load(folder: Path):
        libraries = [str(path) for path in folder.iterdir() if path.suffix in (".so", ".pyd", ".dll")]
        if len(libraries) != 1:
            raise RuntimeError(f"the package holds {len(libraries)} libraries")
        return runner(*libraries, 1) if cpu else runner(*libraries, 1, f"{device.type}:{device.index or 0}", str(folder))
    # A GPU's kernels are files beside the library that are read when they first run.
    return entry.load(FILES["aoti"], load, _unpack, lasting=not cpu).run


def _unpack(package: bytes) -> dict[str, bytes]:
    """The files of an AOTInductor package that its program needs, not its C++ source and flags. Raises RuntimeError for another file."""
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            names = {name: name.partition("data/aotinductor/model/")[2] for name in archive.namelist()}
            return {file: archive.read(name) for name, file in names.items()
                    if file and "/" not in file and "\\" not in file and not file.endswith((".cpp", ".o", "_flags.json"))}
    except zipfile.BadZipFile as error:
        raise RuntimeError(f"it is no package ({error})") from None


def _load_aot(entry: Entry, device: torch.device) -> Callable:
    warmup.prepare(device.type)
    from torch._inductor import CompiledArtifact

    artifact = entry.load(FILES["aot"], lambda folder: CompiledArtifact.load(path=str(folder / FILES["aot"]), format="binary"))
    return lambda inputs: artifact(*inputs)


LOADERS = {"aoti": _load_aoti, "aot": _load_aot}


class Artifact:
    """What this process can run. Loading a package takes a few ms and needs neither dynamo nor inductor."""

    def __init__(self, entry: Entry, device: torch.device):
        body = entry.body
        self.folder = entry.folder
        self.kind = body["kind"]
        self.structure = as_tuples(body["structure"])
        self._leaves = [(getattr(torch, dtype), shape, kind) for dtype, shape, kind in body["leaves"]]
        self._conditions = SizeConditions(body)
        self.options = body["options"]
        self._writes = [{key: value for key, value in writes.items() if not isinstance(value, list)} for writes in body["writes"]]
        # Lists of sizes, new ones at each call.
        self._size_writes = [(index, key, {"list": list, "tuple": tuple}[value[0]], [_size(item) for item in value[1:]])
                             for index, writes in enumerate(body["writes"]) for key, value in writes.items() if isinstance(value, list)]
        self.attributes, self.classes = body["attributes"], body["classes"]
        self.names = Names(body["names"])
        self._outputs = as_tuples(body["outputs"])
        self.written = body["written"]
        self._by_layout = body["by_layout"]
        self._same = body["same"]
        self._device = device
        for namespace in body["operators"]:
            with contextlib.suppress(ImportError):
                importlib.import_module(namespace)  # comfy_kitchen's operators are there once it is imported
        self._run = LOADERS[self.kind](entry, device)

    def accepts(self, leaves: Sequence[Tensor]) -> bool:
        """Whether leaves, of this structure, are what was traced; their layout aside, see dense. What it writes into must not be seen
        through another of them."""
        shapes = []
        for leaf, (dtype, shape, _) in zip(leaves, self._leaves):
            if leaf.dtype is not dtype or leaf.device != self._device or leaf.dim() != len(shape) or type(leaf) is not Tensor:
                return False
            shapes.append(leaf.shape)
        if self.written:
            memory = [leaf.untyped_storage().data_ptr() for leaf in leaves]
            if any(memory[index] and memory.count(memory[index]) > 1 for index in self.written):
                return False
        return self._conditions.hold_for(shapes)

    def is_for_other_numbers(self, call: Call) -> bool:
        """Whether it was built for other integers than a call of its structure has."""
        fixed = [(call.leaves[index].shape[0], self._leaves[index][1][0]) for index in call.sizes]
        return any(type(built) is int and number != built for number, built in fixed)

    def has_layout(self, leaves: Sequence[Tensor]) -> bool:
        """Whether leaves, which are accepted, lie in memory as the traced ones did, where the block asks for that."""
        return not self._by_layout or all(lies_as(leaf, kind) for leaf, (_, _, kind) in zip(leaves, self._leaves))

    def writes_into(self, tensors: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
        """Whether it would write into one of tensors, the block's, by a leaf that shares memory with it."""
        memory = {leaves[index].untyped_storage().data_ptr() for index in self.written}
        return bool(memory) and any(tensor.untyped_storage().data_ptr() in memory for tensor in tensors)

    def dense(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """leaves in the layout that was traced, with no bit that negates or conjugates them; the same tensor where it is so."""
        return [_aligned(_plain(leaf).contiguous(memory_format=LAYOUTS[kind]) if kind != "c" else _plain(leaf).contiguous())
                for leaf, (_, _, kind) in zip(leaves, self._leaves)]

    def __call__(self, tensors: list[Tensor], leaves: Sequence[Tensor], options: Sequence[dict] = ()):
        """The block's result; leaves must be accepted. What the block writes into options is written."""
        inputs = self.dense(leaves)
        results = self._run([*tensors, *inputs])
        for index in self.written:
            if inputs[index] is not leaves[index]:
                leaves[index].copy_(inputs[index])
        for target, values in zip(options, self._writes):
            target.update(values)
        if self._size_writes:
            sizes = self._sizes(leaves)
            for index, key, make, items in self._size_writes:
                options[index][key] = make(item(sizes) for item in items)
        results = [leaves[same] if same >= 0 else result for result, same in zip(results, self._same)]
        return rebuild_result(self._outputs, iter(results), lambda size: _size(size)(self._sizes(leaves)))

    def _sizes(self, leaves: Sequence[Tensor]) -> dict[str, int]:
        return {name: size for leaf, (_, shape, _) in zip(leaves, self._leaves) for size, name in zip(leaf.shape, shape)}


@functools.lru_cache(1024)
def _size(size: int | str) -> Evaluate:
    return parse_expression(str(size))


def _plain(tensor: Tensor) -> Tensor:
    # A package takes the address of a tensor's memory for its values.
    return tensor.resolve_conj().resolve_neg() if tensor.is_neg() or tensor.is_conj() else tensor


def _aligned(tensor: Tensor) -> Tensor:
    # Triton kernels are compiled for inputs at multiples of 16 bytes; a slice may begin anywhere.
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor
