"""What the driver is given by bound launches, call by call beside what Triton gives it; prints {promise: what is wrong}, as JSON.

In a process of its own: Triton compiles and launches as on an H100, on a driver that does nothing.
"""
from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
if "int8_compile" not in sys.modules:
    spec = importlib.util.spec_from_file_location("int8_compile", REPO / "__init__.py", submodule_search_locations=[str(REPO)])
    sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)  # not executed: the kernels need nothing of it

import torch  # noqa: E402

from benchmarks.gpu.no_driver import CPU, Driver  # noqa: E402

DRIVER = Driver()
import triton  # noqa: E402
from int8_compile.int8.kernels import bound, triton_gemm, triton_quant  # noqa: E402
from int8_compile.int8.kernels.bound import Bound  # noqa: E402
from int8_compile.int8.kernels.reference import Added, Normed  # noqa: E402
from int8_compile.int8.kernels.triton_configs import GemmConfig  # noqa: E402

CONFIGS = [GemmConfig("pointer", 16, 64, 256, 4, 3), GemmConfig("pointer", 64, 64, 128, 4, 4, 4), GemmConfig("tma", 64, 128, 128, 4, 4),
           GemmConfig("tma", 64, 128, 128, 4, 4, 2)]
if triton_gemm.has_gluon():
    from int8_compile.int8.kernels import gluon_gemm  # noqa: F401

    CONFIGS += [GemmConfig("gluon", 64, 128, 128, 4, 4), GemmConfig("gluon_specialized", 128, 128, 128, 4, 3)]
triton_gemm.card = lambda device: (90, 132)
BF16 = torch.bfloat16
PROMISES = []


def promise(function):
    PROMISES.append(function)
    return function


class Watch:
    """While it is entered, each bound launch is compared with Triton's own of the same operands. differ: those that were not equal.
    bound: how many went past Triton."""

    def __enter__(self):
        self.differ, self.bound, self.all = [], 0, 0
        self._call, self._run = Bound.__call__, triton.JITFunction.run
        runs = []

        def run(kernel, *args, **kwargs):
            runs.append(kernel)
            return self._run(kernel, *args, **kwargs)

        def call(given, grid, operands, *numbers):
            descriptors = [describe(operand) for describe, operand in zip(given._describe, operands)]
            arguments = *descriptors, *operands[len(descriptors):], *numbers
            with torch.cuda.device_of(operands[0]):
                signature = given._kernel[grid](*arguments, **given._constants).src.signature
                with DRIVER.recorded(signature) as want:
                    given._kernel[grid](*arguments, **given._constants)
            runs.clear()
            with DRIVER.recorded(signature) as got:
                self._call(given, grid, operands, *numbers)
            self.all += 1
            self.bound += not runs
            if got != want:
                self.differ.append(f"{given._kernel} {given._constants} of {[tuple(operand.shape) for operand in operands]}, {numbers}, "
                                   f"bound: {not runs}: {got[0]} is not {want[0]}"[:1500])
        Bound.__call__, triton.JITFunction.run = call, run
        return self

    def __exit__(self, *_):
        Bound.__call__, triton.JITFunction.run = self._call, self._run


def operands(m, n, k, scalar=False, bias=BF16, space=None):
    """space: int8, where the weight is put from its start."""
    w = torch.zeros(n, k, dtype=torch.int8) if space is None else space[:n * k].view(n, k)
    return (torch.zeros(m, k, dtype=torch.int8), torch.ones(m), w, torch.ones(()) if scalar else torch.ones(n, 1),
            None if bias is None else torch.zeros(n, dtype=bias))


@promise
def any_sequence_of_calls_gives_the_driver_what_triton_gives_it():
    """Sizes, types, tiles, streams and addresses in any order; weights come and go at one address."""
    chance = random.Random(0)
    space = torch.zeros(1 << 20, dtype=torch.int8)
    kept = [operands(*size, space=space) for size in ((64, 256, 512), (64, 512, 256), (1, 1, 512), (17, 40, 48), (130, 512, 256))]
    with Watch() as watch:
        for i in range(400):
            DRIVER.streams[CPU] = chance.choice((0, 0, 0, 77, 1 << 40))
            q, s, w, scale, bias = chance.choice(kept) if i % 2 else operands(
                chance.choice((1, 16, 17, 128, 300)), *chance.choice(((1, 512), (256, 512), (40, 48), (8, 33), (512, 1024))),
                chance.random() < 0.3, chance.choice((None, BF16, torch.float32)), chance.choice((None, space)))
            triton_gemm.int8_gemm(q, s, w, scale, bias, chance.choice((BF16, BF16, torch.float32)), chance.choice(CONFIGS))
        DRIVER.streams.clear()
    return watch.differ or ([] if watch.bound > watch.all * 0.6 else [f"{watch.bound} of {watch.all} were bound"])


