"""Artifacts of a block: built here from its skeleton. An AOTInductor package runs without dynamo or inductor.

Traced with torch.export at batch 2 at least: a graph for batch 1 is of no use for others, one for 2 serves 1 if the program for 1 has the
same operations. A package checks nothing of its inputs, so all that its trace relied on is written down and checked before it is run.
"""
from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .artifact import FILES
from .attention import called_as_operation
from .attention_override import OVERRIDE
from .block import load_skeleton
from .block_guards import attributes_of, classes_of, module_classes
from .call import CELL, LAYOUTS, closures_in, numbers_in, rebuild, set_numbers
from .closures import CellReads, code_at
from .compilers import COMPILERS, READABLE, _readable
from .describe import Names
from .inputs import _inputs, _Seen, _Traced, is_off_dropout
from .job import BuildSpec
from .layouts import depends_on_layout
from .option_reads import Containers, RecordingOptions
from .records import classes_in
from .same_program import same_program
from .shape_expressions import SizeConditions
from .source_guards import sources_of
from .traced_calls import recording
from .values import Unsupported

logger = logging.getLogger(__name__)


class _Caller(torch.nn.Module):
    def __init__(self, block: torch.nn.Module, method: str):
        super().__init__()
        self.block = block
        self.method = method

    def forward(self, *args, **kwargs):
        call = self.block if self.method == "forward" else getattr(self.block, self.method)
        return call(*args, **kwargs)


class _Program(torch.nn.Module):
    """forward(tensors, leaves): the call as a function of tensors only."""

    def __init__(self, block: torch.nn.Module, job: BuildSpec, seen: _Seen):
        super().__init__()
        self._caller = (_Caller(block, job.method),)  # not a submodule: its weights are arguments
        self._job = job
        self._seen = seen  # export puts back what is assigned to the module itself

    def forward(self, tensors, leaves):
        args, kwargs = _arguments(self._job, leaves, self._seen.options, self._caller[0].block)
        block = self._caller[0].block
        containers, numbers = Containers(args, kwargs), {name: block.__dict__[name] for name in numbers_in(self._job.structure)}
        named = {f"block.{name}": tensor for (name, *_), tensor in zip(self._job.tensors, tensors)}
        with recording() as found:
            result = torch.func.functional_call(self._caller[0], named, args, kwargs)
        self._seen.recording.update(found)
        containers.require_unchanged()
        if changed := next((name for name, value in numbers.items() if block.__dict__.get(name) is not value), ""):
            raise Unsupported(f"it changes its attribute {changed}")
        outputs: list[Tensor] = []
        self._seen.outputs = _output_structure(result, outputs)
        return outputs


def _arguments(job: BuildSpec, leaves: Sequence, options: Sequence[dict], block: torch.nn.Module) -> tuple[tuple, dict]:
    args, kwargs = rebuild(job.structure, leaves, options, block)
    return args, set_numbers(block, kwargs)


