"""What the inputs of a traced program must be: sizes that are equal or in a range, parts that are tied, and what it writes into."""
from __future__ import annotations

import dataclasses
import functools
import operator

import torch

from .job import BuildSpec
from .option_reads import RecordingOptions
from .shape_expressions import parse_expression
from .traced_calls import Recording
from .values import Unsupported

_DROPOUTS = frozenset(f"aten.{name}{in_place}.default" for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
                      for in_place in ("", "_"))


@dataclasses.dataclass
class _Seen:
    """What a trace shows besides its graph. outputs: the structure of the result."""

    options: list[RecordingOptions]
    outputs: object = None
    recording: Recording = dataclasses.field(default_factory=Recording)


@dataclasses.dataclass
class _Traced:
    program: torch.export.ExportedProgram
    block: torch.nn.Module
    seen: _Seen
    least_batch: int = 0  # 1 where the batch may be 1 although it was traced with more; 0 where it is fixed

    @functools.cached_property
    def signature(self) -> torch.export.ExportGraphSignature:
        """Of the functional program: what is written in place becomes an output."""
        return self.program.run_decompositions({}).graph_signature


def _inputs(traced: _Traced, job: BuildSpec) -> dict:
    """What a call must be like for this program: shapes, guards, what it writes into and returns unchanged. Of what its sizes have been
    asked so far: compilers ask for more."""
    from sympy import Symbol
    from torch.utils._sympy.printers import PythonPrinter

    program = traced.program
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(job.tensors) + len(job.leaves):
        raise Unsupported("it holds tensors that are neither parameters nor buffers")
    leaves = inputs[len(job.tensors):]
    shapes = [[_expression(size) for size in node.meta["val"].shape] for node in leaves]
    ties = {}
    if traced.least_batch:
        # One size for all: where the trace let two differ it took neither for 1, and would be wrong if only one were.
        first = shapes[job.batch_leaves[0]][0]
        ties = {shapes[index][0]: first for index in job.batch_leaves if isinstance(shapes[index][0], Symbol)}
    renamed = {symbol: Symbol(f"d{index}", integer=True) for index, symbol in enumerate(dict.fromkeys(
        ties.get(size, size) for shape in shapes for size in shape if isinstance(size, Symbol)))}

    def text(expression) -> str | int:
        expression = expression.xreplace(ties)
        if not expression.free_symbols <= set(renamed):
            raise Unsupported(f"it depends on a size that is none of its inputs' ({expression})")
        if not expression.free_symbols:
            return int(expression)
        printed = PythonPrinter().doprint(expression.xreplace(renamed))
        try:
            parse_expression(printed)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        return printed
    def with_texts(output):
        if _is_size(output):
            return ["size", text(_expression(output[1]))]
        return list(map(with_texts, output)) if isinstance(output, list) else output
    environments = [size.node.shape_env for node in leaves for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
    guards = [environments[0].simplify(guard.expr).xreplace(ties) for guard in environments[0].guards] if environments else []
    ranges = {}
    for symbol, name in renamed.items():
        bounds = program.range_constraints[symbol]
        low = 1 if traced.least_batch == 1 and symbol == first else max(2, _bound(bounds.lower, 2))
        ranges[str(name)] = [low, _bound(bounds.upper, 1 << 62)]
    by_name = {node.name: index for index, node in enumerate(leaves)}
    changed = {spec.arg.name: spec.target for spec in traced.signature.output_specs if spec.kind.name != "USER_OUTPUT"}
    if not set(changed.values()) <= set(by_name):
        raise Unsupported("it changes its weights")
    outputs = [spec.arg.name for spec in traced.signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    if any(_is_view_of_input(node) for node in program.graph.output_node().all_input_nodes):
        raise Unsupported("it returns a part of its input, which later code might write into")
    return {
        "leaves": [[dtype, list(map(text, shape)), kind] for (dtype, _, kind), shape in zip(job.leaves, shapes)],
        "guards": list(dict.fromkeys(text(guard) for guard in guards if guard.free_symbols)), "ranges": ranges,
        "written": [by_name[name] for name in changed.values()], "same": [by_name.get(changed.get(name, name), -1) for name in outputs],
        "outputs": with_texts(traced.seen.outputs),
        "options": [options.constants() for options in traced.seen.options],
        "writes": [{key: [type(value).__name__, *[text(_expression(size)) for size in value]] if isinstance(value, (list, tuple)) else value
                    for key, value in options.writes().items()} for options in traced.seen.options],
    }


def _is_size(output) -> bool:
    """Whether a part of _Seen.outputs is a number that depends on sizes."""
    return isinstance(output, tuple) and output[:1] == ("size",)


def is_off_dropout(node: torch.fx.Node) -> bool:
    """Whether it is a dropout that does nothing, as in models that are not trained: it gives its input itself."""
    return node.op == "call_function" and str(node.target) in _DROPOUTS and node.args[2:] == (False,)


def _is_view_of_input(node: torch.fx.Node) -> bool:
    start = node
    while node.op == "call_function" and (getattr(node.target, "is_view", False) or node.target is operator.getitem
                                          or is_off_dropout(node)):
        node = node.args[0]
    return node is not start and node.op == "placeholder"


def _expression(size):
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _bound(value, otherwise: int) -> int:
    return int(value) if value.is_Integer else otherwise
