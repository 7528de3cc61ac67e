"""Everything private of torch, ComfyUI and comfy_kitchen that the pack names: what it is for, and what happens where it is missing.

What is not here must not be used (test_internals.py); `nox -s names` looks these up in the releases that users have.
"""
from __future__ import annotations

from typing import NamedTuple


class Internal(NamedTuple):
    """name: dotted from the package's root, or ".name" for an attribute of objects, which file (below the package's folder) then has.
    use: what for. without: what the pack does where it is missing. needed: in every release that the pack supports; else without is a way
    that the pack takes by itself."""
    name: str
    use: str
    without: str
    needed: bool = True
    file: str = ""


_CACHE = "the block is compiled when it runs, and not kept"
_ALONE = "a batch of 1 is compiled by itself"
_FAILED = "compile fails, and the model runs uncompiled with a warning"
_WARM = "the first compile does it itself, seconds later: the warm-up says so at debug level"
_MODULE = "torch/nn/modules/module.py"
_TENSOR = "comfy_kitchen/tensor/base.py"

INTERNALS = (
    # torch: kernels
    Internal("torch._int_mm", "the INT8 product of cuBLASLt and oneDNN", "INT8 does not run but by Triton's kernels"),
    Internal("torch._scaled_mm", "the check's fp8 contender", "the check's row says that fp8 failed, with the cause"),
    Internal("torch.cuda._sleep", "the GPU waits while a timed kernel is launched", "a candidate cannot be timed: the predicted one runs"),
    Internal("._version", "whether an input that siblings share was written into", "each of q, k and v quantizes for itself",
             file="torch/_C/__init__.pyi"),
    Internal("torch.cpu._is_avx512_supported", "which instruction set inductor chooses", _WARM),
    Internal("torch.ops.mkldnn._is_mkldnn_bf16_supported", "whether a CPU computes in bf16", "INT8 Compile Check fails on a CPU"),
    Internal("torch.ops.mkldnn._is_mkldnn_fp16_supported", "whether a CPU computes in fp16", "INT8 Compile Check fails on a CPU"),
    # torch: the compiler
    Internal("torch._dynamo.callback.callback_handler", "what is compiled is shown, and can be interrupted", _FAILED),
    Internal("torch._dynamo.config", "the recompile limit of a model", _FAILED),
    Internal("torch._dynamo.eval_frame._debug_get_cache_entry_list", "whether a block is at its recompile limit", _FAILED),
    Internal("torch._dynamo.eval_frame.reset_code", "what a deleted model compiled is freed", "each loaded model costs some MB"),
    Internal("torch._dynamo.eval_frame.cached_backends", "what a deleted model compiled is freed", "each loaded model costs some MB",
             needed=False),
    Internal("torch._dynamo.guards._get_closure_vars", "layers that a guard asked in vain are freed",
             "a block's weights of each model that was compiled stay in memory", needed=False),
    Internal("torch._dynamo.pgo.CodeId", "a block's place in the model stays a constant that nothing guards",
             "a graph for each block of UNets", needed=False),
    Internal("torch._dynamo.pgo.get_code_state", "as above", "as above", needed=False),
    Internal("torch._dynamo.exc.TorchDynamoException", "what a function of cache_compile does that cannot be traced",
             "cache_compile's error has no hint"),
    Internal("torch._dynamo.utils.counters", "the report's graphs, breaks and cache hits", _FAILED),
    Internal("torch._dynamo.utils.get_compilation_metrics", "the report's causes of recompiles", _FAILED),
    Internal("torch._dynamo.variables.lists", "whether a number that varies is in a list of the block's arguments",
             "torch's own way, which is right from 2.14 on", needed=False),
    Internal("torch._dynamo.variables.SymNodeVariable", "as above", "as above"),
    Internal("torch._dynamo.variables.ConstantVariable", "as above", "as above"),
    Internal("torch._dynamo.variables.builder", "as above", "as above"),
    Internal("._dynamo_weak_dynamic_indices", "sizes that vary are dynamic from the first compile on", "one more graph at the second size",
             file="torch/_dynamo/variables/builder.py"),
    Internal("._dynamo_static_indices", "a size of 1 is not taken for one that varies, whatever torch has learnt",
             "such a block may run eager", file="torch/_dynamo/variables/builder.py"),
    Internal("torch._dynamo.guards.GuardBuilder", "blocks that ask for an attribute that they lack compile in torch 2.8", _FAILED),
    Internal("torch._C._dynamo.guards.TensorGuards", "weights are compared with those of the last call in C++",
             "they are compared in Python, 5 us a block more", needed=False),
    Internal("torch.utils._python_dispatch._disable_current_modes", "GGUF blocks are compared with eager", "no compile node loads"),
    Internal("torch.utils._python_dispatch.is_traceable_wrapper_subclass", "which layers of other packs are an operation",
             "no compile node loads"),
    Internal("torch.utils._python_dispatch.TorchDispatchMode", "whether a block writes into anything", _FAILED),
    Internal("torch.utils._pytree.tree_leaves", "whether a block returns its inputs", _FAILED),
    Internal("._schema", "whether an operator writes into its input", "inputs of another layout are compiled for once more",
             file="torch/_ops.py"),
    Internal("._cdata", "whether two tensors share memory", "inputs of another layout are compiled for once more", file="torch/storage.py"),
    Internal("._is_view", "whether code asks how a tensor lies in memory", "such code is not known as one that asks", False,
             file="torch/_C/__init__.pyi"),
    Internal("._base", "as above", "such code is not known as one that asks", False, file="torch/_C/__init__.pyi"),
    Internal("torch._C._dispatch_dump", "which of these are torch's own", _FAILED),
    Internal("torch.library._impls", "kernels that another pack has put in the place of torch's", _FAILED),
    Internal("torch.fx.experimental._config.patch", "equal sizes are not taken for the same size", _FAILED),
    Internal("torch._subclasses.fake_impls", "views ask nothing of a batch", _ALONE, needed=False),
    Internal("._compute_stride", "views ask nothing of a batch", _ALONE, needed=False, file="torch/_subclasses/fake_impls.py"),
    Internal("._select_conv_backend", "convolutions ask nothing of a batch", _ALONE, needed=False, file="torch/_C/__init__.pyi"),
    Internal("._conv_determine_backend_memory_format", "convolutions ask nothing of a batch", _ALONE, needed=False,
             file="torch/_C/__init__.pyi"),
    Internal("torch._C.DispatchKey.CompositeImplicitAutograd", "F.linear asks nothing of a batch", _ALONE, needed=False),
    Internal("._op_dk", "F.linear asks nothing of a batch", _ALONE, needed=False, file="torch/_ops.py"),
    Internal("torch._inductor.list_mode_options", "what a mode is in options", "compile nodes with a mode fail"),
    Internal("torch._inductor.config.get_config_copy", "names and types of options are checked", "options are refused"),
    Internal("torch._inductor.config.patch", "threads and options of an artifact", _CACHE),
    Internal("torch._inductor.custom_graph_pass.CustomGraphPass", "one quantization for q, k and v", _CACHE),
    Internal("torch._inductor.config.emulate_precision_casts", "nothing is fused where each rounding of eager is asked for", _CACHE),
    Internal("torch._inductor.custom_graph_pass.get_hash_for_files", "the pass is part of inductor's key", _CACHE),
    Internal("torch._inductor.compile_fx", "the compiler's imports are done while a checkpoint loads", _WARM),
    Internal("torch._inductor.runtime.triton_heuristics", "the same on a GPU", _WARM),
    Internal("torch._inductor.async_compile.AsyncCompile", "the precompiled header of a CPU's kernels", _WARM),
    Internal("torch._inductor.cpp_builder.get_cpp_compiler", "the probe of vector instructions", _WARM),
    Internal("torch._inductor.cpu_vec_isa.VecISA", "the probe of vector instructions", _WARM),
    Internal("torch._inductor.runtime.runtime_utils", "where torch keeps compiled code (default_cache_dir)", _FAILED),
    Internal("torch._inductor.cpu_vec_isa.valid_vec_isa_list", "the probe of vector instructions", _WARM),
    Internal("._arch_flags", "the probe of vector instructions", _WARM, file="torch/_inductor/cpu_vec_isa.py"),
    Internal("torch._C._len_torch_dispatch_stack", "nothing is compiled for all batches where torch would not trace", _FAILED),
    Internal("torch._C._functorch.peek_interpreter_stack", "no artifact runs under functorch (vmap, jvp)",
             "the pack's compiled models fail"),
    Internal("torch.autograd.forward_ad._current_level", "no artifact runs in forward-mode differentiation",
             "the pack's compiled models fail"),
    Internal("torch._C._len_torch_function_stack", "no artifact runs under a torch function mode", "the pack's compiled models fail"),
    Internal("torch._guards.TracingContext.try_get", "which code dynamo has traced", _FAILED),
    Internal("torch._TorchCompileInductorWrapper", "what torch.compile makes of the backend's name", _FAILED),
    Internal("torch._dynamo.lookup_backend", "what torch.compile makes of another backend's name", _FAILED),
    Internal("torch._ops.OpOverload", "an operator that a block holds is known by its name", "the pack does not load"),
    Internal("torch._ops.OpOverloadPacket", "an operator that a block holds is known by its name", "the pack does not load"),
    # torch: artifacts
    Internal("torch._inductor.codecache", "the builder's imports come before its folders are set", _CACHE),
    Internal("torch._inductor.aoti_compile_and_package", "artifacts that need no compiler to run", "artifacts of inductor's own kind"),
    Internal("torch._C._aoti.AOTIModelPackageLoader", "loads those", "they are built anew"),
    Internal("torch._inductor.standalone_compile", "artifacts of inductor's own kind", _CACHE),
    Internal("torch._inductor.CompiledArtifact.load", "loads those", "they are built anew"),
    Internal("torch._subclasses.fake_tensor.FakeTensorMode", "a block is traced without its weights", _CACHE),
    Internal("torch.utils._pytree.tree_map_only", "tensors in what a model returns", "no compile node loads"),
    Internal("torch.utils._sympy.printers.PythonPrinter", "conditions of an artifact as text", _CACHE),
    # torch: modules
    Internal("torch.nn.modules.conv._ConvNd", "whether a block is convolutional", "no INT8 node loads"),
    Internal("._call_impl", "the call of a module past what is compiled in its place", _FAILED, file=_MODULE),
    Internal("._wrapped_call_impl", "another pack's function there is seen", "it is not", False, file=_MODULE),
    Internal("._compiled_call_impl", "the place of nn.Module.compile, where the compiled call is put", _FAILED, file=_MODULE),
    Internal("._parameters", "a module's own parameters, as they are stored", _FAILED, file=_MODULE),
    Internal("._buffers", "a module's own buffers, as they are stored", _FAILED, file=_MODULE),
    Internal("._modules", "a module's own children, as they are stored", _FAILED, file=_MODULE),
    Internal("._global_forward_hooks", "with hooks on all modules blocks run uncompiled", "the pack does not load", file=_MODULE),
    Internal("._global_forward_pre_hooks", "with hooks on all modules blocks run uncompiled", "the pack does not load", file=_MODULE),
    Internal("._forward_hooks", "a block with hooks is not made an artifact", _CACHE, file=_MODULE),
    Internal("._forward_pre_hooks", "a block with hooks is not made an artifact", _CACHE, file=_MODULE),
    # ComfyUI
    Internal("._full_precision_mm_config", "whether a text encoder's file wants a layer in full precision",
             "it multiplies in INT8 like the others", False, file="comfy/ops.py"),
    Internal("._v_signature", "a block's layers are taken for the same wherever dynamic VRAM keeps them", "blocks compile once more", False,
             file="comfy/ops.py"),
    Internal("._v_weight", "as above", "blocks compile once more", False, file="comfy/ops.py"),
    Internal("._inside_attn_wrapper", "the mark that wrap_attn hands on to attention functions, which is not read", "more graphs",
             False, file="comfy/ldm/modules/attention.py"),
    Internal("._v_bias", "as above", "blocks compile once more", False, file="comfy/ops.py"),
    Internal("._prefetch", "whether core has fetched a layer's weights before its block", "weights are copied at each step", False,
             file="comfy/ops.py"),
    Internal("._lowvram_function", "the LoRA of a weight in dynamic VRAM", "weights are copied at each step", False,
             file="comfy/ops.py"),
    Internal("._model_dtype", "the type in which a weight computes", "the weight's own type", False,
             file="comfy/model_patcher.py"),
    Internal("._v", "whether dynamic VRAM streams a layer", "the layer is taken for one that is loaded", False, file="comfy/ops.py"),
    Internal("._quantization_metadata", "the key of a file's metadata that lists its INT8 layers", "the file's layers name their format",
             False, file="comfy/utils.py"),
    # Triton
    Internal("._BASE_ARGS_FORMAT", "whether a kernel's own launcher in C takes what it took in Triton 3.6",
             "kernels are launched by way of Triton's function in Python", False, file="triton/backends/nvidia/driver.py"),
    # comfy_kitchen
    Internal("._qdata", "the int8 values of a quantized weight", "no INT8 layer of ComfyUI runs", file=_TENSOR),
    Internal("._params", "its scale and its rotation", "no INT8 layer of ComfyUI runs", file=_TENSOR),
    Internal("._layout_cls", "the name of its format", "no INT8 layer of ComfyUI is known as one", file=_TENSOR),
    Internal("comfy_kitchen.backends.cuda._C.cutlass_int8_dequant", "CUTLASS's product as one more candidate", "it is no candidate", False),
    Internal("comfy_kitchen.backends.cuda._wrap_for_dlpack", "its operands", "it is no candidate", False),
)

# What only looks like one: texts that are the pack's own names, or the ends of names in files.
OWN = {"._io", "._socket", "._directory", "._comfy_active", "._scale", "._patched_weights", "._weight_lowvram_function",
       "._int8_compile_modes", "._aoti", "._registry",
       "._x_"}  # the last is what ComfyUI writes for a dot in the name of a pack (nodes.py: load_custom_node)
