"""The builder process: it finds Python where the server does and nowhere else, and nothing waits for it when it hangs."""
from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from int8_compile.compile.artifacts import builder as builder_module
from int8_compile.compile.artifacts import builder_process, worker
from int8_compile.compile.artifacts.builder import Builder, BuildRequest
from int8_compile.compile.artifacts.builder_process import BuilderProcess, Disturbed
from int8_compile.compile.artifacts.entry import MANIFEST
from int8_compile.compile.artifacts.process_watch import ProcessWatch
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.pack import PACKAGE
from toys import wait_until

PLACE = "Block_dynamic_aoti_0123/single/forward"
REPO = Path(worker.__file__).parents[2]
SPIN, SLEEP = "while True: pass", "import time; time.sleep(60)"
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, for /proc")
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "compiled", tmp_path / "key")


@pytest.fixture
def builder(store):
    builder = Builder(store)
    yield builder
    builder._close()


class Told:
    """What orders are answered, in order, with the time."""

    def __init__(self, builder: Builder):
        self._builder = builder
        self.reasons: dict[str, str] = {}
        self.times: dict[str, float] = {}

    def order(self, entry: str, urgent: bool = True):
        def done(reason: str):
            self.reasons[entry], self.times[entry] = reason, time.monotonic()
        # No job at all: the other process imports everything, and then says that it cannot build this.
        self._builder.submit(BuildRequest(types.SimpleNamespace(device="cpu", name="Block"), PLACE, entry, done, urgent))

    def wait(self, entry: str, seconds: float = 120):
        wait_until(lambda: entry in self.reasons, seconds)
        return self.reasons[entry]


FLAGS = ("import json; print(json.dumps([{name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != '_' and name not in "
         "('safe_path', 'count', 'index')}, sys._xoptions, sys.warnoptions, sys.path]))")


