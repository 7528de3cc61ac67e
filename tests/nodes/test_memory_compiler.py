"""ComfyUI's memory compiler and compiled code, against a stand-in that counts its calls as ComfyUI 0.38 makes them."""
from __future__ import annotations

import logging
import threading
import types

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions

pytestmark = pytest.mark.comfy

CPU = torch.device("cpu")


class Recording:
    """aimdo's of one thread."""

    def __init__(self, log):
        self.log = log
        self.paused = False
        self._comfy_active = False

    def push(self):
        self.log.append("begin")

    def pop(self):
        self.log.append("end")

    def abort(self):
        self.log.append("abort")

    def pause(self, sync=False):
        self.paused = True
        self.log.append("pause")

    def resume(self, sync=False):
        self.paused = False
        self.log.append("resume")


class MemoryCompiler:
    """The functions of comfy.model_prefetch. log: what was called, in order; allocated: whether each allocation was recorded."""

    def __init__(self, args):
        self.args = args
        self.log: list[str] = []
        self.allocated: list[bool] = []
        self.MALLOC_GRAPHS: dict[int, Recording] = {}
        self.PREFETCH_QUEUES: list = []

    def _active(self):
        recording = self.MALLOC_GRAPHS.get(threading.get_ident())
        return recording if recording is not None and recording._comfy_active else None

    def malloc_graph_enabled(self, device):
        return not self.args.disable_comfy_compiler

    def malloc_graph_begin(self, device):
        if self.malloc_graph_enabled(device):
            recording = self.MALLOC_GRAPHS.setdefault(threading.get_ident(), Recording(self.log))
            recording.push()
            recording._comfy_active = True

    def malloc_graph_end(self):
        if recording := self._active():
            recording.pop()
            recording._comfy_active = False

    def cleanup_malloc_graph(self):
        recording = self.MALLOC_GRAPHS.pop(threading.get_ident(), None)
        if recording is not None and recording._comfy_active:
            recording.abort()

    def cleanup_prefetch_queues(self):
        self.cleanup_malloc_graph()
        self.PREFETCH_QUEUES.clear()
        self.log.append("clean up")

    def pause_malloc_graph(self, sync=False):
        compiler = self

        class Pause:
            def __enter__(self):
                if recording := compiler._active():
                    recording.pause()

            def __exit__(self, *_):
                if recording := compiler._active():
                    recording.resume()
        return Pause()

    def allocate(self):
        recording = self._active()
        self.allocated.append(recording is not None and not recording.paused)

    def kitchen_call(self):
        """A kernel of comfy_kitchen keeps its own buffers out of the recording."""
        with self.pause_malloc_graph():
            self.allocate()

    def is_closed(self):
        counts = {what: self.log.count(what) for what in ("begin", "end", "abort", "pause", "resume")}
        return (self._active() is None and counts["begin"] == counts["end"] + counts["abort"] and counts["pause"] == counts["resume"])


@pytest.fixture
def args(comfy, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "disable_comfy_compiler", False, raising=False)
    return comfy.cli_args.args


@pytest.fixture
def core(comfy, args, monkeypatch):
    import comfy.model_prefetch

    core = MemoryCompiler(args)
    for name in dir(core):
        if name.startswith(("malloc", "MALLOC", "cleanup", "pause", "PREFETCH")):
            monkeypatch.setattr(comfy.model_prefetch, name, getattr(core, name), raising=False)
    from int8_compile.compile.comfyui import core as comfy_core

    monkeypatch.setattr(comfy_core, "comfyui_version", lambda: "0.38.1")
    comfy_core.usable.cache_clear()
    yield core
    comfy_core.usable.cache_clear()


class Block(torch.nn.Module):
    def __init__(self, core, fails=None):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.core, self.fails = [core], fails

    @torch.compiler.disable
    def _kernel(self):
        self.core[0].kitchen_call()
        self.core[0].allocate()
        if self.fails:
            self.fails.pop()()

    def forward(self, x):
        self._kernel()
        return x + self.second(self.first(x).tanh())


class Model(torch.nn.Module):
    """Opens a recording around its blocks, as MiniMax H3 does: asked before anything of it runs."""

    def __init__(self, core, fails=None):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(core, fails) for _ in range(2))
        self.core = [core]

    def forward(self, x):
        core, = self.core
        records = core.malloc_graph_enabled(x.device)
        if records:
            core.malloc_graph_begin(x.device)
        core.PREFETCH_QUEUES.append([None])
        for block in self.blocks:
            x = block(x)
        core.PREFETCH_QUEUES.pop()
        if records:
            core.malloc_graph_end()
        return x


def run(compiled, model, x=None, passthrough=lambda error: False):
    """A call as compile.patcher makes it."""
    from int8_compile.compile.comfyui.memory_compiler import cleaned_up_after, without_comfy_compiler

    x = torch.ones(2, 8) if x is None else x
    with without_comfy_compiler(CPU, compiled.report):
        return compiled.run(model, cleaned_up_after(lambda: model(x)), filter_guards=True, passthrough=passthrough)


