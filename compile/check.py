"""What this machine can do for a model: facts with their remedies, times measured on it, and advice from those times. Plain torch."""
from __future__ import annotations

import datetime
import importlib.util
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from ..int8.kernels.ops import TRITON_MIN_CAPABILITY
from .check_table import INT8, ROTATED, Row, float_dtypes, measure, shapes

OK, WARNING, MISSING = "ok", "warning", "missing"
COMPILER_TIMEOUT = 60  # seconds
# NVIDIA's INT8 tensor cores begin with Turing.
INT8_MIN_CAPABILITY = (7, 5)
# Instructions that multiply INT8, by the names of /proc/cpuinfo.
CPU_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
CPU_SHOWN = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", *CPU_INT8)
# Times closer than this are called the same, and a gain below GAIN is none: other work on the machine moves them as much.
SAME, GAIN = 0.05, 0.10
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


@dataclass
class Check:
    """rows: see check_table.Row. baseline: the float type that the others are compared with, such as bf16."""
    device: str
    baseline: str
    facts: list[Fact]
    rows: list[Row] = field(default_factory=list)
    advice: str = ""
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))

    def to_dict(self) -> dict:
        rows = [{**asdict(row), "winner": row.winner, "ratios": row.ratios(self.baseline)} for row in self.rows]
        return {**asdict(self), "rows": rows, "tera_ops": {name: round(rate, 3) for name, rate in rates(self.rows).items()}}

    def text(self) -> str:
        lines = [f"INT8 Compile check of {self.device}", ""]
        for fact in self.facts:
            lines.append(f"{fact.status:8} {fact.name}: {fact.value}")
            lines += [f"{'':8} -> {fact.remedy}"] if fact.remedy else []
        if self.rows:
            lines += ["", f"One Linear layer, rows x K -> N: milliseconds, and times as fast as {self.baseline}"]
        for row in self.rows:
            ratios = row.ratios(self.baseline)
            lines.append(f"{row.model} {row.m} x {row.k} -> {row.n}: {row.winner or 'nothing'} wins")
            lines += [f"    {name:36} {ms:9.3f} ms" + (f"  {ratios[name]:.2f}x" if name in ratios else "")
                      for name, ms in sorted(row.milliseconds.items(), key=lambda item: item[1])]
            lines += [f"    {name:36} failed: {why}" for name, why in row.failed.items()]
        if best := rates(self.rows):
            lines += ["", "Best rate, tera-operations a second: " + ", ".join(f"{name} {rate:.3g}" for name, rate in best.items())]
        return "\n".join([*lines, "", self.advice])


def check(device: torch.device, size: str, facts: Iterable[Fact] = (), baseline: torch.dtype | None = None,
          tick: Callable[[int, int], object] = lambda done, total: None) -> Check:
    """The whole check. size: quick or full. facts: of the host, listed before the machine's. baseline: the float type that models compute
    in here (None: the best that is native). tick(done, total) is called before each contender of each shape; what it raises ends the
    check."""
    native = float_dtypes(device)
    baseline = baseline or next(iter(native.values()))
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if baseline not in names:  # ComfyUI was told to compute in fp8
        baseline = next(iter(native.values()))
    found = [*facts, *machine_facts(device)]
    result = Check(device_name(device), names[baseline], found)
    result.rows = measure(device, shapes(size, device), {names[baseline]: baseline, **native}, tick)
    result.advice = advice(result.rows, result.baseline, result.device, can_compile(found))
    return result


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def machine_facts(device: torch.device) -> Iterator[Fact]:
    yield Fact("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Fact("torch", torch.__version__)
    yield triton_fact(device)
    yield compiler_fact(device)
    yield headers_fact(device)
    yield gpu_fact(device)
    yield cpu_fact(device)
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
                           timeout=COMPILER_TIMEOUT, cwd=folder)
        except (OSError, subprocess.SubprocessError) as error:
            text = (getattr(error, "stderr", None) or str(error)).strip()
            return Fact("C++ compiler", f"{' '.join(command)} fails: {text.partition(chr(10))[0]}", status, remedy)
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
        value = "none that CUDA or ROCm reaches" if device.type == "cpu" else f"{device.type}: INT8 by plain torch, not by our kernels"
        return Fact("GPU", value, OK if device.type == "cpu" else WARNING)
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if torch.version.hip:
        return Fact("GPU", f"{name}, {properties.gcnArchName}: INT8 by Triton")
    capability = (properties.major, properties.minor)
    name += ", compute capability {}.{}".format(*capability)
    if capability < INT8_MIN_CAPABILITY:
        return Fact("GPU", f"{name}: no INT8 tensor cores", WARNING, "INT8 halves the weights' memory on this card and brings no speed.")
    if capability < TRITON_MIN_CAPABILITY:
        return Fact("GPU", f"{name}: INT8 tensor cores by torch._int_mm; our Triton kernels begin with 8.0", WARNING)
    return Fact("GPU", f"{name}: INT8 tensor cores by Triton and torch._int_mm")


