"""The cache on disk: what is damaged, foreign or half written is never served, and what is whole is always found again."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from int8_compile.compile.artifacts import store as cache_store
from int8_compile.compile.artifacts.entry import MANIFEST
from int8_compile.compile.artifacts.store import CacheError, CacheStore
from int8_compile.int8.files.liveness import here
from int8_compile.int8.files.temporary import TEMPORARY

REPO = Path(cache_store.__file__).parents[2]
PLACE = "Block_dynamic_aoti_0123/single/forward"
ARTEFACT = "artifact.pt2"
NOBODY = 65534
is_root = hasattr(os, "getuid") and os.getuid() == 0
root_only = pytest.mark.skipif(not is_root, reason="needs root, to be another user")
posix_only = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")

# A process with a store of its own; the module needs nothing but Python, so nothing of the pack around it is imported.
LOADER = """
import sys, types
from pathlib import Path
for name in ("", ".compile", ".compile.artifacts"):
    package = sys.modules["pack" + name] = types.ModuleType("pack" + name)
    package.__path__ = [str(Path(sys.argv[1], *name.split(".")[1:]))]
from pack.compile.artifacts import store as cache_store
store = cache_store.CacheStore(Path(sys.argv[2]), Path(sys.argv[3]))
place = sys.argv[4]

def put(name, content, times=1):
    with store.writing(place, name) as (folder, finish):
        for _ in range(times):
            with (folder / "artifact.pt2").open("ab") as file:
                file.write(content)
        finish({"name": name})
