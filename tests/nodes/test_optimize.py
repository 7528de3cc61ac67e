"""Optimize Model: measured once, kept, and never worse than the model as it came."""
from __future__ import annotations

import contextlib
import copy
import json
import threading
import time

import pytest
import torch
from int8_compile.compile.gain import BESIDE, COMPILED, EAGER, KEPT, MOST_KEPT, WITHOUT, Call, CallTimes
from toys import difference

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(4)]
# Not timed: what is chosen must not depend on how busy the machine is.
FASTER, SLOWER = (lambda *_: (1.0, 0.5)), (lambda *_: (0.5, 1.0))
SIZE = "latent 16x16, batch 1, prompt length 20"


class Node:
    """In the place of NodeStatus: the last report."""

    def __call__(self, report, doing="", progress=None):
        self.report = report

    @property
    def details(self) -> dict:
        return json.loads(json.dumps(self.report.to_dict()))["optimize"]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Decisions are kept, in folders of the test's own. Gives the folder."""
    monkeypatch.setenv("INT8_COMPILE_CACHE", "1")
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path / "key" / "cache.key"))
    restart()
    yield tmp_path / "cache" / "decisions"
    restart()


@pytest.fixture
def times(monkeypatch):
    """times(FASTER): what a layer measures in float and as INT8."""
    from int8_compile.compile.comfyui import int8_plan
    return lambda measured: monkeypatch.setattr(int8_plan, "linear_times", measured)


@pytest.fixture
def untimed(monkeypatch):
    """Real steps are not: what is decided must not depend on how busy the machine is."""
    monkeypatch.setattr(CallTimes, "end", lambda *_: None)


@pytest.fixture
def optimize(monkeypatch):
    """optimize(model, goal) -> (model, Node), with a compiler that takes no time."""
    from int8_compile.compile.comfyui import optimize as module

    compiled = module._chain
    monkeypatch.setattr(module, "_chain", lambda *args: [
        {**mode, "config": {**mode["config"], "backend": "eager"}} if mode["name"] == "compile" else mode for mode in compiled(*args)])

    def optimize(model, goal="balanced"):
        node = Node()
        return module.optimize(model, goal, False, node), node
    return optimize


def restart():
    """What another process knows: what is on disk."""
    from int8_compile.compile.comfyui import decisions, optimize
    decisions._KNOWN.clear()
    decisions._PASSING.clear()
    optimize._COMPARISONS.clear()


def names(model) -> list:
    from int8_compile.compile.comfyui.mode_records import describe
    return [mode if isinstance(mode, str) else mode["name"] for mode in json.loads(describe(model).splitlines()[0])]


def test_layers_are_decided_at_the_first_sampling_and_the_next_start_decides_nothing(load, sample, optimize, times, monkeypatch, kept):
    from int8_compile.compile.comfyui import int8_calibrate
    from int8_compile.compile.comfyui.mode_records import describe

    times(FASTER)
    model = load()
    eager = sample(model)
    first, node = optimize(model)
    assert "measures at the first sampling" in node.report.status() and not first.object_patches
    image = sample(first)
    assert 1e-6 < difference(image, eager) < 0.05 and torch.equal(sample(model), eager)
    assert node.details["int8_layers"] == node.details["layers"] == 29 and not node.details["known"]
    assert len(node.report.table()) <= 6 and "29 of 29 layers" in node.report.status()
    assert all(shape["float_ms"] == 1.0 and shape["least_db"] > 30 for shape in node.details["shapes"])
    assert [path.stat().st_mode & 0o077 for path in kept.iterdir()] == [0]

    restart()
    monkeypatch.setattr(int8_calibrate, "collect", None)  # another look would fail
    again, node = optimize(load())
    assert node.details["known"] and node.details["int8_layers"] == 29 and len(again.object_patches) == 29
    assert torch.equal(sample(again), image)
    assert describe(again).splitlines()[0] == describe(first).splitlines()[0]


def test_the_chain_that_is_shown_can_be_given_to_apply_modes(flux, nodes, sample, optimize, times):
    from int8_compile.compile.comfyui.mode_records import describe

    times(FASTER)
    first, _ = optimize(flux)
    image = sample(first)
    assert names(first) == ["convrot", "int8", "compile"]
    assert torch.equal(sample(nodes.ApplyModes(flux, modes=describe(first).splitlines()[0])), image)


def test_what_was_not_timed_for_want_of_memory_is_decided_anew_at_the_next_start(load, sample, optimize, times, kept):
    def short(*_):
        raise torch.OutOfMemoryError("out of memory")

    times(short)
    model = load()
    first, node = optimize(model)
    assert torch.equal(sample(first), sample(model))
    assert node.details["int8_layers"] == 0 and not (kept.exists() and list(kept.iterdir()))
    again, node = optimize(model)
    Steps(optimizer_of(again), compiled=0.5, eager=0.8).run(2 * KEPT)
    assert node.report.short()[-1] == "decided, until ComfyUI ends: memory was short" and not (kept.exists() and list(kept.iterdir()))
    restart()
    times(FASTER)
    again, node = optimize(load())
    sample(again)
    assert node.details["int8_layers"] == 29 and list(kept.iterdir())


