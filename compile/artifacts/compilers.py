"""What makes a package of an exported program: AOTInductor, or inductor's own format where that cannot."""
from __future__ import annotations

from pathlib import Path

from .job import BuildSpec

READABLE = "readable.py"


def _settings(job: BuildSpec) -> tuple[dict, dict]:
    """(options for inductor, its settings) of a job."""
    from ...int8.graph_pass import Int8GraphPass

    return {"post_grad_custom_pre_pass": Int8GraphPass(), **job.config}, {"cpp.threads": job.threads}


def _compile_aoti(program, job: BuildSpec, path: Path):
    import torch._inductor
    from torch._inductor import config

    options, patches = _settings(job)
    with config.patch(patches), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _compile_aot(program, job: BuildSpec, path: Path):
    """inductor's own artifact: needs neither CUDA's headers nor a second C++ compile, but inductor to be loaded."""
    import torch._inductor
    from torch._inductor import config

    options, patches = _settings(job)
    graph = program.graph_module
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with config.patch({**patches, "fx_graph_cache": True}), torch.no_grad():
        artifact = torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_graph", options={"config_patches": options})
        artifact.save(path=str(path), format="binary")


COMPILERS = {"aoti": _compile_aoti, "aot": _compile_aot}


def _readable(job: BuildSpec, body: dict, program) -> str:
    lines = [f"# {job.name}.{job.method} for {job.device}, torch {body['torch']}",
             f"# inputs (dtype, shape, layout): {body['leaves']}", f"# sizes: {body['ranges']}", f"# conditions: {body['guards']}",
             f"# weights: {', '.join(name for name, *_ in job.tensors)}", f"# inductor options: {job.config}", "# traced from:"]
    lines += [f"#   {module}.{name}" if name else f"#   {module} (file)" for module, name, _ in body["sources"]]
    return "\n".join(lines) + "\n" + program.graph_module.print_readable(print_output=False)
