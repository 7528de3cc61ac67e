"""Artefacts of a block: built here from its skeleton. An AOTInductor package runs without dynamo or inductor.

Traced with torch.export at batch 2 at least: a graph for batch 1 is of no use for others, one for 2 serves 1 if the program for 1 has the
same operations. A package checks nothing of its inputs, so all that its trace relied on is written down and checked before it is run.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import logging
import operator
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..torch_internals import warmup
from .block import Spec, attributes_of, classes_of, load_skeleton, module_classes
from .call import CELL, LAYOUTS, Containers, OptionReads, Unsupported, as_tuples, closures_in, lies_as, rebuild, rebuild_result
from .closures import CellReads, code_at
from .describe import Names
from .layouts import depends_on_layout
from .shape_expressions import parse_expression
from .source_guards import Recording, recording, sources_of
from .store import Entry

logger = logging.getLogger(__name__)

READABLE = "readable.py"


@dataclasses.dataclass
class Job:
    """What another process needs to build the artefact of a call; pickled by this pack for itself.

    skeleton: of dump_skeleton, or of copy_skeleton to build in this process. attributes: of the block. tensors: of the block, in
    order: name, dtype, shape, layout. structure, leaves, options: of the call (see cache_call), a leaf as (dtype, shape, layout).
    batched: leaves whose first size is the batch. dims: of each leaf, those compiled for any size. device: of everything. threads: of
    the CPU. config: inductor's options. method: of the block, called as block.method(*args).
    """

    name: str
    skeleton: bytes | torch.nn.Module
    attributes: list[list]
    tensors: list[tuple[str, str, tuple[int, ...], str]]
    structure: tuple
    leaves: list[Spec]
    options: list[dict]
    batched: list[int]
    dims: list[tuple[int, ...]]
    device: str
    threads: int
    config: dict
    method: str = "forward"

    @property
    def any_batch(self) -> bool:
        return any(0 in self.dims[index] for index in self.batched)


def varying(dims: int) -> range:
    """Which dims of a block's input may vary between calls: not the channels of [batch, channels] and [batch, tokens, channels], nor the
    rotation matrices of position embeddings [..., D/2, 2, 2]."""
    return range(dims - 1 if dims in (2, 3) else dims - 3 if dims > 5 else dims)


@dataclasses.dataclass
class _Seen:
    """What a trace shows besides its graph. outputs: the structure of the result."""

    options: list[OptionReads]
    outputs: object = None
    recording: Recording = dataclasses.field(default_factory=Recording)


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

    def __init__(self, block: torch.nn.Module, job: Job, seen: _Seen):
        super().__init__()
        self._caller = (_Caller(block, job.method),)  # not a submodule: its weights are arguments
        self._job = job
        self._seen = seen  # export puts back what is assigned to the module itself

    def forward(self, tensors, leaves):
        args, kwargs = rebuild(self._job.structure, leaves, self._seen.options, self._caller[0].block)
        containers = Containers(args, kwargs)
        named = {f"block.{name}": tensor for (name, *_), tensor in zip(self._job.tensors, tensors)}
        with recording() as found:
            result = torch.func.functional_call(self._caller[0], named, args, kwargs)
        self._seen.recording.update(found)
        containers.require_unchanged()
        outputs: list[Tensor] = []
        self._seen.outputs = _output_structure(result, outputs)
        return outputs


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
    raise Unsupported(f"it returns a {type(value).__name__}")


def build(job: Job, folder: Path, tiers: Sequence[str] = ("aoti", "aot"), decompositions: Mapping | None = None) -> dict:
    """Writes the artefact and its readable form into folder: -> the body of its manifest. The first of tiers that can be built here.
    decompositions: {op: function} besides torch.export's own.

    Raises Unsupported, and what torch raises.
    """
    state = random.getstate()  # a trace in this process may draw from it
    try:
        job = _without_unread(job)
        traced, body = _trace(job)
        found = traced.seen.recording
        found.require_pure()
        if _depends_on_layout(job):
            raise Unsupported("it writes into its input, or returns it, in one layout and a copy of it in another")
    finally:
        random.setstate(state)
    names = found.names()
    body |= {"name": job.name, "device": job.device, "structure": job.structure, "outputs": traced.seen.outputs,
             "names": names.items, "attributes": _unchanged_attributes(job, traced, names),
             "classes": classes_of(module_classes(traced.block), names),
             "writes": [options.writes() for options in traced.seen.options], "operators": _operators(traced.program),
             "sources": sources_of(found, names, closures=sorted(set(closures_in(job.structure)))), "torch": torch.__version__,
             "by_layout": found.asks_layout}
    program = traced.program
    if decompositions:
        program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions})
    for index, tier in enumerate(tiers):
        try:
            COMPILERS[tier](program, job, folder / FILES[tier])
        except Exception as error:
            if index + 1 == len(tiers):
                raise
            logger.info("%s: no %s artefact (%s); trying %s", job.name, tier, str(error).partition("\n")[0], tiers[index + 1])
            continue
        body["kind"] = tier
        break
    (folder / READABLE).write_text(_readable(job, body, program))
    return body


def _without_unread(job: Job) -> Job:
    """job without those constants of its functions (closures) that the call does not read: a block's number that only some branch asks
    for. So it serves calls with any. All stay where it cannot be found out."""
    if not any(key.startswith(CELL) for values in job.options for key in values):
        return job
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = _Caller(_skeleton(job), job.method)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            tensors, leaves = [[torch.empty(shape, dtype=getattr(torch, dtype), device=job.device, memory_format=LAYOUTS[kind])
                                for dtype, shape, kind in specs] for specs in ([spec for _, *spec in job.tensors], job.leaves)]
            args, kwargs = rebuild(job.structure, leaves, [OptionReads(values) for values in job.options], block.block)
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


def _depends_on_layout(job: Job) -> bool:
    """A call makes dense copies of what has another layout than the traced one: whether that is another call."""
    block = _Caller(_skeleton(job), job.method)

    def make(dtype: str, shape: tuple, kind: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=LAYOUTS[kind])

    def call(*tensors):
        args, kwargs = rebuild(job.structure, tensors[len(job.tensors):], [OptionReads(values) for values in job.options],
                               block.block)
        outputs: list[Tensor] = []
        named = {f"block.{name}": tensor for (name, *_), tensor in zip(job.tensors, tensors)}
        _output_structure(torch.func.functional_call(block, named, args, kwargs), outputs)
        return outputs
    weights = [torch.nn.Parameter(make(*spec), requires_grad=False) for _, *spec in job.tensors]
    return depends_on_layout(call, [*weights, *(make(*spec) for spec in job.leaves)], job.device)


def _unchanged_attributes(job: Job, traced: _Traced, names: Names) -> list[list]:
    """attributes_of the traced block. Raises Unsupported where the trace has changed one: what a call leaves behind is no output."""
    before, after = (attributes_of(block, names) for block in (_skeleton(job), traced.block))
    if changed := next((f"{path}.{name}".strip(".") for path, name, value in after if [path, name, value] not in before), ""):
        raise Unsupported(f"it changes its attribute {changed}")
    return after


def _operators(program) -> list[str]:
    """Namespaces of operators that are not torch's own: who runs the artefact must have imported what defines them."""
    names = {getattr(node.target, "namespace", "aten") for node in program.graph.nodes if node.op == "call_function"}
    return sorted(names - {"aten", "prims", "prim", "higher_order", "int8_compile"})