def test_layers_that_are_no_faster_as_int8_stay_as_they_are(flux, sample, optimize, times):
    times(SLOWER)
    eager = sample(flux)
    model, node = optimize(flux)
    assert difference(sample(model), eager) < 1e-3
    assert node.details["int8_layers"] == 0 and "INT8 pays for no layer" in node.report.status()
    assert all("as they were" in line for line in node.report.table()[:2])
    assert names(optimize(flux)[0]) == ["compile"]


def test_smallest_takes_int8_wherever_it_is_exact_enough(flux, sample, optimize, times):
    times(SLOWER)
    model, node = optimize(flux, "smallest")
    sample(model)
    assert node.details["int8_layers"] == 29 and model.model_size() < 0.5 * flux.model_size()
    assert " MB" in node.report.text().splitlines()[0]


def test_a_layer_below_the_goals_quality_stays_as_it_is(flux, sample, optimize, times):
    """One channel of a block's input a thousand times larger: nothing else is left of its INT8."""
    times(FASTER)
    block = flux.model.diffusion_model.double_blocks[0]
    block.img_mlp[0].weight[:, 5] *= 1e-4
    block.img_mod.lin.bias.reshape(6, -1)[4, 5] += 1e4
    model, node = optimize(flux, "smallest")
    sample(model)
    assert node.details["int8_layers"] < 29
    assert "diffusion_model.double_blocks.0.img_mlp.0" not in model.object_patches


def test_exact_compiles_only(flux, sample, optimize):
    eager = sample(flux)
    model, node = optimize(flux, "exact")
    assert difference(sample(model), eager) < 1e-3 and names(model) == ["compile"] and "INT8" not in node.report.text()


def test_a_model_that_is_int8_already_is_compiled_only(flux, nodes, optimize):
    model, node = optimize(nodes.INT8QuantizeModel(flux, method="rowwise"))
    assert names(model) == ["int8", "compile"] and "INT8 already" in node.report.status()


def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(flux, nodes, sample):
    eager = sample(flux)
    with pytest.raises(ValueError, match="Optimize Model: this model is compiled already"):
        nodes.OptimizeModel(nodes.CompileModel(flux, backend="aot_eager"))
    with pytest.raises(ValueError, match=r"unknown goal 'best'\. Choose one of: fastest, balanced, smallest, exact"):
        nodes.OptimizeModel(flux, goal="best")
    with pytest.raises(ValueError, match="background is true or false"):
        nodes.OptimizeModel(flux, background="yes")
    assert not flux.object_patches and not flux.wrappers and torch.equal(sample(flux), eager)


def test_another_checkpoint_of_the_same_structure_decides_anew(load, sample, optimize, times):
    times(FASTER)
    sample(optimize(load())[0])
    other = load()
    other.model.diffusion_model.double_blocks[0].img_mlp[0].weight.mul_(1.5)
    assert not optimize(other)[1].details["known"] and optimize(load())[1].details["known"]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-3]),
    lambda path: path.write_bytes(path.read_bytes().replace(b"true", b"null")), lambda path: path.rename(path.with_name("b.json")),
    lambda path: path.chmod(0o666), lambda path: path.write_bytes(bytes(2 << 20))])
def test_a_file_that_is_damaged_or_that_others_can_write_is_as_good_as_none(comfy, kept, damage):
    from int8_compile.compile.comfyui import decisions

    decision = decisions.Decision(chosen=(("a", "convrot"), ("b", "float")), compiled=True, times=(("64x64", 3.0, 2.0, 1.0),))
    decisions.write("a", decision)
    restart()
    assert decisions.read("a") == decision
    restart()
    damage(kept / "a.json")
    assert decisions.read("a") is None and decisions.read("b") is None
    decisions.write("a", decision)
    restart()
    assert decisions.read("a") == decision


def test_files_are_bounded_and_cleared_with_the_compile_cache(kept, nodes, monkeypatch):
    from int8_compile.compile.comfyui import decisions

    monkeypatch.setattr(decisions, "MOST_FILES", 3)
    for number in range(5):
        decisions.write(f"{number:016x}", decisions.Decision(compiled=True))
    assert len(list(kept.glob("*.json"))) == 3 and len(decisions._KNOWN) == 3
    assert "3 models" in nodes.ClearCompileCache() and not list(kept.glob("*.json"))


