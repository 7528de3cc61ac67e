"""What an artifact depends on besides the block it was made of: everything that could make it stale or wrong elsewhere."""
from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch
from torch.autograd import forward_ad

from ...pack import sources_digest
from .entry import digest

CACHE_FORMAT_VERSION = 2


@functools.lru_cache(8)
def machine(device_type: str, index: int | None) -> dict:
    """Versions and hardware: what does not change while this process runs."""
    key = {"format": CACHE_FORMAT_VERSION, "torch": torch.__version__, "git": torch.version.git_version, "cuda": torch.version.cuda,
           "hip": torch.version.hip, "python": list(sys.version_info[:2]), "system": platform.system(), "machine": platform.machine(),
           "pack": sources_digest(), "triton": _version("triton") or _version("triton-windows") or _version("pytorch-triton")}
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index or 0)
        key |= {"gpu": properties.name, "capability": [properties.major, properties.minor], "processors": properties.multi_processor_count}
    else:
        key |= {"processor": _processor(), "capability": torch.backends.cpu.get_cpu_capability(), "compiler": os.environ.get("CXX", "")}
    return key


def machine_without_paths(device: torch.device) -> dict:
    """For somebody else to read."""
    return {name: value for name, value in machine(device.type, device.index).items() if name != "compiler"}


def settings() -> dict:
    """torch's settings of this process that generated code depends on."""
    return {"threads": torch.get_num_threads(), "default": str(torch.get_default_dtype()), "matmul": torch.get_float32_matmul_precision(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
            "reduced": [torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
                        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction],
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "attention": [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
                          torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()]}


def is_inference(device_type: str) -> bool:
    """Whether calls are what an artifact was made for: inference without autocast, with nothing between operators and what they do."""
    return (not torch.is_grad_enabled() and not torch.is_autocast_enabled(device_type)
            and not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack()
            and torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0)


def group(name: str, dynamic: bool, tier: str, structure: list, config: dict, device: torch.device, host: dict) -> str:
    """The folder of all artifacts of a block, as TorchAir names it: {class}_{dynamic or static}[_aoti]_{key}. host: what else the program
    around depends on (ComfyUI's options)."""
    key = digest([machine(device.type, device.index), settings(), structure, config, str(device.type), host])
    return f"{name}_{'dynamic' if dynamic else 'static'}{'_aoti' if tier == 'aoti' else ''}_{key}"


def distribution(global_rank: int | None = None, tp_rank: int | None = None, pp_rank: int | None = None) -> str:
    """TorchAir's name of a process in a distributed run: world2global_rank1_tp_rank0_pp_rank1; empty for a single process."""
    parts = []
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        rank = torch.distributed.get_rank() if global_rank is None else global_rank
        parts.append(f"world{torch.distributed.get_world_size()}global_rank{rank}")
    parts += [f"{name}{rank}" for name, rank in (("tp_rank", tp_rank), ("pp_rank", pp_rank)) if rank is not None]
    return "_".join(parts)


def entry_name(job, batches: str = "any") -> str:
    """The folder of the artifact for calls like this one: of what a call must have in common with it. batches: "one" or "many" where no
    artifact serves both."""
    leaves = []
    for index, (dtype, shape, kind) in enumerate(job.leaves):
        any_batch = index in job.batch_leaves and job.any_batch
        leaves.append([dtype, ["batch" if any_batch and dim == 0 else None if dim in job.dynamic_dims[index] and size > 1 else size
                               for dim, size in enumerate(shape)], kind])
    return digest([job.structure, leaves, job.options, job.attributes, job.method, *([batches] if batches != "any" else [])], 12)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Generated C++ uses every instruction that this processor has."""
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
    return hashlib.sha256(line.encode()).hexdigest()[:16]
