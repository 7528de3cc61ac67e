"""What the check says about ComfyUI: its version, what it offers to this pack, and packs that own our node ids."""
from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator

import comfy.model_management
import comfy.model_patcher
import comfyui_version
import torch

from ...pack import PACKAGE
from ..check.facts import MISSING, WARNING, Fact
from ..check.linear_table import Sizes, kitchen_backends
from ..check.machine import Check, check
from . import allocation_recording as comfy_recording
from . import core as comfy_core
from .int8_layer import require_native_int8

# Bytes that the largest shape takes: its weight in six types, its input and its result in fp32 and int32.
WORKING_MEMORY = 3 << 30
INT8_PACKAGE = "comfy_kitchen"
# In the order in which Flux and Wan prefer them.
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run_check(sizes: Callable[[torch.device], Sizes], own_ids: Iterable[str] = (),
              tick: Callable[[int, int], object] = lambda done, total: None) -> Check:
    """The check on the device and in the type that ComfyUI computes with. sizes: what to measure there. own_ids: this pack's node ids,
    where packs are loaded."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        comfy.model_management.free_memory(WORKING_MEMORY, device)
    facts = [*comfy_facts(device), *conflict_facts(own_ids)]
    dtype = comfy.model_management.unet_dtype(device, supported_dtypes=DTYPES)
    return check(device, sizes(device), facts, dtype, tick)


def comfy_facts(device: torch.device) -> Iterator[Fact]:
    yield Fact("ComfyUI", comfyui_version.__version__)
    try:
        require_native_int8("Quantizing")
        yield Fact("native INT8", "yes")
    except RuntimeError as error:
        yield Fact("native INT8", "no: the INT8 nodes do not run, the compile nodes do", MISSING, str(error))
    yield kernel_fact()
    yield dynamic_vram_fact(device)
    yield memory_compiler_fact(device)


def kernel_fact() -> Fact:
    if importlib.util.find_spec(INT8_PACKAGE) is None:
        return Fact("comfy_kitchen", "not installed", WARNING, "Install what this ComfyUI's requirements.txt names.")
    return Fact("comfy_kitchen", f"INT8 by {', '.join(kitchen_backends()) or 'nothing that runs here'}")


def dynamic_vram_fact(device: torch.device) -> Fact:
    memory = importlib.util.find_spec("comfy.memory_management")
    if memory is None:
        return Fact("dynamic VRAM", "not in this version")
    from comfy import memory_management

    if not memory_management.aimdo_enabled:
        return Fact("dynamic VRAM", f"off; not used on {device.type}" if device.type == "cpu" else "off")
    if "disable_dynamic" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
        return Fact("dynamic VRAM", "on, and models cannot be taken out of it", WARNING,
                    "Update ComfyUI, or start it with --disable-dynamic-vram, for INT8 Lazy Torch Compile's disable_dynamic_vram.")
    return Fact("dynamic VRAM", "on; disable_dynamic_vram takes a model out of it")


def memory_compiler_fact(device: torch.device) -> Fact:
    """ComfyUI's own (Comfy-Org/ComfyUI pull request 15861, since 0.34): it records allocations and CUDA graphs, and fuses no kernels."""
    if not hasattr(comfy_recording.prefetch_module(), "malloc_graph_enabled"):
        return Fact("memory compiler", "not in this version")
    if problems := comfy_core.changes(comfy_core.COMPILER):
        return Fact("memory compiler", f"not known to this pack: {'; '.join(problems)}", WARNING,
                    "Start ComfyUI with --disable-comfy-compiler if compiled models fail, or update the pack.")
    if not comfy_recording.is_on(device):
        return Fact("memory compiler", "off")
    return Fact("memory compiler", "on; off for a model while it runs compiled, since the two do not go together")


def conflict_facts(own_ids: Iterable[str]) -> Iterator[Fact]:
    """Other packs that register an id of ours, whichever of the two ComfyUI took."""
    own_ids = set(own_ids)
    if not own_ids:
        return
    import nodes  # ComfyUI's registry, complete once packs are loaded

    found: dict[str, set[str]] = {}
    for node_id in own_ids & nodes.NODE_CLASS_MAPPINGS.keys():
        if not nodes.NODE_CLASS_MAPPINGS[node_id].__module__.startswith(f"{PACKAGE}."):
            cls = nodes.NODE_CLASS_MAPPINGS[node_id]
            found.setdefault(getattr(cls, "RELATIVE_PYTHON_MODULE", cls.__module__), set()).add(node_id)
    for name, module in sys.modules.copy().items():
        mappings = vars(module).get("NODE_CLASS_MAPPINGS") if module is not None and name != "nodes" and "." not in name else None
        if isinstance(mappings, dict) and (shared := own_ids & mappings.keys()):
            cls = mappings[next(iter(shared))]
            found.setdefault(getattr(cls, "RELATIVE_PYTHON_MODULE", name), set()).update(shared)
    for other, ids in sorted(found.items()):
        yield Fact("conflicting pack", f"{other} also registers {', '.join(sorted(ids))}", WARNING,
                   "ComfyUI uses the pack that loads last. Disable one of the two.")
    if not found:
        yield Fact("conflicting packs", "none")
