"""INT8 Lazy Torch Compile: compiles at the first sampling call, when weights, LoRA, device and shapes are final."""
from __future__ import annotations

from comfy_api.latest import io

from ..compile.comfyui.compile_model import add_compile, non_dynamic_clone
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..compile.options import DYNAMIC, CompileOptions
from ..compile.report import CompileReport
from .compile_model import BACKGROUND_TOOLTIP

TITLE = "INT8 Lazy Torch Compile"


class INT8LazyTorchCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="INT8LazyTorchCompile",
            display_name=TITLE,
            category="INT8 Compile",
            description="Compiles the model when it first samples, with INT8 layers, LoRA and other patches in place. Put it last "
                        "before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The model to compile, quantized or not. The model that comes in is not changed."),
                io.Combo.Input("backend", options=["inductor", "cudagraphs"], default="inductor", tooltip="inductor: fused kernels. "
                               "cudagraphs: CUDA graphs of the eager kernels only."),
                io.Boolean.Input("fullgraph", default=False, tooltip="Demand that each block is one graph. Off, code that cannot be "
                                 "compiled runs as it is between graphs."),
                io.Combo.Input("mode", options=["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"],
                               default="default", tooltip="default: short compile. max-autotune(-no-cudagraphs): searches faster kernels "
                               "for minutes. reduce-overhead: CUDA graphs, for small models."),
                io.Combo.Input("dynamic", options=list(DYNAMIC), default="true", tooltip="true: compile once for all resolutions and "
                               "prompt lengths. false: each size compiles again, and is a little faster. auto: torch decides at the "
                               "second size."),
                io.Boolean.Input("compile_transformer_blocks_only", default=True, tooltip="Compile each repeated block class once and "
                                 "share it. Off, the whole model is one unit, which takes minutes for large models."),
                io.Int.Input("dynamo_cache_size_limit", default=640, min=0, max=2048, tooltip="How often a block class may be compiled "
                             "before it runs uncompiled. 0: torch's own limit."),
                io.Boolean.Input("use_guard_filter", default=True, tooltip="Do not check transformer_options before every block. Applies "
                                 "only while no patch that could read them is active, so results stay right."),
                io.Boolean.Input("disable_dynamic_vram", default=True, tooltip="Compile a copy of the model without dynamic VRAM, whose "
                                 "weights are plain tensors. The checkpoint is read once more. Off, weights are streamed as usual and "
                                 "break graphs."),
                io.Boolean.Input("log_compile", default=False, tooltip="Write a line to the console for every compile."),
                io.Boolean.Input("background", default=False, optional=True, tooltip=BACKGROUND_TOOLTIP),
            ],
            outputs=[io.Model.Output(tooltip="The same model; it compiles when it first samples.")],
            **SCHEMA,
        )

    @classmethod
    def execute(cls, model, backend, fullgraph, mode, dynamic, compile_transformer_blocks_only, dynamo_cache_size_limit,
                use_guard_filter, disable_dynamic_vram, log_compile, background=False) -> io.NodeOutput:
        options = CompileOptions(backend=backend, fullgraph=fullgraph, dynamic=DYNAMIC.get(dynamic, dynamic), mark_sizes=dynamic == "true",
                                 mode=mode, blocks_only=compile_transformer_blocks_only, cache_size_limit=dynamo_cache_size_limit,
                                 guard_filter=use_guard_filter, log=log_compile, background=background, title=TITLE)
        patched = non_dynamic_clone(model, TITLE) if disable_dynamic_vram else model.clone()
        status = NodeStatus(CompileReport(TITLE))
        add_compile(patched, "diffusion_model", options, status)
        return io.NodeOutput(patched, ui=status.ui)
