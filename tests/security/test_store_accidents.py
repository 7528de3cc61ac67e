"""kill -9, full disks and strange files: the next start is right, and cleans up."""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from int8_compile.compile.artifacts import trusted_bundles
from int8_compile.compile.artifacts.bundle import read_bundle, save_bundle
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.int8.files import liveness, signed, temporary
from int8_compile.int8.files.folders import make_folder
from int8_compile.int8.files.liveness import held, here
from int8_compile.int8.files.signed import read_signed, signing_key
from int8_compile.int8.files.temporary import TEMPORARY, Sweeper, sweep_below
from int8_compile.int8.files.whole import move, writing_whole
from int8_compile.int8.kernels.tuning import Choices

PLACE, ARTEFACT = "Block_dynamic_aoti_0123/single/forward", "artifact.pt2"
KILLS = 8

posix_only = pytest.mark.skipif(os.name != "posix", reason="forks")


@pytest.fixture
def home():
    home = Path(tempfile.mkdtemp(prefix="int8-compile-test-"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


def open_store(home: Path) -> CacheStore:
    return CacheStore(home / "compiled", home / "keys" / "key")


def put(store: CacheStore, name: str = "entry", content: bytes = b"code" * 50_000):
    with store.writing(PLACE, name) as (folder, finish):
        (folder / ARTEFACT).write_bytes(content)
        finish({"name": "Block", "device": "cpu", "torch": "2.11.0"})


def hidden(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name.startswith((".", "tmp"))]


def write_entries(home):
    store = open_store(home)
    while True:
        for name in "abc":
            put(store, name)
        store.clear()


def write_bundles(home):
    store = open_store(home)
    put(store, content=os.urandom(200_000))
    while True:
        save_bundle(store, store.own(), home / "bundles" / "bundle.zip")


def write_choices(home):
    for number in range(10**6):
        choices = Choices(home / "choices.json", budget=1e9)
        choices.choose(str(number), {"a": None, "b": None}, lambda call: 1.0)


def write_keys(home):
    for number in range(10**6):
        signing_key(home / "keys" / f"key{number % 5}")
        if number % 5 == 4:
            for other in range(5):
                (home / "keys" / f"key{other}").unlink()


def write_signed(home):
    make_folder(home / "native")
    while True:
        signed.write_signed(home / "native" / "a.so", os.urandom(100_000), b"k" * 32)


def write_int8_files(home):
    """As Save INT8 Model, below the output folder."""
    while True:
        with writing_whole(home / "output" / "diffusion_models" / "int8.safetensors") as partial:
            for _ in range(50):
                with partial.open("ab") as file:
                    file.write(os.urandom(10_000))


def write_trusted(home):
    for number in range(10**6):
        trusted_bundles.set_trusted(f"{number % 100:064}")


def load(home):
    store = open_store(home)
    put(store)
    (entry,) = store.entries(PLACE)
    while True:
        entry.load(ARTEFACT, lambda folder: Result(), lasting=True)


class Result:
    """Something that can be weakly held."""


def check(home: Path):
    """What the next start does, and finds."""
    store = open_store(home)
    for entry in store.entries(PLACE):
        entry.read(ARTEFACT)
    for bundle in (home / "bundles").glob("*"):
        assert read_bundle(bundle).held
    with contextlib.suppress(FileNotFoundError):
        json.loads((home / "choices.json").read_text())
    Choices(home / "choices.json").get("a")
    for key in (home / "keys").glob("key*"):
        assert len(signing_key(key)) == 32
    trusted_bundles.trusted()
    sweep_below(home / "output")
    for thread in threading.enumerate():
        if thread.name == "int8-compile sweep":
            thread.join(10)
    for path in (home / "output").rglob("*.safetensors"):
        assert path.stat().st_size == 500_000
    if (home / "native").exists():
        Sweeper().sweep((home / "native").iterdir())
        with contextlib.suppress(FileNotFoundError):
            read_signed(home / "native" / "a.so", b"k" * 32)


@posix_only
@pytest.mark.parametrize("write", [write_entries, write_bundles, write_choices, write_keys, write_signed, write_int8_files, write_trusted,
                                   load], ids=lambda f: f.__name__)
def test_killed_at_any_moment_nothing_damaged_is_there_and_nothing_is_left_after_one_start(home, write, caplog, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(home / "keys" / "key"))
    generator = random.Random(write.__name__)
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                write(home)
            os._exit(1)
        time.sleep(generator.uniform(0.02, 0.15))
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(home)
        assert not hidden(home) and not caplog.records


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 100_000, bytes(range(256)), b"\xff\xfe", b"{}" * 10,
                                     b'{"a": {"b": "fast"}}', b"1e999", b" " * (1 << 25)], ids=range(8))