"""


def start(home: Path, script: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LOADER + script, str(REPO), str(home / "compiled"), str(home / "key"), PLACE],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def make(home: Path, limit: int = cache_store.DEFAULT_LIMIT, key: str = "key") -> CacheStore:
    return CacheStore(home / "compiled", home / key, limit)


def put(store: CacheStore, name: str = "entry", content: bytes = b"code" * 100, place: str = PLACE) -> Path:
    with store.writing(place, name) as (folder, finish):
        (folder / ARTEFACT).write_bytes(content)
        finish({"name": "Block"})
    return store.base / place / name


def served(store: CacheStore) -> list[str]:
    """The names of the entries that a region would load: verified, and their artifact read."""
    names = []
    for entry in store.entries(PLACE):
        try:
            entry.read(ARTEFACT)
        except CacheError as error:
            store.set_aside(entry.folder, str(error))
        else:
            names.append(entry.folder.name)
    return names


def age(path: Path, seconds: float):
    then = time.time() - seconds
    os.utime(path, (then, then))


def hidden(store: CacheStore) -> list[Path]:
    return [path for path in store.layout.rglob("*") if path.name.startswith(".")]


@contextlib.contextmanager
def as_nobody(home: Path):
    """What root may do, no test of rights can see: this process is another user in here."""
    if not is_root:
        yield
        return
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def home():
    """Below a folder that every user can enter."""
    home = Path(tempfile.mkdtemp(prefix="int8-compile-test-"))
    yield home
    for path in (home, *home.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(home)


@pytest.fixture
def store(home):
    return make(home)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "compile cache" in record.getMessage()]


def test_what_was_written_is_found_by_the_next_process(home, store):
    put(store)
    (entry,) = make(home).entries(PLACE)
    assert entry.body["name"] == "Block" and entry.read(ARTEFACT) == b"code" * 100
    assert store.has("Block_dynamic") and not store.has("Other")
    assert not hidden(store)


@posix_only
def test_only_the_owner_can_read_it_whatever_the_umask(home):
    before = os.umask(0)
    try:
        folder = put(make(home))
    finally:
        os.umask(before)
    for path in (home / "compiled").rglob("*"):
        assert not path.stat().st_mode & 0o077, path
    assert not (home / "key").stat().st_mode & 0o077
    assert folder.is_dir()


def test_without_finish_and_after_an_error_nothing_stays(store):
    with store.writing(PLACE, "a") as (folder, _):
        (folder / ARTEFACT).write_bytes(b"half")
    with pytest.raises(ZeroDivisionError), store.writing(PLACE, "b") as (folder, _):
        (folder / ARTEFACT).write_bytes(b"half")
        raise ZeroDivisionError
    assert not store.all() and not hidden(store)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path):
    path.write_bytes(b"")


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def give_away(path: Path):
    os.chown(path, NOBODY, NOBODY)


def open_to_all(path: Path):
    path.chmod(0o666)


def link(path: Path):
    outside = path.parents[7] / "elsewhere"
    shutil.move(path, outside)
    path.symlink_to(outside)


def to_folder(path: Path):
    path.unlink()
    path.mkdir()


FAULTS = [truncate, empty, flip, Path.unlink, to_folder, pytest.param(give_away, marks=root_only),
          pytest.param(open_to_all, marks=posix_only), pytest.param(link, marks=posix_only)]


@pytest.mark.parametrize("file", [MANIFEST, ARTEFACT])
@pytest.mark.parametrize("damage", FAULTS)
def test_a_damaged_file_is_not_served_warned_of_once_and_made_anew(home, store, warnings, file, damage):
    damage(put(store, "bad") / file)
    put(store, "good")
    for reader in (store, store, make(home)):
        assert served(reader) == ["good"]
    assert len(warnings()) == 1 and "bad" in warnings()[0]
    put(store, "bad")
    assert served(make(home)) == ["bad", "good"]
    assert not hidden(store), "writing has deleted what was set aside"
    assert len(warnings()) == 1


@pytest.mark.parametrize("above", [1, 2])
def test_a_file_in_the_place_of_a_folder_is_put_aside(store, above):
    folder = put(store).parents[above - 1]
    shutil.rmtree(folder)
    folder.write_text("no folder")
    assert served(store) == []
    put(store)
    assert len(served(store)) == 1


@pytest.mark.parametrize("content", [
    b"[]", b"null", b"{}", b'{"body": {}, "hmac": 3}', b'{"body": {"files": {}}, "hmac": "\xc3\xa4"}', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_something_else_is_not_served(store, warnings, content):
    (put(store, "bad") / MANIFEST).write_bytes(content)
    assert served(store) == [] and len(warnings()) == 1


@pytest.mark.parametrize("change", [lambda c: c["body"].update(name="Other"), lambda c: c.update(hmac="0" * 64),
                                    lambda c: c["body"]["files"].update({ARTEFACT: "0" * 64})])
def test_a_manifest_with_another_signature_is_not_served(store, warnings, change):
    path = put(store) / MANIFEST
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    assert served(store) == []
    assert "signature" in warnings()[0]


def test_an_entry_that_was_moved_to_another_group_is_not_served(store, warnings):
    folder = put(store, place="Block_dynamic_aoti_4567/single/forward")
    shutil.copytree(folder, store.base / PLACE / "entry")
    assert served(store) == [] and "signature" in warnings()[0]
    assert [folder] == store.all()


@posix_only
@pytest.mark.parametrize("file", [MANIFEST, ARTEFACT])
def test_an_unreadable_file_is_not_served_and_made_anew(home, store, warnings, file):
    (put(store) / file).chmod(0)
    with as_nobody(home):
        assert served(store) == []
        put(store)
        assert served(make(home)) == ["entry"]
    assert len(warnings()) == 1 and "Permission denied" in warnings()[0]


@posix_only
def test_an_entry_that_is_a_link_is_not_served(home, store, warnings):
    folder = put(store)
    shutil.move(folder, home / "elsewhere")
    folder.symlink_to(home / "elsewhere")
    assert served(store) == [] and "symbolic link" in warnings()[0]
    store.evict()
    assert not hidden(store) and (home / "elsewhere" / MANIFEST).exists()


@root_only
def test_another_users_entry_is_not_served(store, warnings):
    give_away(put(store))
    assert served(store) == [] and len(warnings()) == 1 and "must be owned by the current user" in warnings()[0]


@posix_only
@pytest.mark.parametrize("spoil, message", [
    (lambda root: root.chmod(0o770), "chmod go-w"),
    (lambda root: (root.rename(root.with_name("real")), root.symlink_to(root.with_name("real"))), "symbolic link"),
    pytest.param(give_away, "must be owned by the current user", marks=root_only),
    (lambda root: (root.rmdir(), root.write_text("")), "cannot be used"),
])
def test_a_root_that_others_could_write_to_is_refused(home, spoil, message):
    (home / "compiled").mkdir()
    spoil(home / "compiled")
    with pytest.raises(CacheError, match=message):
        make(home)


@posix_only
@pytest.mark.parametrize("spoil, message", [
    (lambda key: key.chmod(0o620), "chmod go-w"),
    (lambda key: (key.rename(key.with_name("real")), key.symlink_to(key.with_name("real"))), "symbolic link"),
    pytest.param(give_away, "must be owned by the current user", marks=root_only),
])
def test_a_key_that_others_could_have_written_is_refused(home, store, spoil, message):
    spoil(home / "key")
    with pytest.raises(CacheError, match=message):
        make(home)


@pytest.mark.parametrize("content, message", [(b"", "has 0 bytes"), (b"correct horse staple", "has 20 bytes"), (bytes(32), "all zeros")])
def test_a_key_that_could_be_guessed_is_refused_and_not_overwritten(home, store, content, message):
    put(store)
    (home / "key").write_bytes(content)
    age(home / "key", 60)
    with pytest.raises(CacheError, match=message):
        make(home)
    assert (home / "key").read_bytes() == content


def test_entries_of_another_key_are_neither_seen_nor_set_aside(home, store, warnings):
    put(store)
    other = make(home, key="other")
    assert served(other) == [] and not other.has() and not other.own()
    put(other, "theirs")
    assert served(store) == ["entry"] and served(other) == ["theirs"]
    assert len(store.all()) == 2 and not warnings()


@posix_only
def test_a_full_disk_leaves_no_entry_and_what_was_there_is_served(home):
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k,mode=700", "tmpfs", str(disk)]
    if not is_root or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        store = make(disk)
        put(store, "first")
        for size in (200_000, 290_000, 1_000_000):  # the last files, the manifest, the artifact do not fit
            with contextlib.suppress(OSError):
                put(store, f"entry{size}", os.urandom(size))
        assert len(served(make(disk))) < 4 and "first" in served(make(disk)) and "entry1000000" not in served(make(disk))
        assert not hidden(store)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 100)
        with pytest.raises(OSError), store.lock(PLACE, "entry"):
            put(store)
        assert not hidden(store)
        filler.unlink()
        put(store)
        assert {"first", "entry"} <= set(served(make(disk)))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@posix_only
def test_a_file_size_limit_leaves_no_entry(home):
    script = """