def _skeleton(job: Job) -> torch.nn.Module:
    return load_skeleton(job.skeleton) if isinstance(job.skeleton, bytes) else copy.deepcopy(job.skeleton)


@dataclasses.dataclass
class _Traced:
    program: torch.export.ExportedProgram
    block: torch.nn.Module
    seen: _Seen


def _trace(job: Job) -> tuple[_Traced, dict]:
    batch = job.leaves[job.batched[0]][1][0] if job.batched else 0
    if not job.any_batch:
        traced = _export(job, batch, any_batch=False)
        return traced, _inputs(traced, job, least_batch=0)
    try:
        traced = _export(job, max(batch, 2), any_batch=True)
        body = _inputs(traced, job, least_batch=2)
        if isinstance(body["leaves"][job.batched[0]][1][0], int):
            raise Unsupported("its batch is fixed")
        alone = _export(job, 1, any_batch=False)
        if _same_program(traced, alone, job):
            return traced, _inputs(traced, job, least_batch=1)
        if batch > 1:
            return traced, body
    except Exception as error:  # the sizes of this call are still to be had
        logger.warning("%s: %s; building for batch %d only", job.name, error, batch)
    traced = _export(job, batch, any_batch=False)
    return traced, _inputs(traced, job, least_batch=0)


def _same_program(many: _Traced, one: _Traced, job: Job) -> bool:
    """Whether the program for any batch computes at batch 1 what the one for batch 1 does: the same operations with the same constants,
    slice bounds and sizes."""
    return (many.seen.outputs == one.seen.outputs and [options.writes() for options in many.seen.options] == [
        options.writes() for options in one.seen.options] and _operations(many, job) == _operations(one, job))