def cpu_features() -> set[str]:
    """Instruction sets by their names in /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11; what Windows and macOS have
        found |= {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return found


def cpu_fact(device: torch.device) -> Fact:
    found = cpu_features()
    value = f"{_cpu_name()}, {torch.get_num_threads()} threads: {', '.join(name for name in CPU_SHOWN if name in found) or 'no AVX2'}"
    if device.type == "cpu" and found.isdisjoint(CPU_INT8):
        return Fact("CPU", value, WARNING, "This CPU has no INT8 instructions (VNNI, AMX): INT8 halves the memory and brings little speed.")
    return Fact("CPU", value)


def can_compile(facts: Iterable[Fact]) -> bool:
    return all(fact.status != MISSING for fact in facts if fact.name in ("Triton", "C++ compiler", "Python headers"))


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """{contender: its best tera-operations a second}, a multiplication and an addition being two."""
    best: dict[str, float] = {}
    for row in rows:
        for name, ms in row.milliseconds.items():
            best[name] = max(best.get(name, 0.0), 2 * row.m * row.k * row.n / ms / 1e9)
    return best


def gain(rows: Iterable[Row], name: str, over: str) -> float | None:
    """How many times as fast name is as over: the geometric mean of the rows that have both."""
    ratios = [row.milliseconds[over] / row.milliseconds[name] for row in rows if {name, over} <= row.milliseconds.keys()]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def advice(rows: list[Row], baseline: str, device: str, compiles: bool) -> str:
    """A sentence, from the numbers alone. INT8 is what the nodes run by default: rotated, kernel auto."""
    int8 = gain(rows, ROTATED, baseline)
    if int8 is None:
        return f"INT8 could not be measured on {device}, so leave the model as it is: what failed stands above."
    name = "INT8 + compile" if compiles else "INT8"
    if int8 >= 1 + GAIN:
        by_model = {model: gain([row for row in rows if row.model == model], ROTATED, baseline) for model in {row.model: 0 for row in rows}}
        each = ", ".join(f"{model} {ratio:.1f}x" for model, ratio in by_model.items() if ratio)
        text = (f"{name}: expect Linear layers about {int8:.1f}x as fast as {baseline} on {device} ({each}; a step gains less: attention "
                "stays as it is)")
    elif int8 > 1 - SAME:
        text = f"{name}: Linear layers are about as fast as {baseline} on {device} ({int8:.2f}x), so use it for its half of the memory"
    else:
        text = f"INT8 is slower than {baseline} on {device} ({int8:.2f}x): {'compile without it' if compiles else 'leave it out'} " \
               "unless you need the memory"
    text += _against_floats(rows, baseline, int8) + _best_kernel(rows, baseline, int8)
    return f"{text}." if compiles else f"{text}; compile needs what is missing above."


def _against_floats(rows: list[Row], baseline: str, int8: float) -> str:
    others = {name: gain(rows, name, baseline) for row in rows for name in row.milliseconds
              if not name.startswith(INT8) and name != baseline}
    text = ""
    for name, ratio in others.items():
        if ratio / int8 > 1 + SAME:
            text += f"; {name} is faster here ({ratio:.1f}x)"
        elif ratio / int8 >= 1 - SAME:
            text += f"; {name} is as fast here ({ratio:.1f}x)"
        elif ratio > 1 + GAIN:
            text += f"; {name} reaches {ratio:.1f}x"
    return text


def _best_kernel(rows: list[Row], baseline: str, int8: float) -> str:
    """comfy_kitchen's, where kernel = auto measures slower than it. (torch._int_mm is among what auto chooses from.)"""
    kitchen = {name: gain(rows, name, baseline) for row in rows for name in row.milliseconds
               if name.startswith(f"{INT8} comfy_kitchen") and name.endswith("rotated")}
    best = max(kitchen.values(), default=0.0)
    return f"; set kernel to comfy_kitchen, which reaches {best:.1f}x" if best / int8 > 1 + GAIN else ""