@promise
def quantizers_too_whatever_the_rows_of_x_are():
    chance = random.Random(1)
    base = torch.zeros(1 << 20, dtype=BF16)
    with Watch() as watch:
        for i in range(200):
            m, k = chance.choice((1, 3, 64)), chance.choice((33, 48, 512, 1))
            offset, stride = chance.choice((0, 0, 8, 1, 3)), k + chance.choice((0, 0, 8, 16, 5))
            x = base.as_strided((m, k), (stride, 1), offset)
            if i % 7 == 0:
                x = base[:m * k].view(k, m).t()
            smooth = chance.choice((None, None, torch.ones(k), torch.ones(k + 1)[1:], torch.ones(k, dtype=BF16)))
            act = chance.choice(("none", "gelu_tanh")) if k % 2 else chance.choice(("none", "swiglu"))
            if smooth is not None and act == "swiglu":
                smooth = smooth[:k // 2]
            triton_quant.quant_rows(chance.choice((x, x.float())), 16 if k % 32 == 0 and chance.random() < 0.5 else 0, act, smooth)
    return watch.differ or ([] if watch.bound > watch.all * 0.2 else [f"{watch.bound} of {watch.all} were bound"])


@promise
def passes_that_norm_before_or_add_after_too():
    """Rows, and how many of them share a row of the modulation, change from call to call."""
    with Watch() as watch:
        for m, images in ((64, 1), (40, 1), (64, 2), (128, 2), (1, 1)):
            modulation = torch.zeros(images, 6 * 512, dtype=BF16).chunk(6, -1)
            x = torch.zeros(m, 512, dtype=BF16)
            given = Normed(torch.zeros(m), torch.ones(m), None, None, modulation[1], modulation[0], True)
            triton_quant.norm_quant_rows(x, given)
            triton_quant.norm_quant_rows(x, Normed(rstd=torch.ones(m), weight=torch.ones(512)), 256)
            for config in CONFIGS:
                triton_gemm.int8_gemm(*operands(m, 512, 512), BF16, config, Added(x, modulation[2]))
    apart = [str(config) for _, config in triton_gemm._ADD_APART]
    return watch.differ or apart or ([] if watch.bound > watch.all * 0.4 else [f"{watch.bound} of {watch.all} were bound"])


@promise
def a_call_like_the_one_before_asks_triton_nothing_and_encodes_nothing():
    """Triton 3.7 and later encode descriptors themselves."""
    from triton.backends.nvidia import driver

    given, wrong = operands(64, 256, 512), []
    encoded = getattr(driver, "_BASE_ARGS_FORMAT", "") != bound.ARGUMENTS
    for config in CONFIGS:
        for _ in range(2):
            triton_gemm.int8_gemm(*given, BF16, config)
        maps, run = DRIVER.maps(), triton.JITFunction.run
        try:
            triton.JITFunction.run = None
            y = [triton_gemm.int8_gemm(*given, BF16, config) for _ in range(3)]
        finally:
            triton.JITFunction.run = run
        if (DRIVER.maps() != maps and not encoded) or len(y) != 3:
            wrong.append(f"{config}: {DRIVER.maps() - maps} descriptors")
    return wrong


@promise
def profilers_hear_of_every_launch_while_they_listen():
    given, heard = operands(64, 256, 512), []

    def listen(metadata):
        heard.append(metadata.get()["name"])
    wrong = []
    for config in CONFIGS:
        triton_gemm.int8_gemm(*given, BF16, config)
        for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
            heard.clear()
            hook.add(listen)
            before = DRIVER.launches()
            triton_gemm.int8_gemm(*given, BF16, config)
            launches = DRIVER.launches() - before
            hook.remove(listen)
            triton_gemm.int8_gemm(*given, BF16, config)
            if len(heard) != launches:
                wrong.append(f"{config}: {heard} of {launches}")
    return wrong


class On:
    """A tensor of the CPU that says that it is on a card."""

    is_cuda = True

    def __init__(self, tensor, device):
        self.tensor, self.device = tensor, device

    def get_device(self):
        return self.device

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@promise
def each_device_has_its_own_kernel_and_stream_and_the_current_one_stays():
    wrong, functions = [], set()
    DRIVER.device, DRIVER.streams = 0, {0: 100, 1: 200}
    asked, current_stream = [], DRIVER.triton.get_current_stream
    DRIVER.triton.get_current_stream = lambda device: asked.append((device, DRIVER.device)) or current_stream(device)
    try:
        config = CONFIGS[2]
        for device in (0, 1, 0, 1):
            q, s, w, scale, bias = operands(64, 256, 512)
            y = torch.zeros(64, 256, dtype=BF16)
            given = [On(t, device) for t in (q, w, s, scale, bias, y)]
            key = torch.device("cuda", device), config, 256, 512, (q.dtype, s.dtype, w.dtype, scale.dtype, bias.dtype, BF16), False
            made = triton_gemm.launch(*key).bound
            with Watch() as watch:
                made((2, 1, 1), tuple(given), 64, 256, 512)
                made((2, 1, 1), tuple(given), 64, 256, 512)
            with DRIVER.recorded({}) as got:
                made((2, 1, 1), tuple(given), 64, 256, 512)
            functions.add((device, got[0].function))
            wrong += watch.differ
            if not watch.bound or got[0].stream != 100 * (device + 1) or DRIVER.device != 0 or asked[-1] != (device, device):
                wrong.append(f"device {device}: {watch.bound}, {got}, {DRIVER.device}, {asked[-1]}")
        if len(functions) != 2 or len({function for _, function in functions}) != 2:
            wrong.append(f"kernels: {functions}")
        # A mistake: one operand is the CPU's, another another card's. Triton, which looks at addresses itself, is given them.
        for place in (CPU, 1):
            stray = list(given)
            made = triton_gemm.launch(torch.device("cuda", 0), *key[1:]).bound
            stray = [On(operand.tensor, 0) for operand in given]
            stray[3].device = place
            with Watch() as watch:
                made((2, 1, 1), tuple(stray), 64, 256, 512)
            if watch.bound:
                wrong.append(f"an operand of {place} went past Triton")
    finally:
        DRIVER.device, DRIVER.streams, DRIVER.triton.get_current_stream = CPU, {}, current_stream
    return wrong


@promise
def another_triton_launches_by_way_of_its_own_functions():
    """Its generated launcher takes other arguments; or its compiled kernels are other objects; or a launch is refused."""
    wrong, n = [], 256

    def launched(what, bound_ones):
        nonlocal n
        n += 16  # shapes of its own
        with Watch() as watch:
            for config in CONFIGS:
                for _ in range(3):
                    triton_gemm.int8_gemm(*operands(64, n, 512), BF16, config)
        wrong.extend(watch.differ)
        if bool(watch.bound) != bound_ones:
            wrong.append(f"{what}: {watch.bound} of {watch.all} were bound")
    ours = bound.ARGUMENTS
    bound.ARGUMENTS = "another"
    launched("run", True)
    bound.ARGUMENTS = ours
    generated = bound.generated_launcher

    def refuses(*args):
        raise TypeError("function takes exactly 3 arguments")
    bound.generated_launcher = lambda run, count: (refuses, [lambda descriptor: [descriptor]] * count)
    launched("refused", False)
    bound.generated_launcher = lambda run, count: run.no_such_attribute
    launched("other objects", False)
    bound.generated_launcher = generated
    return wrong


@promise
def descriptors_are_not_kept_without_end():
    config, wrong = CONFIGS[2], []
    limit, bound.MAX_DESCRIPTORS = bound.MAX_DESCRIPTORS, 8
    try:
        with Watch() as watch:
            for rows in range(1, 40):
                triton_gemm.int8_gemm(*operands(rows, 256, 512), BF16, config)
        kept = max(len(each.bound._descriptors) for each in [triton_gemm.launch(
            torch.device("cpu"), config, 256, 512, (torch.int8, torch.float32, torch.int8, torch.float32, BF16, BF16), False)])
        wrong += watch.differ + ([] if 0 < kept <= 8 else [f"{kept} are kept"])
    finally:
        bound.MAX_DESCRIPTORS = limit
    return wrong


if __name__ == "__main__":
    print(json.dumps({function.__name__: function()[:3] for function in PROMISES}))