def test_choices_of_any_content_are_as_good_as_none(home, content):
    (home / "choices.json").write_bytes(content)
    assert Choices(home / "choices.json").choose("a", {"slow": 2.0, "fast": 1.0}, lambda call: call) == "fast"
    assert json.loads((home / "choices.json").read_text()) == {"a": "fast"} and not hidden(home)


@posix_only
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)],
                         ids=["pipe", "folder", "endless", "loop"])
def test_choices_that_are_no_file_neither_hang_nor_raise(home, make):
    make(home / "choices.json")
    chosen = []
    thread = threading.Thread(target=lambda: chosen.append(
        Choices(home / "choices.json").choose("a", {"slow": 2.0, "fast": 1.0}, lambda call: call)), daemon=True)
    thread.start()
    thread.join(5)
    assert chosen == ["fast"] and not hidden(home)


def sparse(path: Path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@posix_only
@pytest.mark.parametrize("at", ["lock", "group", "manifest"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path), sparse],
                         ids=["pipe", "endless", "loop", "huge"])
def test_what_is_no_file_or_folder_of_the_cache_neither_hangs_nor_stays_in_the_way(home, make, at):
    store = open_store(home)
    put(store)
    method = store.base / PLACE
    if at == "group":
        shutil.rmtree(method)
    else:
        path = method / "entry" / "manifest.json" if at == "manifest" else method / ".lock-entry"
        path.unlink(missing_ok=True)
    make({"lock": method / ".lock-entry", "group": method, "manifest": method / "entry" / "manifest.json"}[at])
    served = []

    def use():
        again = open_store(home)
        list(again.entries(PLACE))
        put(again, "other")
        served.extend(entry.folder.name for entry in again.entries(PLACE))
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert served == (["entry", "other"] if at == "lock" else ["other"])


@posix_only
def test_on_a_full_disk_choices_leave_nothing(home):
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"0" * 100)
        choices = Choices(disk / "choices.json", budget=1e9)
        for number in range(50):
            assert choices.choose(str(number), {"slow": 2.0, "fast": 1.0}, lambda call: call) == "fast"
        assert [path.name for path in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_leftovers_of_bundles_that_a_version_before_made_are_swept(home):
    store = open_store(home)
    put(store)
    (home / "bundles").mkdir()
    for name, age in ((".bundle-old", 7200), (".bundle-new", 0)):
        (home / "bundles" / name).write_bytes(b"half")
        os.utime(home / "bundles" / name, (time.time() - age,) * 2)
    save_bundle(store, store.own(), home / "bundles" / "a.zip")
    assert sorted(path.name for path in (home / "bundles").iterdir()) == [".bundle-new", "a.zip"]


def test_what_cannot_be_loaded_here_is_tried_elsewhere_and_leaves_nothing(home, monkeypatch):
    """Near the cache no code may run, or the disk is full; below the system's folder it can."""
    store, tried = open_store(home), []
    put(store)
    (entry,) = store.entries(PLACE)
    (home / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))

    def load(folder: Path) -> Result:
        tried.append(folder.parent)
        if folder.parent == store.layout:
            raise OSError("failed to map segment from shared object")
        return Result()
    assert isinstance(entry.load(ARTEFACT, load), Result)
    assert tried == [store.layout, home / "tmp"]
    assert not list((home / "tmp").iterdir()) and not [path for path in store.layout.iterdir() if path.name.startswith(".")]

    def never(folder: Path):
        raise OSError(f"no space in {folder.parent.name}")
    with pytest.raises(OSError, match="no space in v1"):
        entry.load(ARTEFACT, never)
    assert entry.folder.exists() and not list((home / "tmp").iterdir())


def test_what_a_loaded_library_still_needs_stays_while_it_lives(home):
    store, folders = open_store(home), []
    put(store)
    (entry,) = store.entries(PLACE)
    loaded = entry.load(ARTEFACT, lambda folder: folders.append(folder) or Result(), lasting=True)
    open_store(home).evict()
    assert (folders[0] / ARTEFACT).exists()
    del loaded
    assert not folders[0].exists()


# Locks and leftovers of processes on other hosts, by their sign of life


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "HEART", liveness.Heart())  # one that an earlier test has started sleeps for ten seconds


