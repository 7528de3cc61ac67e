"""An inductor pass: one quantization of x for q, k and v (neither AOTAutograd nor inductor merges equal custom ops), and norms, GELUs
and residuals around operations of this pack inside them."""
from __future__ import annotations

import torch
import torch.fx.experimental._config as shape_config
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from . import fused_graph
from .kernels import ops

PURE = (ops.quant_rows.default, torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def deduplicate_activation_quant(graph: torch.fx.Graph) -> None:
    """The graph is functional, so equal calls give equal results."""
    seen: dict[tuple, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in PURE:
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


class Int8GraphPass(CustomGraphPass):
    """For torch.compile's option ``post_grad_custom_pre_pass``."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        deduplicate_activation_quant(graph)
        # Between the operations that are fused nothing is rounded to the model's type: not where a user wants every rounding of eager.
        if not config.emulate_precision_casts:
            fused_graph.fuse(graph)

    def uuid(self) -> bytes:
        """Part of the key of inductor's disk cache, which does not tell what was traced for sizes from 2 on from what was for 1 too: 3,
        where views and convolutions ask nothing of sizes either."""
        return get_hash_for_files((__file__, fused_graph.__file__)) + bytes([3 * getattr(shape_config, "backed_size_oblivious", False)])