def make_compiled(backend="eager"):
    return CompiledModule(CompileOptions(backend=backend))


def broken_backend(gm, inputs):
    raise RuntimeError("the compiler broke")


def error(kind, *arguments):
    def fail(*_, **__):
        raise kind(*arguments)
    return fail


def test_a_compiled_call_opens_no_recording_and_its_report_says_so_once(core, args):
    model, compiled = Model(core), make_compiled()
    want = model(torch.ones(2, 8))
    assert core.log == ["begin", "pause", "resume", "pause", "resume", "end"]
    core.log.clear()
    for _ in range(3):
        torch.testing.assert_close(run(compiled, model), want)
    assert core.log == [] and args.disable_comfy_compiler is False and not compiled.report.failure
    assert len(compiled.report.notes) == 1 and compiled.report.text().count("memory compiler") == 1
    model(torch.ones(2, 8))
    assert "begin" in core.log and core.is_closed()  # the model itself is recorded as before


@pytest.mark.parametrize("users", [True, False])
def test_the_users_own_setting_is_kept(core, args, users):
    args.disable_comfy_compiler = users
    compiled = make_compiled()
    run(compiled, Model(core))
    assert args.disable_comfy_compiler is users and bool(compiled.report.notes) is not users and core.log == []


def test_an_open_recording_sees_nothing_of_a_compiled_call(core, args):
    """A preview's VAE inside a model's recording; a kitchen call inside ends core's own pause."""
    core.malloc_graph_begin(CPU)
    core.allocated.clear()
    run(make_compiled(), Model(core))
    assert core.allocated and not any(core.allocated)
    core.allocate()
    assert core.allocated[-1]
    core.malloc_graph_end()
    assert core.is_closed() and core.log.count("begin") == 1 and "abort" not in core.log and args.disable_comfy_compiler is False


def test_a_step_whose_compile_fails_goes_on_once_and_leaves_nothing_open(core, args, caplog):
    seen = []
    model = Model(core)

    def watch(module, inputs):
        seen.append((len(core.PREFETCH_QUEUES), core._active()))
    model.register_forward_pre_hook(watch)
    compiled = make_compiled(broken_backend)
    run(compiled, model)
    assert "the compiler broke" in compiled.report.failure
    # The model is not called again: its blocks run eager from the one on that cannot be compiled.
    assert seen == [(0, None)] and not core.log and core.is_closed() and args.disable_comfy_compiler is False
    # The next step, eager for good, is recorded again.
    core.log.clear()
    run(compiled, model)
    assert core.log.count("begin") == core.log.count("end") == 1 and core.is_closed()


def test_what_a_failing_model_has_begun_itself_is_aborted(core, args):
    """Some code begins a recording without asking."""
    model = Model(core)

    def call():
        core.MALLOC_GRAPHS[threading.get_ident()] = recording = Recording(core.log)
        recording.push()
        recording._comfy_active = True
        raise RuntimeError("out of luck")
    from int8_compile.compile.comfyui.memory_compiler import cleaned_up_after, without_comfy_compiler

    core.malloc_graph_begin(CPU)
    with pytest.raises(RuntimeError, match="out of luck"), without_comfy_compiler(CPU):
        make_compiled().run(model, cleaned_up_after(call), filter_guards=True, passthrough=lambda error: True)
    core.malloc_graph_end()
    assert core.is_closed() and core.log.count("abort") == 1 and not core.MALLOC_GRAPHS[threading.get_ident()]._comfy_active


@pytest.mark.parametrize("kind", ["InterruptProcessingException", "OOM_EXCEPTION", "KeyboardInterrupt"])
def test_an_interrupt_or_lack_of_memory_puts_the_setting_back(comfy, core, args, kind):
    kind = getattr(comfy.model_management, kind, KeyboardInterrupt)
    core.malloc_graph_begin(CPU)
    with pytest.raises(kind):
        run(make_compiled(), Model(core, [error(kind)]), passthrough=lambda error: True)
    core.malloc_graph_end()
    assert core.is_closed() and args.disable_comfy_compiler is False