def test_nothing_is_kept_where_the_cache_is_off(flux, sample, optimize, times, untimed, kept, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE", "0")
    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    Steps(optimizer_of(model), compiled=0.5, eager=0.8).run(2 * KEPT)
    assert node.report.short()[-1] == "decided, until ComfyUI ends: the compile cache is off"
    assert not kept.exists() and optimize(flux)[1].details["known"], "for as long as this process runs"


def test_a_decision_that_cannot_be_written_is_not_called_kept(flux, optimize, kept):
    kept.parent.mkdir()
    kept.write_text("no folder")
    model, node = optimize(flux, "exact")
    Steps(optimizer_of(model), compiled=0.5, eager=0.8).run(2 * KEPT)
    assert node.report.short()[-1] == "decided, until ComfyUI ends: it could not be written"
    kept.unlink()
    optimizer_of(model)._keep()
    assert [path.suffix for path in kept.iterdir()] == [".json"]


IN_TURNS = [False, True, True, False, True, False]  # which of 2 * KEPT steps are uncompiled, of the first image and others
NEXT_IN_TURNS = [not each for each in IN_TURNS]  # of the second


def add(times: CallTimes, size: str, kind: str, seconds: float) -> None:
    times._add(Call(times.image, size, times.weights, kind, 5), seconds)


class Steps:
    """A judge's view of a model: steps of chosen times."""

    def __init__(self, optimizer, size=SIZE, without: float | None = None, beside: float | None = None, **seconds):
        """without, beside: of two steps of the model as it came, and of uncompiled ones in the same moments, before."""
        self.optimizer = optimizer
        self.size = size
        self.seconds = seconds
        self.times = CallTimes()
        for kind, known in ((WITHOUT, without), (BESIDE, beside)) * 2:
            if known:
                self.add(kind, known)

    def add(self, kind: str, seconds: float) -> None:
        add(self.times, self.size, kind, seconds)

    def run(self, count: int) -> list[bool]:
        """Whether each ran eager."""
        eager = []
        for _ in range(count):
            eager.append(self.optimizer.runs_eager(self.times, self.size))
            kind = EAGER if eager[-1] else COMPILED
            self.add(kind, self.seconds[kind])
            self.optimizer.timed(self.times, self.size, kind)
        return eager


def optimizer_of(model):
    (judge,) = (wrapper.judge for group in model.wrappers["apply_model"].values() for wrapper in group)
    return judge


def test_compiling_stays_on_where_it_is_faster_and_nothing_more_is_measured(flux, optimize):
    model, node = optimize(flux, "exact")
    steps = Steps(optimizer_of(model), compiled=0.5, eager=1.0)
    assert steps.run(20) == [*IN_TURNS, *[False] * 14]
    assert node.report.text().startswith("2.00x: 1.00 -> 0.500 s a step") and node.details["compiled"] is True
    restart()
    again, node = optimize(flux, "exact")
    assert Steps(optimizer_of(again), compiled=0.5, eager=1.0).run(6) == [False] * 6
    assert node.report.text().startswith("2.00x: 1.00 -> 0.500 s a step")


def test_short_steps_are_timed_more_often(flux, optimize):
    """One disturbed step of a few milliseconds is soon a third of three."""
    model, node = optimize(flux, "exact")
    eager = Steps(optimizer_of(model), compiled=0.01, eager=0.02).run(2 * MOST_KEPT + 4)
    assert sum(eager) == MOST_KEPT and sum(eager[:MOST_KEPT]) in (MOST_KEPT // 2, MOST_KEPT // 2 + 1) and not any(eager[2 * MOST_KEPT:])
    assert node.details["compiled"] is True


@pytest.mark.parametrize("busy", [2.0, 0.5])
def test_the_gain_is_of_the_minutes_in_which_compiling_was_timed(flux, sample, optimize, times, untimed, busy):
    """When the model was timed as it came the machine had other work, or none: its uncompiled INT8 steps tell."""
    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    steps = Steps(optimizer_of(model), without=busy * 1.0, beside=busy * 0.8, compiled=0.5, eager=0.8)
    assert steps.run(2 * KEPT + 1) == [*NEXT_IN_TURNS, False]
    assert node.report.short()[0].startswith("2.00x: 1.00 -> 0.500 s a step;") and node.details["int8_layers"]


def steps_of(optimizer, times, weights, count, size=SIZE, compiled=0.5, eager=0.8):
    """Steps with a LoRA."""
    times.of_weights(weights)
    for _ in range(count):
        kind = EAGER if optimizer.runs_eager(times, size) else COMPILED
        add(times, size, kind, eager if kind == EAGER else compiled)
        optimizer.timed(times, size, kind)


@pytest.mark.parametrize("what", ["LoRA in turns", "new LoRA", "LoRA before", "new size", "two models in turns"])
@pytest.mark.parametrize("speed", [1.0, 0.02])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_images_of_few_steps_decide_too(flux, optimize, what, speed, steps):
    """Each has another LoRA, behind the node or before it (the node then runs again), or another size, on a machine with other work: what
    is compared is a step of each kind with the same. Of two models that share a wrapper each call is of other weights than the last."""
    optimizer = optimizer_of(optimize(flux, "exact")[0])
    times = CallTimes()
    for image in range(30):
        if what == "LoRA before":
            optimizer, times = optimizer_of(optimize(flux, "exact")[0]), CallTimes()
        if optimizer.decision.compiled is not None:
            break
        weights = image % 2 if what == "LoRA in turns" else image if what == "new LoRA" else "same"
        times.new_image()
        for step in range(2 * steps if what == "two models in turns" else steps):
            steps_of(optimizer, times, step % 2 if what == "two models in turns" else weights, 1,
                     f"{image} rows" if what == "new size" else SIZE, 0.5 * speed * (1 + image % 3), 0.8 * speed * (1 + image % 3))
    assert optimizer.decision.compiled is True


@pytest.mark.parametrize("steps", range(2, 12))
@pytest.mark.parametrize("speeds", [(1.0, 2.0), (2.0, 1.0), (1.0, 2.0, 2.0), (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("compiled", [0.55, 1.8])
def test_a_machine_that_is_faster_in_one_image_than_in_the_next_decides_nothing(flux, optimize, steps, speeds, compiled):
    judge, times = optimizer_of(optimize(flux, "exact")[0]), CallTimes()
    images = 0
    while judge.decision.compiled is None:
        times.new_image()
        speed = speeds[images % len(speeds)]
        steps_of(judge, times, "same", steps, eager=0.02 * speed, compiled=0.02 * speed * compiled)
        images += 1
        assert images <= MOST_KEPT + 2
    assert judge.decision.compiled == (compiled < 1)
    _, _, eager, faster_or_not = judge.decision.times[0]
    assert faster_or_not / eager == pytest.approx(compiled)


def timer_of(model):
    ((timer,),) = model.wrappers["apply_model"].values()
    return timer


def test_each_sampling_is_an_image(flux, sample, optimize):
    (model, _), (other, _) = optimize(flux, "exact"), optimize(flux, "exact")
    images = []
    for patcher in (model, other, model.clone(), model):
        sample(patcher)
        images.append(timer_of(model).times.image)
    assert images[0] == images[1] and len(set(images)) == 3


def test_a_deep_copy_of_a_models_options_goes_on_with_its_times(flux, optimize):
    """Other packs make one for each image, or each step."""
    model, _ = optimize(flux, "exact")
    copied = copy.deepcopy((model.wrappers, model.callbacks))
    ((timer,),) = copied[0]["apply_model"].values()
    assert timer is timer_of(model)
    assert timer in [call.__self__ for calls in copied[1]["on_pre_run"].values() for call in calls if hasattr(call, "__self__")]


def cached(executor, x, timestep, *args, **kwargs):
    """The DIFFUSION_MODEL wrapper of a cache node, which leaves out each second step of a schedule."""
    if cached.steps.setdefault(float(timestep.flatten()[0]), len(cached.steps)) % 2:
        return torch.zeros_like(x)
    if cached.judge.is_eager:
        time.sleep(0.2)
    return executor(x, timestep, *args, **kwargs)


def test_steps_that_a_cache_node_leaves_out_are_not_timed(flux, sample, optimize, monkeypatch):
    """They take nothing; the uncompiled ones of the others are slow here."""
    model, node = optimize(flux, "exact")
    judge = cached.judge = optimizer_of(model)
    cached.steps = {}
    asked = judge.runs_eager
    monkeypatch.setattr(judge, "runs_eager", lambda *args: setattr(judge, "is_eager", asked(*args)) or judge.is_eager)
    other = model.clone()
    other.add_wrapper_with_key("diffusion_model", "cache", cached)
    while judge.is_open:
        sample(other)
        assert timer_of(model).times.image < 100 * MOST_KEPT
    assert node.details["compiled"] is True and judge.decision.times[0][2] > 0.2


@pytest.mark.parametrize("lag", [False, True])
def test_a_model_is_called_from_a_thread_for_each_gpu(flux, optimize, lag):
    optimizer, times = optimizer_of(optimize(flux, "exact")[0]), CallTimes()
    failures = []

    def call():
        try:
            for step in range(400):
                times.new_image()
                kind = EAGER if optimizer.runs_eager(times, SIZE) else COMPILED
                add(times, SIZE, kind, 1e-4)
                if not lag or step % 50 == 0:
                    optimizer.timed(times, SIZE, kind)
                    times.gain(SIZE)
        except Exception as error:
            failures.append(error)
    threads = [threading.Thread(target=call) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_a_model_whose_first_step_is_interrupted_is_not_timed_as_it_came_again(flux, sample, optimize, times, untimed):
    times(FASTER)
    model, _ = optimize(flux)
    sample(model)
    judge = optimizer_of(model)
    first = Steps(judge, without=1.0, beside=1.6)
    judge.runs_eager(first.times, SIZE)  # and an interrupt
    restart()
    model, node = optimize(flux)
    Steps(optimizer_of(model), compiled=1.3, eager=1.6).run(2 * KEPT)
    assert node.details["slower_with_int8"] == [1.0, 1.3]


def test_another_branch_takes_over_what_is_decided(flux, optimize):
    """It was made before that. Its own steps may have told otherwise."""
    (first, _), (second, node) = optimize(flux, "exact"), optimize(flux, "exact")
    Steps(optimizer_of(first), compiled=0.5, eager=1.0).run(2 * KEPT)
    assert Steps(optimizer_of(second), compiled=2.0, eager=1.0).run(20) == [False] * 20
    assert node.report.short()[0] == "2.00x: 1.00 -> 0.500 s a step" and node.details["compiled"] is True
    restart()
    assert optimize(flux, "exact")[1].details["compiled"] is True


def test_reports_of_all_models_say_no_gain_before_it_is_decided(flux, sample, optimize):
    from int8_compile.compile.comfyui.compile_model import reports

    model, node = optimize(flux, "exact")
    while optimizer_of(model).is_open:
        assert all(report.gain is None for report in reports(model))
        sample(model)
    assert [report.gain for report in reports(model)] == [node.report.gain()]


def with_shift(model):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    return ModelSamplingFlux().patch(model, 1.2, 0.5, 512, 512)[0]


def test_what_other_nodes_have_in_the_model_makes_it_no_other_model(flux, sample, optimize):
    """The patches of the clone that was sampled last are in it."""
    from int8_compile.compile.comfyui import decisions

    keys = []
    for patcher in (flux, with_shift(flux), flux):
        sample(patcher)
        keys.append(decisions.key_of(flux, "balanced", []))
        model, _ = optimize(flux, "exact")
        keys.append(optimizer_of(model)._key == optimizer_of(optimize(with_shift(flux), "exact")[0])._key)
        sample(model)
    assert keys == [keys[0], True] * 3


def test_int8_layers_multiply_as_int8_in_whatever_dtype_a_model_computes(flux, sample, nodes):
    """ModelComputeDtype has every layer of a model multiply in that dtype, where core's own INT8 layers become float."""
    from int8_compile.compile.comfyui.int8_model import int8_layers
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: set = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    changed = flux.clone()
    changed.set_model_compute_dtype(torch.bfloat16)
    want = sample(changed)
    model = nodes.INT8QuantizeModel(changed, method="convrot")
    with Seen() as seen:
        image = sample(model)
    assert int8_layers(model) and any("quant_rows" in name for name in seen.names)
    compiled = nodes.CompileModel(model, backend="eager")
    assert difference(image, want) < 0.05 and difference(sample(compiled), image) < 0.02
    model = nodes.INT8QuantizeModel(flux, method="convrot")
    model.set_model_compute_dtype(torch.bfloat16)
    assert difference(sample(model), image) < 0.02, "behind the node too"


@pytest.mark.parametrize("goal", ["exact", "balanced"])
def test_where_compiling_fails_int8_is_judged_and_nothing_of_it_kept(flux, sample, optimize, times, kept, untimed, goal):
    """The next start may have a compiler."""
    times(FASTER)
    model, node = optimize(flux, goal)
    sample(model)
    judge = optimizer_of(model)
    judge._reports.compile.failure = "RuntimeError: no compiler"
    steps = Steps(judge, without=1.0, beside=0.8)
    steps.seconds = {EAGER: 0.8}
    for _ in range(KEPT):
        judge.runs_eager(steps.times, SIZE)
        steps.add(EAGER, 0.8)
        judge.timed(steps.times, SIZE, EAGER)  # a compiled one too ends so
    assert node.details["compiled"] is False and judge.decision.times[0][2:] == (0.8, 0.0)
    assert "decided, until ComfyUI ends: nothing could be compiled" in node.report.short()
    assert "does not pay" not in node.report.text() and not list(kept.glob("*.json"))
    assert (node.report.short()[0].startswith("1.25x: 1.00 -> 0.800 s a step;")) == (goal == "balanced")
    assert [judge.runs_eager(steps.times, SIZE) for _ in range(6)] == [True] * 6
    again, node = optimize(flux, goal)
    assert node.details["compiled"] is None and optimizer_of(again).decision.chosen == judge.decision.chosen, "it may have another LoRA"
    Steps(optimizer_of(again), compiled=0.4, eager=0.8).run(4 * KEPT)
    assert node.details["compiled"] is True and node.report.short()[-1] == "decided, and kept for the next start"
    restart()
    assert optimize(flux, goal)[1].details["compiled"] is True


def test_where_no_step_runs_compiled_int8_is_judged_too(flux, sample, optimize, times, untimed):
    """The builder fails, or another node has its own compile, or hooks, for all blocks."""
    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    judge = optimizer_of(model)
    steps = Steps(judge, without=1.0, beside=1.2)
    for _ in range(6 * KEPT):
        judge.runs_eager(steps.times, SIZE)
        steps.add(EAGER, 1.2)
        judge.timed(steps.times, SIZE, EAGER)
    assert node.details["slower_with_int8"] == [1.0, 1.2]


@pytest.mark.parametrize("window", range(4))
def test_other_work_in_one_of_the_timings_changes_nothing(flux, sample, optimize, times, monkeypatch, window):
    from int8_compile.compile.comfyui.trial import Trial

    times(FASTER)
    time_steps, end, timings = Trial.time_steps, CallTimes.end, []
    monkeypatch.setattr(Trial, "time_steps", lambda self, kind, **more: (timings.append(kind), time_steps(self, kind, **more))[1])
    monkeypatch.setattr(CallTimes, "end", lambda self, begun, size, kind, blocks=0: end(
        self, begun - 60.0 * (kind in (WITHOUT, BESIDE) and len(timings) == window + 1), size, kind, blocks))
    model, node = optimize(flux)
    sample(model)
    assert timings == [WITHOUT, BESIDE] * 2
    assert 0 < node.details["trial"]["without"] < 60.0 and 0 < node.details["trial"]["eager"] < 60.0


def test_a_decision_is_of_the_size_that_was_timed_as_it_came_if_it_was_seen(flux, sample, optimize, times, untimed):
    """A hires fix has another size at each end of an image."""
    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    judge = optimizer_of(model)
    first = Steps(judge, without=1.0, beside=0.8, compiled=0.1, eager=0.16)
    larger = Steps(judge, "latent 32x32, batch 1, prompt length 20", compiled=0.3, eager=0.48)
    larger.times = first.times
    while judge.is_open:
        first.times.new_image()
        first.run(2)
        larger.run(2)
    assert node.report.short()[0].startswith("2.00x: 0.200 -> 0.100 s a step;") and f"measured: {SIZE}" not in node.report.text()
    assert node.details["times"][0]["size"] == SIZE and node.report.to_dict()["gain"]["steps_timed"] == [judge.decision.steps_timed] * 2


@pytest.fixture
def interrupted_while_timed(monkeypatch):
    """interrupted_while_timed(kind): a context in which an image's steps of that kind are interrupted."""
    import comfy.model_management as mm
    from int8_compile.compile.comfyui.trial import TIMED, Trial

    run = Trial.run

    @contextlib.contextmanager
    def interrupted_while_timed(kind):
        def interrupted(self, sigmas, wrappers=None, options=None):
            if (options or {}).get(TIMED) == kind:
                raise mm.InterruptProcessingException
            run(self, sigmas, wrappers, options or {})

        with monkeypatch.context() as patch, pytest.raises(mm.InterruptProcessingException):
            patch.setattr(Trial, "run", interrupted)
            yield

    return interrupted_while_timed


@pytest.mark.parametrize("kind", [WITHOUT, BESIDE])
def test_a_timing_that_is_interrupted_decides_nothing_for_the_next_start(flux, sample, optimize, times, interrupted_while_timed, kind):
    """A node that runs again times it in this one."""
    times(FASTER)
    model, node = optimize(flux)
    with interrupted_while_timed(kind):
        sample(model)
    sample(model)
    sample(model)
    is_timed = kind == WITHOUT  # the layers were float still
    assert bool(node.details["trial"]) == is_timed and node.details["int8_layers"]
    Steps(optimizer_of(model), compiled=0.01, eager=0.02).run(6 * MOST_KEPT)
    assert node.details["compiled"] is not None
    assert (node.report.short()[-1] == "decided, and kept for the next start") == is_timed
    restart()
    assert bool(optimize(flux)[1].details["known"]) == is_timed


def test_a_node_that_runs_again_times_what_was_interrupted(flux, sample, optimize, times, interrupted_while_timed):
    times(FASTER)
    with interrupted_while_timed(BESIDE):
        sample(optimize(flux)[0])
    model, node = optimize(flux)
    sample(model)
    assert all(node.details["trial"].values())


def test_a_second_model_is_as_it_came_too_while_steps_without_the_node_are_timed(load, optimize, times, comfy, conds, monkeypatch):
    """A guider with two models loads the second one by wrappers of its own."""
    from comfy_extras.nodes_custom_sampler import DualModelGuider
    from int8_compile.compile.comfyui.trial import TIMED, Trial

    times(FASTER)
    model, other = optimize(load())[0], optimize(load())[0]
    run, seen = Trial.run, {}

    def watched(self, sigmas, wrappers=None, options=None):
        run(self, sigmas, wrappers, options or {})
        loaded = [any(type(module).__name__ == "Int8Linear" for module in patcher.model.modules()) for patcher in (model, other)]
        seen.setdefault((options or {}).get(TIMED), set()).update(loaded)

    monkeypatch.setattr(Trial, "run", watched)
    positive, negative = conds
    guider = DualModelGuider.execute(model, positive, 3.0, other, negative)[0]
    noise, sigmas = torch.randn(1, 16, 16, 16), torch.tensor([1.0, 0.6, 0.3, 0.0])
    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    assert seen[WITHOUT] == {False} and seen[BESIDE] == {True}


@pytest.mark.parametrize("goal", ["balanced", "smallest"])
def test_int8_that_is_slower_is_found_at_another_size_than_the_first(flux, sample, optimize, times, untimed, goal):
    times(FASTER)
    model, node = optimize(flux, goal)
    sample(model)
    other = CallTimes()
    for kind, seconds in ((WITHOUT, 1.0), (BESIDE, 2.0)):
        add(other, SIZE, kind, seconds)
    steps_of(optimizer_of(model), other, "same", 1)
    steps_of(optimizer_of(model), other, "same", 2 * KEPT, "latent 32x32, batch 1, prompt length 20", compiled=4.0, eager=5.0)
    assert node.details["slower_with_int8"] == ([2.5, 4.0] if goal == "balanced" else None)
    assert "x: " not in node.report.text(), "of this size it is not known"


def test_another_branch_that_decides_knows_what_the_first_was_timed_as(flux, sample, optimize, times, untimed):
    times(FASTER)
    (first, _), (second, node) = optimize(flux), optimize(flux)
    sample(first)
    sample(second)
    Steps(optimizer_of(first), without=1.0, beside=3.0, compiled=2.0, eager=3.0).run(2)
    Steps(optimizer_of(second), compiled=2.0, eager=3.0).run(4 * KEPT)
    assert node.details["slower_with_int8"] == [1.0, 2.0] and node.details["trial"]["without"] == 1.0


def test_nothing_is_said_of_a_gain_before_it_is_decided(flux, sample, optimize, times, untimed):
    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    steps = Steps(optimizer_of(model), without=0.02, beside=0.016, compiled=0.005, eager=0.008)
    steps.run(2 * MOST_KEPT - 1)
    assert "x: " not in node.report.text() and node.report.to_dict()["gain"] is None and "weights: " in node.report.text()
    steps.run(1)
    assert node.report.text().startswith("2.00x: ")


def test_without_int8_the_gain_is_over_the_uncompiled_steps_that_decided(flux, sample, optimize, times, untimed):
    """Steps of the first image, minutes before, may have had another machine: compiled for being faster, and called slower."""
    times(SLOWER)
    model, node = optimize(flux)
    sample(model)
    steps = Steps(optimizer_of(model), without=0.5, compiled=0.8, eager=1.0)
    steps.run(KEPT)
    assert "x: " not in node.report.text()
    steps.run(KEPT)
    assert node.details["compiled"] is True and node.report.short()[0] == "1.25x: 1.00 -> 0.800 s a step"
    restart()
    assert optimize(flux)[1].report.short()[0].startswith("1.25x: 1.00 -> 0.800 s a step when measured")


@pytest.mark.parametrize("later", [3.0, 0.1], ids=["slower", "faster"])
def test_after_the_decision_other_work_on_the_machine_changes_no_gain(flux, optimize, later):
    """It was measured in the same minutes; what compiled steps take later has nothing to be compared with."""
    model, node = optimize(flux, "exact")
    steps = Steps(optimizer_of(model), compiled=0.5, eager=1.0)
    steps.run(2 * KEPT + 1)
    assert node.report.short()[0] == "2.00x: 1.00 -> 0.500 s a step"
    steps.seconds[COMPILED] = later
    assert steps.run(20) == [False] * 20
    for size in (SIZE, "latent 32x32, batch 1, prompt length 20"):  # of the second one nothing is known but some steps
        other = Steps(optimizer_of(model), size, compiled=later, eager=3.0)
        for kind in (WITHOUT, EAGER, EAGER, EAGER):
            other.add(kind, 3.0)
        other.run(4)
        other.times.of_weights("another LoRA")
        other.run(4)
        assert node.report.short()[0] == "2.00x: 1.00 -> 0.500 s a step" and node.details["compiled"] is True


def test_where_int8_is_wanted_for_its_size_a_loss_is_said(load, sample, optimize, times, kept, untimed):
    times(SLOWER)
    for start in range(2):
        model, node = optimize(load(), "smallest")
        sample(model)
        steps = Steps(optimizer_of(model), without=None if start else 1.0, compiled=1.25, eager=1.5)
        when = " when measured" if start else ""
        said = f"0.80x: 1.00 -> 1.25 s a step (slower than without: bypass this node){when};"
        assert not start or node.report.short()[0].startswith(said)
        steps.run(2 * KEPT + 1)
        assert node.report.short()[0].startswith(said)
        restart()


def test_a_later_start_says_what_was_measured_in_the_first(load, sample, optimize, times, kept, untimed):
    times(FASTER)
    first, node = optimize(load())
    sample(first)
    steps = Steps(optimizer_of(first), without=1.0, compiled=0.5, eager=0.8)
    steps.run(2 * KEPT + 1)
    assert node.report.short()[0].startswith("2.00x: 1.00 -> 0.500 s a step;") and node.report.short()[2].startswith("decided, and kept")
    restart()
    again, node = optimize(load())
    assert node.report.short()[0].startswith("2.00x: 1.00 -> 0.500 s a step when measured;")
    assert "compiles at the first sampling" in node.report.status() and "measured: " in node.report.text()
    for now in (0.1, 0.5, 3.0):  # quiet, as it was, busy
        Steps(optimizer_of(again), compiled=now, eager=0.8).run(6)
        assert node.report.short()[0].startswith("2.00x: 1.00 -> 0.500 s a step when measured;")
        assert node.report.short()[2] == "decided earlier: nothing is measured again"


def test_another_branch_does_not_bring_back_int8_that_was_found_slower(load, sample, optimize, times, kept, untimed):
    times(FASTER)
    model = load()
    (first, node), (second, _) = optimize(model), optimize(model)
    sample(first), sample(second)
    Steps(optimizer_of(first), without=1.0, compiled=1.2, eager=1.5).run(2 * KEPT)
    assert "no INT8 from the next prompt on" in node.report.status() and "x: " not in node.report.text()
    Steps(optimizer_of(second), compiled=1.2, eager=1.5).run(2 * KEPT)
    restart()
    assert optimize(load())[1].details["int8_layers"] == 0


def test_another_branch_does_not_open_what_is_decided(flux, sample, optimize, times, kept, untimed):
    times(FASTER)
    (first, _), (second, _) = optimize(flux), optimize(flux)
    sample(first)
    Steps(optimizer_of(first), compiled=0.5, eager=0.8).run(2 * KEPT)
    sample(second)
    restart()
    assert optimize(flux)[1].details["compiled"] is True


def test_what_the_other_process_has_compiled_is_not_called_uncompiled_until_a_step_asks_for_it(comfy):
    from int8_compile.compile.comfyui.decisions import Decision
    from int8_compile.compile.comfyui.optimize_report import OptimizeReport
    from int8_compile.compile.report import CompileReport

    def said(**report):
        return OptimizeReport("exact", None, Decision(), compile=CompileReport("t", **report)).short()

    assert said(steps=4, building=["Block a"]) == ["exact: compiling in the background"]
    assert said(steps=4, built_at_step=4) == ["exact: compiled, from the next step on"]
    assert said(steps=5, built_at_step=4, compiled_from_step=5) == ["exact: compiled", "measuring whether compiling pays"]


def test_where_compiling_does_not_pay_the_model_is_passed_on(flux, sample, optimize):
    model, node = optimize(flux, "exact")
    assert Steps(optimizer_of(model), compiled=1.1, eager=1.0).run(9) == IN_TURNS + [True] * 3
    assert "passed on as it came" in node.report.status() and "compile: no, 1.00 -> 1.10 s a step" in node.report.text()
    restart()
    again, node = optimize(flux, "exact")
    assert not again.wrappers and not again.object_patches and names(again) == []
    assert node.details["known"] and "passed on as it came" in node.report.status()


def test_layers_that_make_a_step_slower_all_in_all_are_gone_with_the_next_prompt(flux, sample, optimize, times, untimed, nodes):
    from int8_compile.compile.comfyui import decisions
    from int8_compile.nodes.optimize import OptimizeModel

    times(FASTER)
    model, node = optimize(flux)
    sample(model)
    before = OptimizeModel.fingerprint_inputs()
    steps = Steps(optimizer_of(model), without=1.0, compiled=1.3, eager=1.4)
    steps.run(2 * KEPT)
    assert OptimizeModel.fingerprint_inputs() != before, "the node runs again"
    assert "no INT8 from the next prompt on (1.00 -> 1.30 s a step with it)" in node.report.status() and decisions.revision()
    again, node = optimize(flux)
    assert "no INT8 (1.00 -> 1.30 s a step with it)" in node.report.status()
    assert names(again) == ["compile"] and not again.object_patches and node.details["compiled"] is None


def test_a_size_that_was_never_timed_without_has_no_gain(flux, sample, optimize):
    """INT8's own uncompiled time is not that of the model as it came."""
    model, node = optimize(flux, "smallest")
    sample(model)
    Steps(optimizer_of(model), "another size", compiled=0.14, eager=0.16).run(2 * MOST_KEPT)
    assert node.report.to_dict()["gain"] is None and node.report.decision.times[-1][1] == 0.0 and node.report.decision.compiled


def test_smallest_keeps_layers_that_are_slower_and_says_so(flux, sample, optimize, untimed):
    model, node = optimize(flux, "smallest")
    sample(model)
    Steps(optimizer_of(model), without=1.0, compiled=1.3, eager=1.4).run(2 * KEPT + 1)
    assert node.details["int8_layers"] == 29 and "(slower than without: bypass this node)" in node.report.text().splitlines()[0]


def test_a_compile_node_says_what_it_gained_with_int8_over_the_model_as_it_came(flux, nodes, sample):
    from int8_compile.compile.comfyui.compile_model import reports

    model = nodes.CompileModel(nodes.INT8QuantizeModel(flux), backend="eager")
    sample(model)
    sample(model)
    (report,) = reports(model)
    gain = json.loads(json.dumps(report.to_dict()))["gain"]
    assert gain["size"] == SIZE and gain["steps_timed"][0] in range(2, 25, 2) and gain["ratio"] > 0
    assert report.text().splitlines()[0].startswith(f"{report.gain.ratio:.2f}x: ")
    assert gain["ratio"] == pytest.approx(report.gain.ratio, abs=1e-3)


def test_a_node_whose_steps_ran_compiled_only_says_no_gain(flux, nodes, sample):
    from int8_compile.compile.comfyui.compile_model import reports

    sample(model := nodes.CompileModel(flux, backend="eager"))
    (report,) = reports(model)
    assert report.gain is None and report.text().startswith("ready")


def test_what_a_step_took_as_it_came_is_kept_before_compiling_is_decided(flux, sample, optimize, times, untimed):
    """With what it took uncompiled as INT8: the second start may have another machine, here one that is half as fast."""
    times(FASTER)
    sample(model := optimize(flux)[0])
    Steps(optimizer_of(model), without=1.0, beside=1.5, compiled=1.4, eager=1.5).run(1)
    restart()
    model, node = optimize(flux)
    assert node.details["trial"] == {"size": SIZE, "without": 1.0, "eager": 1.5} and node.details["compiled"] is None
    Steps(optimizer_of(model), compiled=2.8, eager=3.0).run(2 * KEPT)
    assert node.details["slower_with_int8"] == [2.0, 2.8] and "with it" in node.report.status()


def test_a_step_that_is_also_checked_against_eager_is_not_timed(flux, nodes, sample):
    from int8_compile.compile.comfyui.compile_model import reports

    sample(model := nodes.CompileModel(flux, backend="eager"))
    (report,) = reports(model)
    before = report.graphs, report.checks
    sample(model, height=64)
    (wrapper,) = (wrapper for group in model.wrappers["apply_model"].values() for wrapper in group)
    assert report.graphs == before[0] and report.checks > before[1] > 0
    assert wrapper.times.count(SIZE.replace("16x16", "64x16"), COMPILED) == 1, "of two steps the first was checked"