import resource, signal
put("first", b"a" * 1000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    put("second", b"a" * 10_000)
except OSError:
    print("full")
"""
    assert start(home, script).communicate()[0] == "full\n"
    store = make(home)
    assert served(store) == ["first"] and not hidden(store)


@posix_only
def test_a_read_only_cache_is_read_and_damage_in_it_reported_once(home, store, warnings):
    put(store, "good")
    truncate(put(store, "bad") / MANIFEST)
    for folder in (home / "compiled").rglob("*"):
        if folder.is_dir():
            folder.chmod(0o500)
    with as_nobody(home):
        for _ in range(3):
            assert served(store) == ["good"]
        with pytest.raises(OSError):
            put(store, "new")
        store.evict()
        assert store.clear() == (0, 0)
    assert len(warnings()) == 1


@posix_only
def test_a_folder_that_cannot_be_made_is_an_error_with_its_reason(home):
    home.chmod(0o500)
    with as_nobody(home), pytest.raises(CacheError, match=r"cannot be used \(Permission denied\)"):
        make(home)


def test_of_two_writers_of_one_entry_both_end_well(home):
    script = "import time\nwhile time.time() < %f: pass\nfor i in range(40): put(f'entry{i}', b'code' * 1000)"
    racers = [start(home, script % (time.time() + 0.5)) for _ in range(2)]
    for racer in racers:
        _, errors = racer.communicate()
        assert racer.returncode == 0, errors
    store = make(home)
    assert len(served(store)) == 40 and not hidden(store)


def test_a_second_writer_replaces_what_is_no_entry(store):
    (put(store) / MANIFEST).unlink()
    put(store)
    assert served(store) == ["entry"]


def test_a_process_that_starts_while_another_makes_the_key_has_the_same(home):
    racers = [start(home, "print(store.base.name)") for _ in range(6)]
    assert len({racer.communicate()[0] for racer in racers}) == 1
    assert sorted(path.name for path in home.iterdir()) == ["compiled", "key"]


@posix_only
def test_killed_at_any_moment_a_writer_leaves_only_whole_entries(home, warnings):
    script = """
print("ready", flush=True)
for i in range(10_000):
    with store.lock(place, f"entry{i % 7}") as alone:
        put(f"entry{i % 7}", b"code" * 50_000, times=3)
    if i % 7 == 6:
        store.clear()
"""
    generator = random.Random(0)
    visible = 0
    for _ in range(25):
        writer = start(home, script)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0, 0.08))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        store = make(home)
        names = [folder.name for folder in store.all()]
        assert served(store) == sorted(names)
        visible += len(names)
        for lock in store.layout.rglob(".lock-*"):
            age(lock, 60)  # one without content may have been made just now
        store.evict()
        assert not hidden(store)
        assert not warnings()
    assert visible > 25


def test_what_was_not_used_for_longest_goes_first(home):
    store = make(home, limit=35_000)
    for index in range(3):
        age(put(store, f"entry{index}", b"x" * 10_000) / MANIFEST, 100 - index)
    store.touch(store.entry(store.base / PLACE / "entry0"))
    put(store, "entry3", b"x" * 10_000)
    assert served(store) == ["entry0", "entry2", "entry3"]
    assert store.size() <= 35_000 and not hidden(store)


def test_the_limit_counts_the_entries_of_all_keys(home):
    first, second = make(home, limit=25_000), make(home, limit=25_000, key="other")
    age(put(first, "old", b"x" * 10_000) / MANIFEST, 100)
    for name in ("a", "b"):
        put(second, name, b"x" * 10_000)
    assert served(first) == [] and served(second) == ["a", "b"]


def test_clear_says_what_it_has_deleted_and_leaves_what_is_being_built(store):
    sizes = [sum(path.stat().st_size for path in put(store, name).iterdir()) for name in "ab"]
    with store.lock(PLACE, "c"), store.writing(PLACE, "c") as (folder, finish):
        (folder / ARTEFACT).write_bytes(b"code")
        assert store.clear() == (2, sum(sizes))
        finish({})
    assert served(store) == ["c"]
    store.clear()
    assert not list(store.layout.iterdir())


def lock_of(store: CacheStore, content: str, seconds: float = 0) -> Path:
    path = store.base / PLACE / ".lock-entry"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    age(path, seconds)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_builder_at_a_time(store):
    with store.lock(PLACE, "entry") as alone, store.lock(PLACE, "entry") as second, store.lock(PLACE, "other") as other:
        assert (alone, second, other) == (True, False, True)
    with store.lock(PLACE, "entry") as again:
        assert again
    assert not hidden(store)


@posix_only
@pytest.mark.parametrize("holder, seconds, taken", [
    ("ended", 0, True), ("running", 0, False), ("running", 3600, True), ("elsewhere", 0, False), ("elsewhere", 3600, True),
    ("", 0, False), ("", 60, True)])
def test_a_lock_is_taken_over_where_its_holder_has_ended(store, holder, seconds, taken):
    where = here()
    content = {"ended": f"{where} {dead_process()}", "running": f"{where} {os.getpid()}", "elsewhere": "otherhost 1", "": ""}[holder]
    path = lock_of(store, content, seconds)
    with store.lock(PLACE, "entry") as alone:
        assert alone is taken
    assert path.exists() is not taken
    if holder == "ended":
        lock_of(store, content)
        store.evict()
        assert not hidden(store)


@posix_only
def test_leftovers_of_other_hosts_are_given_time(store):
    put(store)
    ours, theirs = (store.base / PLACE / f"{TEMPORARY}{where}-{dead_process()}-x" for where in (here(), "0" * 8))
    for path in (ours, theirs):
        path.mkdir()
    store.evict()
    assert not ours.exists() and theirs.exists()
    os.utime(theirs, (0, 0))
    store.evict()
    assert not theirs.exists() and served(store) == ["entry"]


def test_running_out_of_file_handles_sets_nothing_aside(store, warnings):
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")
    folder = put(store)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(CacheError):
            store.entry(folder)
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert served(store) == ["entry"] and not warnings()