def _operations(traced: _Traced, job: Job) -> list[tuple]:
    """What the program does at batch 1, each tensor by the number of the operation that makes it. Sizes are written in terms of the inputs'
    sizes; what only works them out or takes all of a tensor, which a known size leaves out, is not listed."""
    import sympy

    nodes = list(traced.program.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"][len(job.tensors):]
    sizes: dict = {}  # symbol -> what it is at batch 1
    for index, node in enumerate(inputs):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(expression := _expression(size), sympy.Symbol):
                batch = dim == 0 and index in job.batched
                sizes.setdefault(expression, sympy.Integer(1) if batch else sympy.Symbol(f"leaf{index}_{dim}", integer=True, positive=True))
    made: dict = {}
    result = []

    def text(value):
        if isinstance(value, torch.fx.Node):
            return made[value]
        if isinstance(value, (list, tuple)):
            return [text(item) for item in value]
        if isinstance(value, slice):
            return "slice", text(value.start), text(value.stop), text(value.step)
        if isinstance(value, torch.SymInt):
            return f"size {_expression(value).xreplace(sizes)}"
        return f"size {value}" if type(value) is int else f"{type(value).__name__} {value!r}"

    def shape(node):
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        return [text(list(item.shape)) if isinstance(item, Tensor) else None for item in values]
    for node in nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            made[node] = text(value)
        elif node.op == "call_function" and value is None and ("assert" in str(node.target) or "constrain" in str(node.target)):
            continue
        elif str(node.target) == "aten.slice.Tensor" and shape(node) == shape(node.args[0]):
            made[node] = made[node.args[0]]
        else:
            result.append((node.op if node.op != "call_function" else str(node.target), text(node.args),
                           sorted((key, text(item)) for key, item in node.kwargs.items()), shape(node)))
            made[node] = f"#{len(result)}"
    return result


def _export(job: Job, batch: int, any_batch: bool) -> _Traced:
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
            if index in job.batched:
                shape = (batch, *shape[1:])
            leaves.append(make(dtype, shape, kind))
            shapes.append({dim: Dim.AUTO for dim in job.dims[index] if shape[dim] > 1 and (any_batch or dim or index not in job.batched)})
        seen = _Seen([OptionReads(values) for values in job.options])
        exported = export(_Program(block, job, seen), (tensors, leaves), dynamic_shapes=([None] * len(tensors), shapes), strict=False)
    _refuse_random(exported)
    return _Traced(exported, block, seen)


def _refuse_random(exported):
    for node in exported.graph.nodes:
        # Attention is random by its tag; it is with dropout only, which comes fifth.
        dropout = node.kwargs.get("dropout_p", (*node.args, 0, 0, 0, 0, 0)[4]) if "attention" in str(node.target) else 1
        if dropout and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unsupported(f"it draws random numbers ({node.target})")


def _inputs(traced: _Traced, job: Job, least_batch: int) -> dict:
    """What a call must be like for this program: shapes, guards, what it writes into and returns unchanged.

    least_batch: 1 where the batch may be 1 although it was traced with more; 0 where it is fixed.
    """
    from sympy import Symbol
    from torch.utils._sympy.printers import PythonPrinter

    program = traced.program
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(job.tensors) + len(job.leaves):
        raise Unsupported("it holds tensors that are neither parameters nor buffers")
    leaves = inputs[len(job.tensors):]
    shapes = [[_expression(size) for size in node.meta["val"].shape] for node in leaves]
    ties = {}
    if least_batch:
        # One size for all: where the trace let two differ it took neither for 1, and would be wrong if only one were.
        first = shapes[job.batched[0]][0]
        ties = {shapes[index][0]: first for index in job.batched if isinstance(shapes[index][0], Symbol)}
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
    environments = [size.node.shape_env for node in leaves for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
    guards = [environments[0].simplify(guard.expr).xreplace(ties) for guard in environments[0].guards] if environments else []
    ranges = {}
    for symbol, name in renamed.items():
        bounds = program.range_constraints[symbol]
        low = 1 if least_batch == 1 and symbol == first else max(2, _bound(bounds.lower, 2))
        ranges[str(name)] = [low, _bound(bounds.upper, 1 << 62)]
    signature = program.run_decompositions({}).graph_signature  # functional: what is written in place becomes an output
    by_name = {node.name: index for index, node in enumerate(leaves)}
    changed = {spec.arg.name: spec.target for spec in signature.output_specs if spec.kind.name != "USER_OUTPUT"}
    if not set(changed.values()) <= set(by_name):
        raise Unsupported("it changes its weights")
    outputs = [spec.arg.name for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    if any(_is_view_of_input(node) for node in program.graph.output_node().all_input_nodes):
        raise Unsupported("it returns a part of its input, which later code might write into")
    return {
        "leaves": [[dtype, list(map(text, shape)), kind] for (dtype, _, kind), shape in zip(job.leaves, shapes)],
        "guards": [text(guard) for guard in guards if guard.free_symbols], "ranges": ranges,
        "written": [by_name[name] for name in changed.values()], "same": [by_name.get(changed.get(name, name), -1) for name in outputs],
        "options": [options.constants() for options in traced.seen.options],
    }


def _is_view_of_input(node: torch.fx.Node) -> bool:
    start = node
    while node.op == "call_function" and (getattr(node.target, "is_view", False) or node.target is operator.getitem):
        node = node.args[0]
    return node is not start and node.op == "placeholder"


def _expression(size):
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _bound(value, otherwise: int) -> int:
    return int(value) if value.is_Integer else otherwise


def _settings(job: Job) -> tuple[dict, dict]:
    """(options for inductor, its settings) of a job."""
    from ...int8.graph_pass import MergeQuantizations

    return {"post_grad_custom_pre_pass": MergeQuantizations(), **job.config}, {"cpp.threads": job.threads}


def _compile_aoti(program, job: Job, path: Path):
    import torch._inductor
    from torch._inductor import config

    options, patches = _settings(job)
    with config.patch(patches), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _compile_aot(program, job: Job, path: Path):
    """inductor's own artefact: needs neither CUDA's headers nor a second C++ compile, but inductor to be loaded."""
    import torch._inductor
    from torch._inductor import config

    options, patches = _settings(job)
    graph = program.graph_module
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with config.patch({**patches, "fx_graph_cache": True}), torch.no_grad():
        artefact = torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_graph", options={"config_patches": options})
        artefact.save(path=str(path), format="binary")


COMPILERS = {"aoti": _compile_aoti, "aot": _compile_aot}
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

    artefact = entry.load(FILES["aot"], lambda folder: CompiledArtifact.load(path=str(folder / FILES["aot"]), format="binary"))
    return lambda inputs: artefact(*inputs)


LOADERS = {"aoti": _load_aoti, "aot": _load_aot}


def _readable(job: Job, body: dict, program) -> str:
    lines = [f"# {job.name}.{job.method} for {job.device}, torch {body['torch']}",
             f"# inputs (dtype, shape, layout): {body['leaves']}", f"# sizes: {body['ranges']}", f"# conditions: {body['guards']}",
             f"# weights: {', '.join(name for name, *_ in job.tensors)}", f"# inductor options: {job.config}", "# traced from:"]
    lines += [f"#   {module}.{name}" if name else f"#   {module} (file)" for module, name, _ in body["sources"]]
    return "\n".join(lines) + "\n" + program.graph_module.print_readable(print_output=False)


class Artefact:
    """What this process can run. Loading a package takes a few ms and needs neither dynamo nor inductor."""

    def __init__(self, entry: Entry, device: torch.device):
        body = entry.body
        self.kind = body["kind"]
        self.structure = as_tuples(body["structure"])
        self._leaves = [(getattr(torch, dtype), shape, kind) for dtype, shape, kind in body["leaves"]]
        self._ranges = [(name, low, high) for name, (low, high) in body["ranges"].items()]
        self._names = {name for name, _, _ in self._ranges}
        self._guards = [parse_expression(text) for text in body["guards"]]
        self._expressions = {size: parse_expression(size) for _, shape, _ in self._leaves for size in shape
                             if isinstance(size, str) and size not in self._names}
        self.options, self._writes = body["options"], body["writes"]
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
        sizes: dict[str, int] = {}
        late = []
        for leaf, (dtype, shape, _) in zip(leaves, self._leaves):
            if leaf.dtype is not dtype or leaf.device != self._device or leaf.dim() != len(shape) or type(leaf) is not Tensor:
                return False
            for size, expected in zip(leaf.shape, shape):
                if type(expected) is int:
                    if size != expected:
                        return False
                elif expected not in self._names:
                    late.append((size, expected))
                elif sizes.setdefault(expected, size) != size:
                    return False
        if self.written:
            memory = [leaf.untyped_storage().data_ptr() for leaf in leaves]
            if any(memory[index] and memory.count(memory[index]) > 1 for index in self.written):
                return False
        return (all(low <= sizes.get(name, 0) <= high for name, low, high in self._ranges)
                and all(self._expressions[expected](sizes) == size for size, expected in late)
                and all(guard(sizes) for guard in self._guards))

    def has_layout(self, leaves: Sequence[Tensor]) -> bool:
        """Whether leaves, which are accepted, lie in memory as the traced ones did, where the block asks for that."""
        return not self._by_layout or all(lies_as(leaf, kind) for leaf, (_, _, kind) in zip(leaves, self._leaves))

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
        results = [leaves[same] if same >= 0 else result for result, same in zip(results, self._same)]
        return rebuild_result(self._outputs, iter(results))


def _plain(tensor: Tensor) -> Tensor:
    # A package takes the address of a tensor's memory for its values.
    return tensor.resolve_conj().resolve_neg() if tensor.is_neg() or tensor.is_conj() else tensor


def _aligned(tensor: Tensor) -> Tensor:
    # Triton kernels are compiled for inputs at multiples of 16 bytes; a slice may begin anywhere.
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor
