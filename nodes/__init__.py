"""The nodes, one file per family."""
from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..compile.comfyui import core as comfy_core
from ..compile.comfyui import server_status
from ..compile.comfyui.artifact_cache import get_cache
from ..compile.comfyui.bypass_lora import patch_bypass_loras
from ..compile.torch_internals import warmup
from ..int8.files.temporary import sweep_below
from ..int8.kernels import autotune
from .cache import ClearCompileCache, LoadCompileCache, SaveCompileCache
from .check import INT8CompileCheck
from .checkpoint import LoadINT8Model, SaveINT8Model
from .compile_model import CompileModel
from .edge import for_clients
from .lazy_compile import INT8LazyTorchCompile
from .modes import ApplyModes, ShowModes
from .optimize import OptimizeModel
from .quantize import INT8QuantizeModel

logger = logging.getLogger(__name__)

NODES: list[type[io.ComfyNode]] = list(map(for_clients, [
    OptimizeModel, CompileModel, INT8LazyTorchCompile, INT8QuantizeModel, LoadINT8Model, SaveINT8Model, ApplyModes, ShowModes,
    SaveCompileCache, LoadCompileCache, ClearCompileCache, INT8CompileCheck,
]))
CATEGORY = "INT8 Compile"
# Ids that packs in the field use as well; the one that loads last wins, silently.
SHARED_IDS = ("CompileModel", "INT8LazyTorchCompile")
COMPILING_IDS = (*SHARED_IDS, "OptimizeModel")


class Int8CompileExtension(ComfyExtension):
    _is_loaded = False

    async def on_load(self) -> None:
        self._is_loaded = True
        from server import PromptServer

        import nodes  # ComfyUI's registry and server are complete only while packs load, not at import

        comfy_core.check_all()
        patch_bypass_loras()  # a LoRA that was loaded before there are INT8 layers may meet them later
        _report_id_clashes(nodes.NODE_CLASS_MAPPINGS)
        if hasattr(PromptServer, "instance"):
            async def look_again(app):
                # A second copy of this pack has reported the clash when it was loaded.
                others = {node_id: nodes.NODE_CLASS_MAPPINGS[node_id] for node_id in SHARED_IDS}
                _report_id_clashes({k: v for k, v in others.items() if getattr(v, "CATEGORY", None) != CATEGORY})
            PromptServer.instance.app.on_startup.append(look_again)
            PromptServer.instance.add_on_prompt_handler(_warm_up)
            server_status.add_route(PromptServer.instance)
            autotune.waiting.busy = lambda: PromptServer.instance.prompt_queue.get_tasks_remaining() > 0
            sweep_below(Path(folder_paths.get_output_directory()))  # Save INT8 Model writes anywhere in it
            await _register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        if not self._is_loaded:  # ComfyUI 0.8.0 does not call on_load
            await self.on_load()
        return NODES


def _report_id_clashes(registry: dict) -> None:
    for node_id in SHARED_IDS:
        other = registry.get(node_id)
        if other is not None and other not in NODES:
            logger.warning("INT8 Compile: the node id %s is also registered by %s. ComfyUI uses the pack that loads last; "
                           "disable one of the two.", node_id, getattr(other, "RELATIVE_PYTHON_MODULE", other.__module__))


def _warm_up(json_data: dict) -> dict:
    """A prompt that will compile has been sent: the compiler is imported while its checkpoint loads. Not where there are artifacts, which
    need no compiler; the node finds out if they are of another model."""
    prompt = json_data.get("prompt") if isinstance(json_data, dict) else None  # of anybody, and core has not looked at it yet
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    cache = get_cache()
    if ((cache is None or not cache.store.has())
            and any(isinstance(node, dict) and node.get("class_type") in COMPILING_IDS and not _is_background(node) for node in nodes)):
        warmup.start(comfy.model_management.get_torch_device().type)
    return json_data


def _is_background(node: dict) -> bool:
    inputs = node.get("inputs")
    return isinstance(inputs, dict) and bool(inputs.get("background"))


async def _register_replacements() -> None:
    """Workflows made with Velocator's node open with ours where Velocator is absent (ComfyUI 0.13 or later)."""
    if not hasattr(io, "NodeReplace"):
        return
    from comfy_api.latest import ComfyAPI

    kept = ("model", "is_patcher", "object_to_patch", "memory_format", "fullgraph", "dynamic", "disable")
    # Velocator's modes, options and backend name things that only its own compiler knows.
    reset = {"mode": "default", "options": "", "backend": "inductor"}
    await ComfyAPI().node_replacement.register(io.NodeReplace(
        new_node_id="CompileModel",
        old_node_id="VelocatorCompileModel",
        old_widget_ids=["is_patcher", "object_to_patch", "memory_format", "fullgraph", "dynamic", "mode", "options", "disable", "backend"],
        input_mapping=[{"new_id": name, "old_id": name} for name in kept]
        + [{"new_id": name, "set_value": value} for name, value in reset.items()],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    ))
