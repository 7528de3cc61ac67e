"""Which options of inductor a workflow may set, and to what.

A workflow comes from anybody, and much in torch._inductor.config ends on a compiler's command line, in a path, as the name of a module or
of a function: none of that is here. Each value below selects between ways to generate code that torch itself has written: it is true or
false, a number within bounds, or one of some words. tests/security/test_options.py holds the list against the sources of the torch that
is installed. Not here although it is about speed: freezing, which writes the weights of one block into the code that all blocks share;
assert_indirect_indexing, size_asserts and assume_*, without which a wrong size reads past a tensor.
"""
from __future__ import annotations

import difflib
import json
import os

from ..int8.echo import echo

INVALID_OPTIONS = "Compilation failed due to invalid options"
# Of whoever administers the server: names that are allowed besides, separated by commas; only their type is checked.
VARIABLE = "INT8_COMPILE_ALLOW_OPTIONS"
MAX_CHARACTERS = 10_000  # of the JSON text; all options together have 4000

_FLAGS = """
    aggressive_fusion allow_buffer_reuse b2b_gemm_pass benchmark_combo_kernel benchmark_epilogue_fusion benchmark_fusion combo_kernels
    combo_kernels_pointwise_only comprehensive_padding constant_and_index_propagation conv_1x1_as_mm coordinate_descent_check_all_directions
    coordinate_descent_tuning cpp_wrapper decompose_mem_bound_mm deterministic dynamic_scale_rblock efficient_conv_bn_eval_fx_passes
    emulate_precision_casts enable_linear_binary_folding epilogue_fusion epilogue_fusion_first expand_dimension_for_pointwise_nodes
    fallback_random force_fuse_int_mm_with_mul force_layout_optimization force_shape_pad fx_graph_cache graph_partition inplace_buffers
    inplace_padding joint_graph_constant_folding keep_output_stride layout_optimization loop_index_inversion_in_fusion
    loop_ordering_after_fusion max_autotune max_autotune_gemm max_autotune_pointwise memory_planning nan_asserts online_softmax
    pad_channels_last pad_dynamic_shapes pad_outputs pattern_matcher permute_fusion prologue_fusion reorder_for_locality
    reorder_for_peak_memory shape_padding split_cat_fx_passes split_reductions use_fast_math use_mixed_mm
    cpp.dynamic_threads cpp.enable_concat_linear cpp.enable_grouped_gemm_template cpp.enable_loop_tail_vec cpp.enable_tiling_heuristics
    cpp.fallback_scatter_reduce_sum cpp.no_redundant_loops cpp.use_decompose_tanh cpp.use_small_dequant_buffer cpp.weight_prepack
    triton.autotune_cublasLt triton.autotune_pointwise triton.coalesce_tiling_analysis triton.codegen_upcast_to_fp32
    triton.cooperative_reductions triton.cudagraph_skip_dynamic_graphs triton.cudagraph_support_input_mutation triton.cudagraph_trees
    triton.cudagraphs triton.dense_indexing triton.enable_pdl triton.enable_persistent_tma_matmul triton.enable_template_tma_store
    triton.force_cooperative_reductions triton.mix_order_reduction triton.native_matmul triton.persistent_reductions
    triton.prefer_nd_tiling triton.skip_l1_cache triton.tile_reductions triton.tiling_prevents_pointwise_fusion
    triton.tiling_prevents_reduction_fusion triton.use_block_ptr triton.use_tensor_descriptor
"""
_SEARCH = ("DEFAULT", "EXHAUSTIVE")
# name -> bool, a range of whole numbers, a tuple of values, or a set of words of which the text names some, separated by commas. What is
# not in the torch at hand (names come and go) is an unknown option there.
ALLOWED: dict[str, type | range | tuple | frozenset] = {
    **dict.fromkeys(_FLAGS.split(), bool),
    "coordinate_descent_search_radius": range(1, 5),
    "max_epilogue_benchmarked_choices": range(1, 17),
    "max_fusion_size": range(1, 257),
    "max_pointwise_cat_inputs": range(1, 65),
    "min_num_split": range(0, 257),
    "padding_alignment_bytes": (16, 32, 64, 128, 256, 512),
    "padding_stride_threshold": range(0, 65537),
    "realize_opcount_threshold": range(1, 1001),
    "realize_reads_threshold": range(1, 1001),
    "score_fusion_memory_threshold": range(0, 1 << 20),
    "unroll_reductions_threshold": range(1, 65),
    "cpp.gemm_max_k_slices": range(0, 65),
    "cpp.max_horizontal_fusion_size": range(1, 65),
    "cpp.min_chunk_size": range(1, 1 << 20),
    "cpp.simdlen": (None, 0, 1, 128, 256, 512),
    "cpp.threads": range(-1, 257),
    "triton.max_tiles": (None, 1, 2, 3),
    "triton.multi_kernel": range(0, 4),
    "triton.num_decompose_k_splits": range(0, 33),
    "memory_pool": ("none", "intermediates", "outputs", "combined"),
    "max_autotune_gemm_search_space": _SEARCH,
    "max_autotune_flex_search_space": _SEARCH,
    # CUTLASS and CK import Python from folders and run other compilers.
    "max_autotune_gemm_backends": frozenset(("ATEN", "TRITON", "CPP")),
    "max_autotune_conv_backends": frozenset(("ATEN", "TRITON")),
}


def check_options(options: dict) -> None:
    """Raises ValueError that starts with INVALID_OPTIONS for an option that this torch does not know, that a workflow may not set, or that
    has another value than it may have; near matches and what is allowed are named."""
    from torch._inductor import config  # compile machinery: when options are given, not at import

    known = config.get_config_copy()
    more = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in known and name in more:
            default = known[name]
            if default is not None and type(value) is not type(default):
                raise ValueError(f"{INVALID_OPTIONS}: '{name}' takes a {type(default).__name__}, not {echo(_quoted(value))}.")
        elif name in known and name in ALLOWED:
            is_default = value is None and known[name] is None  # as torch 2.14 has some of the numbers
            if not is_default and not _is_allowed(value, ALLOWED[name]):
                raise ValueError(f"{INVALID_OPTIONS}: '{name}' takes {_describe(ALLOWED[name])}, not {echo(_quoted(value))}.")
        else:
            what = "a workflow may not set" if name in known else "inductor has no option"
            raise ValueError(f"{INVALID_OPTIONS}: {what} '{echo(key)}'. {_near(name, known)}")


def _near(name: str, known: dict) -> str:
    names = [allowed for allowed in ALLOWED if allowed in known]
    near = difflib.get_close_matches(name[:100], names, n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}Allowed are: {', '.join(sorted(names))}."


def _is_allowed(value, allowed) -> bool:
    if allowed is bool:
        return type(value) is bool
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    if isinstance(allowed, frozenset):
        return isinstance(value, str) and len(value) < 100 and {word.strip().upper() for word in value.split(",")} <= allowed
    return any(type(value) is type(one) and value == one for one in allowed)


def _describe(allowed) -> str:
    if allowed is bool:
        return "a bool"
    if isinstance(allowed, range):
        return f"a whole number from {allowed[0]} to {allowed[-1]}"
    if isinstance(allowed, frozenset):
        return f"a text of {', '.join(sorted(allowed))} with commas between"
    return f"one of {', '.join(map(json.dumps, allowed))}"


def _quoted(value) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"