def test_two_threads_do_not_undo_each_others_setting(core, args):
    """Two GPUs: the first to end must not switch the memory compiler on for the other."""
    both_in, first_out = threading.Barrier(2), threading.Event()
    seen, errors = [], []

    def work(last):
        from int8_compile.compile.comfyui.memory_compiler import cleaned_up_after, without_comfy_compiler

        def call():
            core.malloc_graph_begin(CPU)
            both_in.wait(30)
            if last:
                first_out.wait(30)
            seen.append((last, args.disable_comfy_compiler))
            core.malloc_graph_end()
            if not last:
                raise RuntimeError("the first thread fails")
        try:
            with without_comfy_compiler(CPU):
                cleaned_up_after(call)()
        except RuntimeError as failure:
            errors.append(failure)
        if not last:
            first_out.set()
    core.PREFETCH_QUEUES.append(["of the thread that goes on"])
    threads = [threading.Thread(target=work, args=(last,)) for last in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [(False, True), (True, True)] and len(errors) == 1
    assert args.disable_comfy_compiler is False and core.log == []
    assert core.PREFETCH_QUEUES == [["of the thread that goes on"]]


def test_nothing_happens_where_comfyui_has_no_memory_compiler(comfy):
    import comfy.model_prefetch

    if hasattr(comfy.model_prefetch, "malloc_graph_enabled"):
        pytest.skip("needs a ComfyUI without a memory compiler of its own")
    before = dict(vars(comfy.cli_args.args))
    compiled = make_compiled()
    run(compiled, Model(MemoryCompiler(types.SimpleNamespace(disable_comfy_compiler=True))))
    assert vars(comfy.cli_args.args) == before and compiled.report.notes == []


def test_kernels_are_measured_outside_a_recording(core):
    """INT8 without compile stays in the recording, which expects the same of every block."""
    from int8_compile.compile.comfyui import int8_layer
    from int8_compile.int8.kernels import autotune

    int8_layer._connect_kernels()
    core.malloc_graph_begin(CPU)
    with autotune.unrecorded():
        core.kitchen_call()
        core.allocate()
    core.allocate()
    core.malloc_graph_end()
    assert core.allocated == [False, False, True] and core.is_closed()


def test_a_calibration_is_not_recorded(core, args, flux, nodes, sample, monkeypatch):
    """Its hooks allocate what later steps do not."""
    model = type(flux.model.diffusion_model)
    forward = model.forward

    def recorded(self, x, *arguments, **named):
        core.malloc_graph_begin(x.device)
        result = forward(self, x, *arguments, **named)
        core.malloc_graph_end()
        return result
    monkeypatch.setattr(model, "forward", recorded)
    sample(nodes.INT8QuantizeModel(flux, method="auto"))
    assert core.log == ["begin", "end"] * 2 and args.disable_comfy_compiler is False  # the two steps of the sampling itself


@pytest.mark.parametrize("fails", [False, True])
def test_a_compile_node_leaves_the_memory_compiler_before_the_model_is_called(core, args, flux, nodes, sample, monkeypatch, fails):
    from int8_compile.compile.comfyui.compile_model import reports
    from toys import difference

    model = type(flux.model.diffusion_model)
    forward = model.forward

    def recorded(self, x, *arguments, **named):
        core.malloc_graph_begin(x.device)
        result = forward(self, x, *arguments, **named)
        core.malloc_graph_end()
        return result
    monkeypatch.setattr(model, "forward", recorded)
    want = sample(flux)
    core.log.clear()
    if fails:
        monkeypatch.setattr(torch, "compile", lambda function, compile=torch.compile, **_: compile(function, backend=broken_backend))
    compiled = nodes.CompileModel(flux, backend="eager")
    assert difference(sample(compiled), want) < 1e-5
    # The step that fails goes on, and the next is the model's own.
    assert core.log == (["begin", "end"] if fails else []) and args.disable_comfy_compiler is False
    report, = reports(compiled)
    assert bool(report.failure) is fails and "memory compiler" in report.text()


def test_an_error_while_cleaning_up_does_not_hide_the_first(core, comfy, monkeypatch, caplog):
    from int8_compile.compile.comfyui.memory_compiler import cleaned_up_after

    def call():
        raise RuntimeError("the model broke")
    monkeypatch.setattr(comfy.model_prefetch, "cleanup_prefetch_queues", error(RuntimeError, "aimdo memory compile error"))
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="the model broke"):
        make_compiled().run(Model(core), cleaned_up_after(call), filter_guards=True, passthrough=lambda error: False)
    assert "cleanup_prefetch_queues failed after an error" in caplog.text


def test_the_check_says_what_becomes_of_the_memory_compiler(core, args, comfy, monkeypatch):
    from int8_compile.compile.comfyui.machine_check import memory_compiler_fact

    assert memory_compiler_fact(CPU).value.startswith("on; off for a model while it runs compiled")
    args.disable_comfy_compiler = True
    assert memory_compiler_fact(CPU).value == "off"
    monkeypatch.setattr(comfy.model_prefetch, "malloc_graph_enabled", lambda: True)
    fact = memory_compiler_fact(CPU)
    assert "malloc_graph_enabled takes other arguments" in fact.value and "--disable-comfy-compiler" in fact.remedy
    monkeypatch.delattr(comfy.model_prefetch, "malloc_graph_enabled")
    assert memory_compiler_fact(CPU).value == "not in this version"
