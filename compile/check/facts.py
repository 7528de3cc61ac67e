"""What this machine has for the pack and what it lacks, with the remedy. Plain torch."""
from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ...int8.echo import without_commands, writable
from ...int8.kernels import autotune, cpu, native, seen_right
from ...int8.kernels.with_triton import TRITON_MIN_CAPABILITY, triton_unavailable

OK, WARNING, MISSING = "ok", "warning", "missing"
COMPILER_TIMEOUT = 60  # seconds
BUSY = 0.5  # of the cores, on average over the last minute
# NVIDIA's INT8 tensor cores begin with Turing.
INT8_MIN_CAPABILITY = (7, 5)
# Instructions that multiply INT8, by the names of /proc/cpuinfo.
CPU_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
CPU_SHOWN = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", *CPU_INT8)
COMPILERS = {"Windows": "cl", "Darwin": "clang++"}  # as torch's inductor looks for them; g++ elsewhere
INSTALL_COMPILER = {
    "Windows": "Install Visual Studio Build Tools with 'Desktop development with C++', and start ComfyUI from its x64 Native Tools prompt.",
    "Darwin": "Install one: xcode-select --install.",
    "Linux": "Install one: apt install g++ (Fedora: dnf install gcc-c++, Arch: pacman -S gcc), or set CXX to one that works.",
}


@dataclass(frozen=True)
class Fact:
    """status: OK, WARNING (works, with less than could be) or MISSING (something of this pack does not work). remedy: what to do."""
    name: str
    value: str
    status: str = OK
    remedy: str = ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def _cpuinfo() -> list[str]:
    """Linux's lines about the processor; none elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def _cpu_name() -> str:
    name = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def machine_facts(device: torch.device) -> Iterator[Fact]:
    yield Fact("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Fact("torch", torch.__version__)
    yield triton_fact(device)
    yield compiler_fact(device)
    yield headers_fact(device)
    yield gpu_fact(device)
    yield cpu_fact(device)
    yield kernel_fact(device)
    if device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        yield Fact("load", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: other programs make the times say little", WARNING,
                   "Run this again when the machine is idle.")
    if importlib.util.find_spec("matplotlib") is None:
        yield Fact("matplotlib", "not installed: no plot", WARNING, pip_install("matplotlib"))


def pip_install(packages: str) -> str:
    """The command for the Python that runs this, Windows portable's included."""
    if "python_embeded" in Path(sys.executable).parts:
        return rf"In the folder of run_nvidia_gpu.bat: .\python_embeded\python.exe -s -m pip install {packages}"
    return f"{sys.executable} -m pip install {packages}"