def _output_structure(value, found: list[Tensor]):
    if isinstance(value, Tensor):
        found.append(value)
        return "tensor"
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return [type(value).__name__, *[_output_structure(item, found) for item in value]]
    if type(value) is dict:
        return ["dict", *[[key, _output_structure(item, found)] for key, item in value.items()]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [type(value).__name__, value]
    if isinstance(value, torch.SymInt):
        return "size", value  # a list is what the result has
    raise Unsupported(f"it returns a {type(value).__name__}")


def build(job: BuildSpec, folder: Path, tiers: Sequence[str] = ("aoti", "aot"), decompositions: Mapping | None = None) -> dict:
    """Writes the artifact and its readable form into folder: -> the body of its manifest. The first of tiers that can be built here.
    decompositions: {op: function} besides torch.export's own.

    Raises Unsupported, and what torch raises.
    """
    state = random.getstate()  # a trace in this process may draw from it
    try:
        with called_as_operation():
            job = _without_unread(job)
            job, traced, body = _trace_with_sizes(job)
            by_layout = _depends_on_layout(job)
        found = traced.seen.recording
        found.require_pure()
        if by_layout:
            raise Unsupported("it writes into its input, or returns it, in one layout and a copy of it in another")
    finally:
        random.setstate(state)
    if any(OVERRIDE in options for options in job.options) and not found.is_comfyuis():
        raise Unsupported("another pack's attention is there, and code that is not ComfyUI's")
    names = found.names()
    body |= {"name": job.name, "device": job.device, "structure": job.structure,
             "names": names.items, "attributes": _unchanged_attributes(job, traced, names),
             "classes": classes_of([*module_classes(traced.block), *classes_in(job.structure)], names),
             "operators": _operators(traced.program),
             "sources": sources_of(found, names, closures=sorted(set(closures_in(job.structure)))), "torch": torch.__version__,
             "by_layout": found.asks_layout}
    program = traced.program
    if decompositions:
        program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions})
    from torch.fx.experimental import _config as shape_config

    for index, tier in enumerate(tiers):
        try:
            with shape_config.patch(use_duck_shape=False):  # a batch of 2 is no rotation matrix of 2x2
                COMPILERS[tier](program, job, folder / FILES[tier])
        except Exception as error:
            if index + 1 == len(tiers):
                raise
            logger.info("%s: no %s artifact (%s); trying %s", job.name, tier, str(error).partition("\n")[0], tiers[index + 1])
            continue
        body |= {"kind": tier, **_inputs(traced, job)}  # with what the compiler has asked of the sizes
        break
    if job.any_batch and not SizeConditions(body).hold_for(job.shapes):  # of batch 1, which it is not for now
        return build(job.with_fixed_batch(), folder, tiers, decompositions)
    (folder / READABLE).write_text(_readable(job, body, program))
    return body


def _without_unread(job: BuildSpec) -> BuildSpec:
    """job without those constants of its functions (closures) that the call does not read: a block's number that only some branch asks
    for. So it serves calls with any. All stay where it cannot be found out."""
    if not any(key.startswith(CELL) for values in job.options for key in values):
        return job
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = _Caller(_skeleton(job), job.method)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            tensors, leaves = [[torch.empty(shape, dtype=getattr(torch, dtype), device=job.device, memory_format=LAYOUTS[kind])
                                for dtype, shape, kind in specs] for specs in ([spec[1:] for spec in job.tensors], job.leaves)]
            args, kwargs = _arguments(job, leaves, [RecordingOptions(values) for values in job.options], block.block)
            named = {f"block.{name}": tensor for (name, *_), tensor in zip(job.tensors, tensors)}
            codes = [code for place in closures_in(job.structure) if (code := code_at(*place)) is not None]
            with recording() as found, CellReads(codes) as reads:
                torch.func.functional_call(block, named, args, kwargs)
    except Exception:
        return job
    names = found.names()
    if "__closure__" in names or "cell_contents" in names:
        return job
    read = {CELL + name for name in reads.names}
    return dataclasses.replace(job, options=[{key: value for key, value in values.items() if not key.startswith(CELL) or key in read}
                                             for values in job.options])


def _depends_on_layout(job: BuildSpec) -> bool:
    """A call makes dense copies of what has another layout than the traced one: whether that is another call."""
    block = _Caller(_skeleton(job), job.method)

    def make(dtype, shape, kind) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=LAYOUTS[kind])

    def call(*tensors):
        args, kwargs = _arguments(job, tensors[len(job.tensors):], [RecordingOptions(values) for values in job.options], block.block)
        outputs: list[Tensor] = []
        named = {f"block.{name}": tensor for (name, *_), tensor in zip(job.tensors, tensors)}
        _output_structure(torch.func.functional_call(block, named, args, kwargs), outputs)
        return outputs
    weights = [torch.nn.Parameter(make(*spec), requires_grad=False) for _, *spec in job.tensors]
    return depends_on_layout(call, [*weights, *(make(*spec) for spec in job.leaves)], job.device)