def is_taken_over(store: CacheStore, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with store.lock(PLACE, "entry") as alone:
            if alone:
                return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("holder", ["otherhost 1", "here and running", "", "\0\xff", "here and 9" + 5000 * "9", "sparse"])
@pytest.mark.parametrize("dated", [0, 86400], ids=["now", "tomorrow"])
def test_a_lock_that_nobody_touches_is_taken_over_in_time(home, short, holder, dated):
    store = open_store(home)
    put(store, "other")
    lock = store.base / PLACE / ".lock-entry"
    lock.write_text(holder.replace("here and running", f"{here()} {os.getppid()}").replace("here and", here()), encoding="latin-1")
    if holder == "sparse":  # no more is read than one can have
        os.truncate(lock, 1 << 34)
    os.utime(lock, (time.time() + dated,) * 2)
    assert not is_taken_over(store, 0.3)
    assert is_taken_over(store, 1.5)


def test_the_lock_of_a_long_build_is_not_taken_over(home, short):
    with open_store(home).lock(PLACE, "entry") as alone:
        assert alone and not is_taken_over(open_store(home), 1.5)
    assert is_taken_over(open_store(home), 0.1)


def test_who_was_taken_for_dead_does_not_open_the_lock_of_the_next(home, short, monkeypatch):
    first, second = open_store(home), open_store(home)
    with first.lock(PLACE, "entry"):
        liveness.HEART.release(first.base / PLACE / ".lock-entry")  # a machine that slept
        time.sleep(0.7)
        scope = contextlib.ExitStack()
        assert scope.enter_context(second.lock(PLACE, "entry"))
    assert not is_taken_over(open_store(home), 0.1), "the first has deleted the second's lock"
    scope.close()
    assert is_taken_over(open_store(home), 0.1)


def test_a_folder_that_another_host_is_filling_stays_while_it_is_touched(home, short):
    store = open_store(home)
    put(store, "other")
    folder = store.base / PLACE / f"{TEMPORARY}{'0' * 8}-1-x"
    folder.mkdir()
    for _ in range(8):
        store.evict()
        time.sleep(0.1)
        os.utime(folder)
    assert folder.exists()
    for _ in range(8):
        store.evict()
        time.sleep(0.1)
    assert not folder.exists()


def test_folders_nested_deeper_than_python_can_go_are_swept_as_far_as_names_can_be(home):
    """Any client may make them in the output folder, by uploads."""
    at = home
    for _ in range(1200):
        at.mkdir(exist_ok=True)
        os.chdir(at)
        at = Path("a")
    os.chdir(Path(__file__).parent)
    left = home / "a" / f"{TEMPORARY}11111111-1-x"
    left.mkdir()
    os.utime(left, (0, 0))
    temporary._sweep_below(home)
    assert not left.exists()
    subprocess.run(["rm", "-rf", str(home / "a")], check=True)


def test_a_folder_of_ours_that_is_deeper_than_python_can_go_keeps_no_other_from_being_swept(home):
    """Any client may make one in the output folder, where its name is known."""
    deep, plain = home / f"{TEMPORARY}00000000-1-x", home / f"{TEMPORARY}11111111-1-x"
    plain.mkdir(parents=True)
    for at in [deep, *[Path("a")] * 1200]:
        at.mkdir()
        os.chdir(at)
    os.chdir(Path(__file__).parent)
    for folder in (deep, plain):
        os.utime(folder, (0, 0))
    Sweeper().sweep([deep, plain])
    assert not plain.exists()
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["rm", "-rf", str(deep)], check=True)


def test_what_was_loaded_from_the_systems_folder_by_a_killed_process_is_swept(home, monkeypatch):
    """As where the cache's disk was full."""
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    for name in (f"{TEMPORARY}11111111-1-x", "tmpabc"):
        (home / "tmp" / name).mkdir(parents=True)
        os.utime(home / "tmp" / name, (0, 0))
    (home / "output").mkdir()
    temporary._sweep_below(home / "output")
    assert [path.name for path in (home / "tmp").iterdir()] == ["tmpabc"]


def test_what_another_process_is_writing_below_a_folder_stays_and_goes_when_it_is_silent(home, short):
    living, dead = (home / "a" / ".b" / f"{TEMPORARY}{where}-1-x" for where in ("11111111", "22222222"))
    for folder in (living, dead):
        folder.mkdir(parents=True)
    (home / "a" / ".b" / f"{TEMPORARY}link").symlink_to(home)
    with held(living):
        temporary._sweep_below(home)
        assert living.exists() and not dead.exists() and home.exists()


def test_a_replaced_entry_that_cannot_be_put_aside_is_an_error_and_stays(home, monkeypatch):
    """As on Windows, while somebody has it open: this was said to have worked."""
    store = open_store(home)
    put(store)

    def refuse(source, target):
        raise PermissionError(13, "Access is denied")
    monkeypatch.setattr(move, "__defaults__", (refuse,))
    with pytest.raises(PermissionError), store.writing(PLACE, "entry", replace=True) as (folder, finish):
        (folder / ARTEFACT).write_bytes(b"new")
        finish({"name": "Block"})
    monkeypatch.undo()
    (entry,) = open_store(home).entries(PLACE)
    assert entry.read(ARTEFACT) == b"code" * 50_000 and not hidden(home)
