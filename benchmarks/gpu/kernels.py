"""Every kernel that ships against float64: fresh random inputs, odd shapes, outliers; outputs are born as NaN, between canaries.

Every torch.empty of the wrappers is served from a larger buffer: its content is NaN (0xFF bytes), what lies around it is known and looked
at afterwards. Operands lie in such buffers too, so that what a kernel reads past an end is NaN or far off.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).absolute().parent.parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.gpu.context import Context  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

MARGIN = 4096  # bytes on each side, a multiple of every alignment
CANARY = 0xA5
SHARES = 16  # processes
FUSED = "torch._int_mm fused"
KINDS = ("gaussian", "outliers", "zero row")
# (M, K, N); the first are real, the others odd. Without their own K and N of 16: no vectors to load or store.
SHAPES = ((4608, 3072, 3072), (1000, 12288, 640), (1, 3072, 18432), (17, 5120, 1280), (129, 1000, 72), (5, 256, 33), (70, 320, 100),
          (3, 48, 16), (1, 17, 1), (300, 4104, 257))
DRY_SHAPES = ((5, 256, 33), (70, 96, 48), (1, 17, 1))
CHEAP_SHAPES = ((5, 64, 33),)
# (M, K, group)
ROWS = ((4608, 3072, 256), (512, 15360, 256), (37, 12288, 256), (3, 13824, 256), (2, 28672, 256), (2, 40000, 64), (129, 1000, 0),
        (1, 1, 0), (33, 320, 64), (7, 48, 16), (3, 255, 0), (3, 127, 0), (5, 8960, 256), (300, 640, 64))
DRY_ROWS = ((5, 256, 256), (3, 320, 64), (7, 100, 0))
CHEAP_ROWS = ((5, 256, 256),)
SIZES = {"full": (SHAPES, ROWS), "small": (SHAPES[5:8], ROWS[6:12]), "dry": (DRY_SHAPES, DRY_ROWS), "cheap": (CHEAP_SHAPES, CHEAP_ROWS)}
# Steps of a quantized value from the exact one: half by rounding; tf32 in the rotation adds a little (triton_quant.py).
MAX_STEPS = {"tf32": 0.8, "exact": 0.502}
# Of bf16 and fp16 outputs, relative: the rounding, once.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -10}


class Guarded(TorchDispatchMode):
    """Serves torch.empty from buffers with margins, filled with NaN."""

    def __init__(self):
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.ops.aten.empty.memory_format:
            return function(*args, **kwargs)
        return self.make(tuple(args[0]), kwargs.get("dtype") or torch.get_default_dtype(), kwargs.get("device") or torch.device("cpu"))

    def make(self, shape: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        with _disable_current_modes():
            buffer = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=device)
            inside = buffer[MARGIN:MARGIN + size]
            inside.fill_(0xFF)
            self.buffers.append(buffer)
            return inside.view(dtype).view(shape)

    def written_outside(self) -> int:
        """Bytes of the margins that have changed."""
        return sum(int((margin != CANARY).sum()) for buffer in self.buffers for margin in (buffer[:MARGIN], buffer[-MARGIN:]))


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on device with NaN (for integers -1) on both sides of it."""
    size = tensor.numel() * tensor.element_size()
    buffer = torch.full((size + 2 * MARGIN,), 0xFF, dtype=torch.uint8, device=device)
    place = buffer[MARGIN:MARGIN + size].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor)