def _unchanged_attributes(job: BuildSpec, traced: _Traced, names: Names) -> list[list]:
    """attributes_of the traced block. Raises Unsupported where the trace has changed one: what a call leaves behind is no output."""
    before, after = (attributes_of(block, names, without=numbers_in(job.structure)) for block in (_skeleton(job), traced.block))
    if changed := next((f"{path}.{name}".strip(".") for path, name, value in after if [path, name, value] not in before), ""):
        raise Unsupported(f"it changes its attribute {changed}")
    return after


def _operators(program) -> list[str]:
    """Namespaces of operators that are not torch's own: who runs the artifact must have imported what defines them."""
    names = {getattr(node.target, "namespace", "aten") for node in program.graph.nodes if node.op == "call_function"}
    return sorted(names - {"aten", "prims", "prim", "higher_order", "int8_compile"})


def _skeleton(job: BuildSpec) -> torch.nn.Module:
    return load_skeleton(job.skeleton) if isinstance(job.skeleton, bytes) else copy.deepcopy(job.skeleton)


def _trace_with_sizes(job: BuildSpec) -> tuple[BuildSpec, _Traced, dict]:
    """_trace, and the job: with integers for any size, or where they are more than sizes for just these values."""
    if job.sizes:
        try:
            traced, body = _trace(job)
            if not traced.seen.recording.asks_of_integers():
                return job, traced, body
        except Exception as error:  # no operation on a size that is traced
            logger.info("%s: %s; building for these numbers only", job.name, error)
        job = job.with_fixed_sizes()
    return job, *_trace(job)


def _trace(job: BuildSpec) -> tuple[_Traced, dict]:
    batch = job.batch
    if not job.any_batch:
        traced = _export(job, batch, any_batch=False)
        return traced, _inputs(traced, job)
    try:
        traced = _export(job, max(batch, 2), any_batch=True)
        traced.least_batch = 2
        body = _inputs(traced, job)
        if isinstance(body["leaves"][job.batch_leaves[0]][1][0], int):
            raise Unsupported("its batch is fixed")
        if same_program(traced, _export(job, 1, any_batch=False), job):
            traced.least_batch = 1
            body = _inputs(traced, job)
        if SizeConditions(body).hold_for(job.shapes):
            return traced, body
    except Exception as error:  # the sizes of this call are still to be had
        logger.warning("%s: %s; building for batch %d only", job.name, error, batch)
    return _trace(job.with_fixed_batch())


def _export(job: BuildSpec, batch: int, any_batch: bool) -> _Traced:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import Dim, export
    from torch.fx.experimental import _config as shape_config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with shape_config.patch(use_duck_shape=False), torch.no_grad():
        mode = FakeTensorMode(shape_env=ShapeEnv())

        def make(dtype: str, shape: tuple, kind: str) -> Tensor:
            with mode:
                return torch.empty(shape, dtype=getattr(torch, dtype), device=job.device, memory_format=LAYOUTS[kind])
        block = _skeleton(job)
        tensors = [make(dtype, shape, kind) for _, dtype, shape, kind in job.tensors]
        leaves, shapes = [], []
        for index, (dtype, shape, kind) in enumerate(job.leaves):
            if index in job.batch_leaves:
                shape = (batch, *shape[1:])
            leaves.append(make(dtype, shape, kind))
            shapes.append({dim: Dim.AUTO for dim in job.dynamic_dims[index]
                           if shape[dim] > 1 and (any_batch or dim or index not in job.batch_leaves)})
        seen = _Seen([RecordingOptions(values) for values in job.options])
        exported = export(_Program(block, job, seen), (tensors, leaves), dynamic_shapes=([None] * len(tensors), shapes), strict=False)
    _refuse_random(exported)
    return _Traced(exported, block, seen)


def _refuse_random(exported):
    for node in exported.graph.nodes:
        if is_off_dropout(node):
            continue
        # Attention is random by its tag; it is with dropout only, which comes fifth.
        dropout = node.kwargs.get("dropout_p", (*node.args, 0, 0, 0, 0, 0)[4]) if "attention" in str(node.target) else 1
        if dropout and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unsupported(f"it draws random numbers ({node.target})")