def triton_fact(device: torch.device) -> Fact:
    if importlib.util.find_spec("triton") is not None:
        distribution = next((name for name in ("triton", "triton-windows", "pytorch-triton-rocm", "pytorch-triton")
                             if _version(name)), None)
        return Fact("Triton", _version(distribution) if distribution else "installed")
    if device.type != "cuda":
        return Fact("Triton", f"not installed; not needed on {device.type}")
    package = "triton-windows" if platform.system() == "Windows" else "triton"
    return Fact("Triton", "not installed: torch.compile and this pack's INT8 kernels do not run", MISSING,
                f"{pip_install(package)} (the version that goes with torch {torch.__version__})")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def compiler_fact(device: torch.device) -> Fact:
    """Whether the C++ compiler that torch.compile would take compiles a line of C++."""
    system = platform.system()
    command = shlex.split(os.environ.get("CXX") or COMPILERS.get(system, "g++"), posix=system != "Windows")
    # triton-windows brings a C compiler of its own, and the CPU kernels are not used on a GPU.
    status = WARNING if system == "Windows" and device.type == "cuda" else MISSING
    remedy = INSTALL_COMPILER.get(system, INSTALL_COMPILER["Linux"])
    if shutil.which(command[0]) is None:
        return Fact("C++ compiler", f"{command[0]} was not found", status, remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text("#include <vector>\nint sum(const std::vector<int>& v) { int s = 0; for (int x : v) s += x; return s; }\n")
        try:
            subprocess.run([*command, "/c" if command[0] == "cl" else "-c", str(source)], check=True, capture_output=True, text=True,
                           errors="replace", timeout=COMPILER_TIMEOUT, cwd=folder)
        except (OSError, subprocess.SubprocessError) as error:
            text = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
            return Fact("C++ compiler", f"{' '.join(command)} fails: {writable(without_commands(text))}", status, remedy)
    return Fact("C++ compiler", " ".join(command))


def headers_fact(device: torch.device) -> Fact:
    """Compiled code on a CPU, and Triton's launchers, include Python.h."""
    folder = Path(sysconfig.get_path("include"))
    if (folder / "Python.h").exists():
        return Fact("Python headers", str(folder))
    if platform.system() == "Windows":
        remedy = (f"Copy the folders include and libs of a Python {platform.python_version()} from python.org beside "
                  f"{Path(sys.executable).name}; Windows portable comes without them.")
    else:
        remedy = "Install them: apt install python3-dev (Fedora: dnf install python3-devel), or use a Python that has them."
    return Fact("Python headers", f"Python.h is not in {folder}", WARNING if platform.system() == "Windows" else MISSING, remedy)


def gpu_fact(device: torch.device) -> Fact:
    if device.type != "cuda":
        if device.type == "cpu":
            return Fact("GPU", "none that CUDA or ROCm reaches")
        return Fact("GPU", f"{device.type}: INT8 by plain torch, not by our kernels", WARNING, "Use INT8 for its half of the memory only.")
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if torch.version.hip:
        return Fact("GPU", f"{name}, {properties.gcnArchName}: INT8 by Triton")
    capability = (properties.major, properties.minor)
    name += ", compute capability {}.{}".format(*capability)
    if capability < INT8_MIN_CAPABILITY:
        return Fact("GPU", f"{name}: no INT8 tensor cores", WARNING, "INT8 halves the weights' memory on this card and brings no speed.")
    if capability < TRITON_MIN_CAPABILITY:
        return Fact("GPU", f"{name}: INT8 tensor cores by torch._int_mm; our Triton kernels begin with 8.0", WARNING,
                    "There is none: expect less of INT8 than on later cards.")
    return Fact("GPU", f"{name}: INT8 tensor cores by Triton and torch._int_mm")


def cpu_features() -> set[str]:
    """Instruction sets by their names in /proc/cpuinfo."""
    found = {word for line in _cpuinfo() if line.startswith(("flags", "Features")) for word in line.split()}
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11; what Windows and macOS have
        found |= {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return found


def cpu_fact(device: torch.device) -> Fact:
    found = cpu_features()
    value = f"{_cpu_name()}, {torch.get_num_threads()} threads: {', '.join(name for name in CPU_SHOWN if name in found) or 'no AVX2'}"
    if device.type == "cpu" and found.isdisjoint(CPU_INT8):
        return Fact("CPU", value, WARNING, "This CPU has no INT8 instructions (VNNI, AMX): INT8 halves the memory and brings little speed.")
    return Fact("CPU", value)


def kernel_fact(device: torch.device) -> Fact:
    """What kernel = auto multiplies INT8 with, and where it keeps what it has measured."""
    if device.type == "cpu":
        if native.library() is None:
            return Fact("INT8 kernel", f"{cpu.multiplier()} in blocks of rows; torch quantizes the rows, slower than native code", WARNING,
                        "Install a C++ compiler (see above); on Windows and macOS there is no native code yet.")
        return Fact("INT8 kernel", f"{cpu.multiplier()} in blocks of rows, quantized by native code; nothing to choose, nothing saved")
    if reason := triton_unavailable(device):
        return Fact("INT8 kernel", f"{'torch._int_mm' if device.type == 'cuda' else 'plain torch'}: {reason}")
    return Fact("INT8 kernel", f"our Triton tiles or torch._int_mm, whichever measures fastest for a layer's sizes; kept in "
                f"{autotune.choices().path}, where models find what this check has measured")


def checked_fact() -> Fact:
    """Of the INT8 kernels that have run in this process."""
    name = "kernels checked"
    right, wrong = seen_right.looked_at()
    if seen_right.disabled():
        return Fact(name, "no: the checks are off")
    if wrong:
        return Fact(name, f"{right} shapes right, and wrong: {'; '.join(f'{kernel}: {what}' for kernel, what in wrong.items())}", WARNING,
                    "These are left out. Please report them, and update the GPU's driver, torch and Triton.")
    return Fact(name, f"{right} shapes, all right against the exact product")


def can_compile(facts: Iterable[Fact]) -> bool:
    return all(fact.status != MISSING for fact in facts if fact.name in ("Triton", "C++ compiler", "Python headers"))