def inputs(m: int, k: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(m, k, generator=generator, device=generator.device)
    if kind == "outliers":
        x[:, torch.randint(k, (4,), generator=generator, device=generator.device)] *= 100
    if kind == "zero row":
        x[m // 2] = 0
    return x


def check_gemm(config, shape, dtype, scalar: bool, bias: bool, split: int, generator, oracle: str | None = None) -> dict:
    """config: of a tile; None for torch._int_mm, FUSED for the same with its epilogue in one pass. oracle: the device of the float64
    products, the operands' own if None."""
    from int8_compile.int8.kernels import torch_mm, triton_gemm

    m, k, n = shape
    device = generator.device

    def integers(rows):
        return torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=generator, device=device)

    def positive(*size):
        return torch.rand(*size, generator=generator, device=device) + 0.1
    q, w = placed(integers(m), device), placed(integers(n), device)
    s, ws = placed(positive(m) / k ** 0.5 / 127, device), placed(positive(1) if scalar else positive(n, 1), device)
    b = placed(torch.randn(n, generator=generator, device=device).to(dtype), device) if bias else None
    guard = Guarded()
    with guard:
        if config is None:
            y = torch_mm.int8_gemm(q, s, w, ws, b, dtype)
        elif config == FUSED:
            y = triton_gemm.int_mm(q, s, w, ws, b, dtype)
        else:
            y = triton_gemm.int8_gemm(q, s, w, ws, b, dtype, config._replace(split_k=split))
    q, s, w, ws, b, y = (None if t is None else t.to(oracle or device) for t in (q, s, w, ws, b, y))
    want = (q.double() @ w.double().t()) * s.double()[:, None] * ws.double().reshape(1, -1)
    size = want.abs()
    if b is not None:
        want, size = want + b.double(), size + b.double().abs()
    error = ((y.double() - want).abs() / (size * EPSILON[dtype] + 1e-6)).max().item()
    return {"error": error, "outside": guard.written_outside(), "nan": int(y.isnan().sum()),
            "ok": error <= 1 and not guard.written_outside() and y.shape == want.shape and y.dtype == dtype}


def check_quantizer(m: int, k: int, group: int, act: str, smooth: bool, dtype: torch.dtype, kind: str, generator,
                    oracle: str | None = None) -> dict:
    from int8_compile.int8.hadamard import rotate
    from int8_compile.int8.kernels import triton_quant
    from int8_compile.int8.kernels.reference import MIN_QUANT_SCALE, QMAX

    device = generator.device
    x = placed(inputs(m, 2 * k if act == "swiglu" else k, kind, generator).to(dtype), device)
    scale = placed(torch.rand(k, generator=generator, device=device) + 0.5, device) if smooth else None
    guard = Guarded()
    triton_quant.quant_rows(x[:0], group, act, scale)  # makes the cached factors: not this call's outputs
    with guard:
        q, s = triton_quant.quant_rows(x, group, act, scale)
    tf32 = bool(group) and triton_quant.rotation_precision(x) == "tf32"
    x, scale, q, s = (None if t is None else t.to(oracle or device) for t in (x, scale, q, s))
    exact = x.double()
    if act == "gelu_tanh":
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
    if act == "swiglu":
        exact = torch.nn.functional.silu(exact[:, :k]) * exact[:, k:]
    exact = rotate(exact if scale is None else exact * scale.double(), group)
    steps = ((q.double() * s.double()[:, None] - exact).abs() / s.double()[:, None]).max().item()
    want = (exact.abs().amax(1) / QMAX).clamp_min(MIN_QUANT_SCALE)
    scale_error = ((s.double() - want).abs() / want).max().item()
    limit = MAX_STEPS["tf32" if tf32 else "exact"]
    return {"steps": steps, "scale_error": scale_error, "outside": guard.written_outside(), "nan": int(s.isnan().sum()),
            "ok": steps <= limit and scale_error < (2e-3 if tf32 else 2e-5) and not guard.written_outside() and int(q.abs().max()) <= 127}


def checks(device: torch.device, gemm_shapes, quantizer_rows, seed: int, dry: bool = False, oracle: str | None = None) -> dict:
    """{kernel: function that checks it in all shapes and types, and gives the worst of each finding}"""
    from int8_compile.int8.kernels import triton_configs, triton_gemm
    from int8_compile.int8.kernels.reference import ACTIVATIONS

    generator = torch.Generator(device).manual_seed(seed)
    archs = [triton_gemm.card(device)[0]] if device.type == "cuda" else list(triton_configs.ARCHITECTURES)
    gluon = triton_gemm.has_gluon()
    configs = list(dict.fromkeys(c for a in archs for tma in (True, False) for c in triton_configs.tiles(a, tma, gluon=gluon)))
    if dry:
        configs = [c for i, c in enumerate(configs) if i % 6 == 0 or (c.kernel == "tma" and i % 3 == 0)]
    # The interpreter cuts bits off where it stores half precision, which a GPU rounds.
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)

    def gemm(number, config):
        rows = [check_gemm(config, shape, dtypes[(i + number) % len(dtypes)], (i + number) % 3 == 0, (i + number) % 2 == 0, split,
                           generator, oracle)
                for i, shape in enumerate(gemm_shapes) for split in ((1, 4) if isinstance(config, tuple) else (1,))]
        return {"checks": len(rows), **worst(rows)}

    def quantizer(act, smooth):
        rows = [check_quantizer(m, k, group, act, smooth, dtype, KINDS[i % len(KINDS)], generator, oracle)
                for i, (m, k, group) in enumerate(quantizer_rows) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        return {"checks": len(rows), **worst(rows)}
    products = enumerate((None, FUSED, *configs))
    found = {str(config or "torch._int_mm"): functools.partial(gemm, number, config) for number, config in products}
    return found | {f"quantizer {act}{' smooth' * smooth}": functools.partial(quantizer, act, smooth)
                    for act in ACTIVATIONS for smooth in (False, True)}


def worst(rows: list[dict]) -> dict:
    return {key: (all if key == "ok" else max)(row[key] for row in rows) for key in rows[0]}


def run(context: Context) -> None:
    """The step. On a GPU several processes share the kernels: each variant is compiled first, by one CPU core."""
    load_pack()
    device = torch.device(context.device)
    seed = torch.seed() & 0x7FFFFFFF
    context.add(seed=seed)
    if not context.cheap:
        share_out(context, seed, "dry" if context.dry else "full", 2 if context.dry else SHARES)
        return
    with interpreter_of_today():
        for name, check in checks(device, *SIZES["cheap"], seed, dry=True).items():
            context.add(kernel=name, **check())


def share_out(context: Context, seed: int, size: str, shares: int, tool: tuple[str, ...] = (), env: dict | None = None) -> None:
    """The rows of all shares, from processes run by tool. A kernel that one died of is named, since its row is missing."""
    arguments = [*tool, sys.executable, __file__, "--device", context.device, "--size", size, "--seed", str(seed)]
    running = [subprocess.Popen([*arguments, "--share", str(i), "--shares", str(shares)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, **(env or {})}) for i in range(shares)]
    expected = list(checks(torch.device(context.device), (), (), seed, size == "dry"))
    for number, process in enumerate(running):
        try:
            output, _ = process.communicate(timeout=max(5, context.left()))
            ended = f"it ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            ended = "no time left"
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"kernel"')]
        said = [line for line in output.splitlines() if line.startswith("=========")] or output.splitlines()
        for row in rows:
            context.add(**row)
        for name in set(expected[number::shares]) - {row["kernel"] for row in rows}:
            context.add(kernel=name, ok=False, why=ended)
        if process.returncode or tool:
            context.add(share=number, ok=process.returncode == 0, ended=ended, last=said[-1:] if process.returncode == 0 else said[-25:])


def memcheck(context: Context) -> None:
    """The step: once more, in small shapes, under compute-sanitizer, without torch's caching allocator, so that each tensor is an
    allocation of its own. The float64 products run on the CPU."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None or context.device != "cuda":
        context.add(kernel="memcheck", skipped="compute-sanitizer was not found" if context.device == "cuda" else "there is no GPU")
        return
    tool = (sanitizer, "--tool", "memcheck", "--error-exitcode", "9")
    load_pack()
    share_out(context, torch.seed() & 0x7FFFFFFF, "small", 4, tool, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


@contextlib.contextmanager
def interpreter_of_today():
    """Triton 3.6's interpreter makes range() of arrays with one element, which numpy >= 2.4 no longer converts to a number. This is what
    Triton 3.7 does instead: its line, set beside the others that the interpreter replaces for the length of a launch."""
    import triton

    if not os.environ.get("TRITON_INTERPRET") or not triton.__version__.startswith("3.6."):
        yield
        return
    from unittest import mock

    from triton.runtime import interpreter
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
    with mock.patch.object(interpreter, "_patch_lang_tensor", patched):
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    for number in ("seed", "share", "shares"):
        parser.add_argument(f"--{number}", type=int, required=True)
    options = parser.parse_args()
    load_pack()
    with interpreter_of_today():
        mine = checks(torch.device(options.device), *SIZES[options.size], options.seed, options.size == "dry",
                      "cpu" if options.size == "small" else None)
        for name in list(mine)[options.share::options.shares]:
            print(json.dumps({"kernel": name, **mine[name]()}), flush=True)