@pytest.mark.parametrize("flags", [["-s"], ["-E", "-O"], ["-I"], ["-X", "utf8", "-B", "-s"], ["-W", "error::UserWarning"]], ids=" ".join)
def test_the_other_process_has_the_servers_flags_and_path(tmp_path, flags):
    """Of torch nothing is needed: the command is run with another program in the place of the worker's."""
    (tmp_path / "importlib").mkdir()
    for evil in ("queue.py", "json.py", "importlib/__init__.py", "sitecustomize.py"):
        (tmp_path / evil).write_text(f"print('EVIL {evil}')")
    script = tmp_path / "scripts" / "server.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(f"""
        import importlib.util, subprocess, sys
        from pathlib import Path
        sys.path.insert(0, "/a folder/of the server's")
        spec = importlib.util.spec_from_file_location("worker", {worker.__file__!r})
        worker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(worker)
        command = worker.command("pack", Path("/pack"), Path("/tmp"))
        at = command.index("-c") + 1
        command[at] = command[at].partition("import importlib")[0] + "import queue, importlib; " + {FLAGS!r}
        {FLAGS}
        sys.stdout.flush()
        subprocess.run(command)
    """))
    done = subprocess.run([sys.executable, *flags, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "EVIL" not in done.stdout, done.stdout + done.stderr
    ours, theirs = map(json.loads, done.stdout.splitlines())
    assert ours == theirs and "/a folder/of the server's" in theirs[-1] and str(tmp_path) not in theirs[-1]


def test_its_files_are_below_this_users_folder_and_gone_after_it(builder, store, monkeypatch, tmp_path):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    seen = {}
    real = subprocess.Popen

    def popen(command, *, env, **arguments):
        seen.update(env)
        return real([sys.executable, "-c", "import time; time.sleep(60)"], env=env, **arguments)
    monkeypatch.setattr(builder_module.subprocess, "Popen", popen)
    running = builder._running = builder._start()
    inductor = tmp_path / "cache" / "inductor"
    assert {Path(seen[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR", "TEMP", "TMP")} == {inductor}
    assert Path(seen["TRITON_CACHE_DIR"]).parent == inductor and (os.name != "posix" or inductor.stat().st_mode & 0o777 == 0o700)
    assert [path.name for path in store.layout.iterdir() if path.name.startswith(".")]
    start = time.monotonic()
    builder._close()
    assert time.monotonic() - start < 1 and running.process.returncode is not None
    assert not [path.name for path in store.layout.iterdir() if path.name.startswith(".")]


def test_inductors_files_are_deleted_when_they_have_grown_too_large(tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path))
    folder = builder_module.inductor_folder(tmp_path / "otherwise")
    (folder / "file").write_bytes(b"x" * 100)
    assert builder_module.inductor_folder(tmp_path / "otherwise") == folder and (folder / "file").exists()
    monkeypatch.setattr(builder_module, "INDUCTOR_LIMIT", 99)
    assert builder_module.inductor_folder(tmp_path / "otherwise") == folder and not (folder / "file").exists()
    if os.name == "posix":
        folder.chmod(0o777)
        assert builder_module.inductor_folder(tmp_path / "otherwise") == tmp_path / "otherwise"


@posix_only
def test_a_hung_builder_is_noticed_and_the_next_order_is_built_and_nothing_stays(builder, monkeypatch, caplog):
    monkeypatch.setattr(builder_process, "SILENT_SECONDS", 3.0)
    told = Told(builder)
    told.order("first")
    while builder._process is None:
        time.sleep(0.02)
    first = builder._process
    os.kill(first.pid, signal.SIGSTOP)
    start = time.monotonic()
    wait_until(lambda: "gave no sign of life or of work for 3 s and was ended. It is tried once more." in caplog.text, 20)
    assert time.monotonic() - start < 10 and first.returncode is not None
    monkeypatch.undo()
    told.order("second")
    for order in ("second", "first"):  # the hung one behind the other
        assert "has no attribute" in told.wait(order), "this one ran, and could not build what is no job"
    assert told.times["second"] < told.times["first"]
    second = builder._process or first
    wait_until(lambda: builder._thread is None, 20)
    assert second.returncode is not None and not Path(f"/proc/{second.pid}").exists(), "a zombie"


def test_a_builder_that_works_for_long_beats(builder, monkeypatch):
    """It is told to beat each 0.2 s, and is silent for less than 40 s though it imports torch."""
    monkeypatch.setattr(worker, "BEAT_SECONDS", 0.2)
    running = builder._running = builder._start()
    running.orders.put(worker.pickle.dumps((types.SimpleNamespace(device="cpu"), "/nowhere")))
    beats, start = 0, time.monotonic()
    while not (frame := running.frames.get(timeout=40)):
        assert frame == b"" and time.monotonic() - start < 120
        beats += 1
    assert b"has no attribute" in frame and beats >= 3


def made(order, folder) -> dict:
    (folder / "artifact.pt2").write_bytes(b"code")
    return {"name": "Block"}


def test_an_order_that_another_server_is_building_does_not_block_the_others(builder, store, monkeypatch):
    monkeypatch.setattr(builder, "_ask", made)
    other, told = CacheStore(store.layout.parent, store.layout.parent.with_name("key")), Told(builder)
    with other.lock(PLACE, "locked") as alone:
        assert alone
        told.order("locked")
        for name in ("second", "third"):
            told.order(name)
        assert told.wait("third", 10) == told.wait("second", 10) == "" and "locked" not in told.reasons
    with builder.sampling(torch.device("cpu")):
        told.order("late", urgent=False)
        told.order("fourth")
        assert told.wait("fourth", 10) == "" == told.wait("locked", 10) and "late" not in told.reasons
    assert told.wait("late", 20) == ""
    assert len(store.own()) == 5 and (store.base / PLACE / "locked" / MANIFEST).exists()


def test_the_entry_that_the_other_server_has_made_meanwhile_is_taken(builder, store, monkeypatch):
    monkeypatch.setattr(builder, "_ask", lambda order, folder: pytest.fail("built twice"))
    other, told = CacheStore(store.layout.parent, store.layout.parent.with_name("key")), Told(builder)
    with contextlib.ExitStack() as lock:
        lock.enter_context(other.lock(PLACE, "entry"))
        told.order("entry")
        time.sleep(0.3)
        with other.writing(PLACE, "entry") as (folder, finish):
            finish(made(None, folder))
    assert told.wait("entry", 10) == ""


def test_a_full_disk_is_the_reason_that_is_given(builder, monkeypatch):
    def full(order, folder):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(builder, "_ask", full)
    told = Told(builder)
    told.order("entry")
    assert "No space left on device" in told.wait("entry", 10)


def test_where_sampling_takes_all_cores_what_is_urgent_gets_a_share(builder, store, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def build(order, folder):
        begun.set()
        assert go.wait(10)
        return made(order, folder)
    slept, cores = [], builder_module._cores()
    monkeypatch.setattr(builder, "_ask", build)
    told = Told(builder)
    told.order("urgent")
    assert begun.wait(10)
    with monkeypatch.context() as patched:
        patched.setattr(builder_module.time, "sleep", slept.append)
        patched.setattr(torch, "get_num_threads", lambda: cores)
        for device in ("cpu", "cuda"):
            with builder.sampling(torch.device(device)):
                pass
        patched.setattr(torch, "get_num_threads", lambda: cores - 1)
        with builder.sampling(torch.device("cpu")):
            pass
    go.set()
    assert told.wait("urgent", 10) == "" and len([seconds for seconds in slept if seconds < 0.1]) == 1
    with monkeypatch.context() as patched:  # nothing is built any more
        patched.setattr(builder_module.time, "sleep", lambda seconds: pytest.fail("waited for nothing"))
        with builder.sampling(torch.device("cpu")):
            pass


def test_an_order_whose_process_hangs_twice_is_given_up(builder, monkeypatch):
    def hang(order, folder):
        asked.append(order)
        raise Disturbed("it hung")
    asked: list = []
    monkeypatch.setattr(builder, "_ask", hang)
    told = Told(builder)
    told.order("entry")
    assert told.wait("entry", 10) == "it hung" and len(asked) == 2


@posix_only
def test_an_order_whose_process_is_killed_is_tried_once_more(builder):
    told = Told(builder)
    told.order("entry")
    killed = []
    while len(killed) < 2:
        wait_until(lambda: builder._process is not None and builder._process.pid not in killed, 20)
        killed.append(builder._process.pid)
        os.kill(killed[-1], signal.SIGKILL)
    assert told.wait("entry", 20).startswith("the builder process was killed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_answer_that_nobody_can_take_stops_no_other_order(builder):
    def failing(reason):
        raise RuntimeError("the receiver's own")
    job = types.SimpleNamespace(device="cpu", name="Block")
    builder.submit(BuildRequest(job, PLACE, "first", failing, True))
    wait_until(lambda: builder._thread is not None and not builder._thread.is_alive(), 60)
    told = Told(builder)
    told.order("next")
    assert told.wait("next", 60)


@linux_only
def test_a_process_that_stands_still_ends_with_the_server(tmp_path):
    server = "import subprocess; p = subprocess.Popen({!r}, stdin=subprocess.PIPE, start_new_session=True); print(p.pid, flush=True); {}"
    command = worker.command(PACKAGE, REPO, tmp_path)
    with subprocess.Popen([sys.executable, "-c", server.format(command, SLEEP)], stdout=subprocess.PIPE) as process:
        stands = int(process.stdout.readline())
        wait_until(lambda: os.sched_getscheduler(stands) == os.SCHED_IDLE, 20)
        time.sleep(0.5)
        os.kill(stands, signal.SIGSTOP)
        process.kill()
    stat = Path(f"/proc/{stands}/stat")
    wait_until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", 10)


def test_a_server_that_stood_still_finds_what_another_has_built_meanwhile(builder, store, monkeypatch):
    other = CacheStore(store.layout.parent, store.layout.parent.with_name("key"))

    def stands_still(order, folder):
        shutil.rmtree(folder)  # the other's sweep, which took this server for dead
        with other.writing(PLACE, "entry") as (theirs, finish):
            finish(made(None, theirs))
        raise FileNotFoundError(str(folder))
    monkeypatch.setattr(builder, "_ask", stands_still)
    told = Told(builder)
    told.order("entry")
    assert told.wait("entry", 10) == "" and len(store.own()) == 1


def test_nothing_is_said_of_an_order_that_ends_with_the_server(builder):
    told = Told(builder)
    told.order("entry")
    wait_until(lambda: builder._process is not None, 20)
    builder._close()
    builder._thread.join(10)
    assert not told.reasons


@linux_only
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11, to start a group in the session")
@pytest.mark.parametrize(("device", "threads", "stands"), [("cpu", 0, True), ("cpu", -1, False), ("cuda", 0, False)])
def test_it_and_its_compilers_stand_still_while_sampling_takes_all_cores(builder, monkeypatch, device, threads, stands):
    cores = builder_module._cores()
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores + threads)

    def states():
        found = [stat.read_text().rpartition(")")[2].split() for stat in Path("/proc").glob("[0-9]*/stat") if stat.exists()]
        return [fields[0] for fields in found if fields[2] == str(process.pid)]
    with group(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])") as process:
        wait_until(lambda: len(states()) == 2, 20)
        running = builder._running = BuilderProcess(process, queue.SimpleQueue(), queue.SimpleQueue(), None, contextlib.ExitStack())
        for _ in range(2):
            with builder.sampling(torch.device(device)):
                wait_until(lambda: (states() == ["T", "T"]) is stands, 5)
                start = running.seconds()
                time.sleep(0.2)
                assert (running.seconds() - start < 0.1) is stands, "its own time, in which it may be silent and must be through"
            assert "T" not in states()
        assert running.seconds() > start
        with builder.sampling(torch.device(device)):
            builder.stop()
        assert process.returncode == -signal.SIGKILL and builder._running is None


HELD = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # spins in C and lets no other thread of its run


@contextlib.contextmanager
def group(code: str, before: str = ""):
    """A process that leads a group."""
    ready = "import os; os.setpgid(0, 0); {}\nprint(flush=True)\n{}"
    with subprocess.Popen([sys.executable, "-c", ready.format(before, code)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def hangs(watch: ProcessWatch, beats: bool, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if beats:
            watch.beat()
        if watch.hangs():
            return True
        time.sleep(0.05)
    return False


@linux_only
@pytest.mark.parametrize("code", [SLEEP, HELD], ids=["sleeps", "computes and answers nothing"])
def test_a_process_without_a_sign_of_life_hangs(code):
    with group(code) as process:
        assert hangs(ProcessWatch(process.pid, 1.0), False, 20)


@linux_only
def test_a_process_that_waits_for_a_core_does_not_hang():
    core = min(os.sched_getaffinity(0))
    pinned = f"os.sched_setaffinity(0, [{core}])"
    with contextlib.ExitStack() as stack:
        for _ in range(9):  # of this process's own class, which may be the idle one, too
            stack.enter_context(group(SPIN, pinned))
        process = stack.enter_context(group(SPIN, f"{pinned}; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"))
        watch = ProcessWatch(process.pid, 2.0)
        assert not hangs(watch, False, 4), vars(watch) | {"now": watch._cpu()}


@linux_only
def test_a_process_whose_compiler_hangs_hangs_though_it_gives_signs_of_life():
    compile = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])".format
    with group(compile(SLEEP)) as process:
        assert hangs(ProcessWatch(process.pid, 1.0), True, 20)
    with group(compile(SPIN)) as process:
        assert not hangs(ProcessWatch(process.pid, 1.0), True, 4)
        for stat in Path("/proc").glob("[0-9]*/stat"):  # its compiler stands still
            with contextlib.suppress(OSError):
                if stat.read_text().rpartition(")")[2].split()[2] == str(process.pid) and stat.parent.name != str(process.pid):
                    os.kill(int(stat.parent.name), signal.SIGSTOP)
        assert hangs(ProcessWatch(process.pid, 1.0), True, 20)


def test_the_builder_is_no_session_of_its_own():
    """Linux would share the cores out evenly among sessions, whatever the priorities of their processes."""
    if os.name == "posix" and sys.version_info >= (3, 11):
        assert builder_module._apart() == {"process_group": 0}
