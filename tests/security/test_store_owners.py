"""Two users of one machine: no code of the other is ever loaded, whoever may write where. Really two users: this process is root."""
from __future__ import annotations

import contextlib
import ctypes
import getpass
import grp  # before this process is a user who cannot read Python's folder
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from int8_compile.compile.artifacts.entry import MANIFEST, Damaged
from int8_compile.compile.artifacts.store import CacheError, CacheStore
from int8_compile.int8.files import system

OURS, THEIRS, SHARED = 60001, 60002, 60000  # two users, and a group that both are in
PLACE, ARTEFACT = "Block_dynamic_aoti_0123/single/forward", "artifact.pt2"
REPO = Path(system.__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root, to be two users")


def as_user(user: int, function, *arguments, umask: int = 0o022):
    """function's result in a process of that user."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        try:
            os.umask(umask)
            os.setgroups([])
            os.setresgid(SHARED, SHARED, SHARED)
            os.setresuid(user, user, user)
            result = function(*arguments)
        except BaseException as error:
            result = error
        with os.fdopen(target, "wb") as file:
            pickle.dump(result, file)
        os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as file:
        result = pickle.load(file)
    os.waitpid(child, 0)
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture
def home():
    """Of our user, below a folder that both can enter."""
    home = Path(tempfile.mkdtemp(prefix="int8-compile-test-"))
    os.chown(home, OURS, SHARED)
    home.chmod(0o755)
    yield home
    shutil.rmtree(home)


def put(home: Path, content: bytes = b"ours", name: str = "cache") -> Path:
    store = CacheStore(home / name / "compiled", home / "private" / "key")
    with store.writing(PLACE, "entry") as (folder, finish):
        (folder / ARTEFACT).write_bytes(content)
        finish({"name": "Block"})
    return store.base / PLACE / "entry"


def loaded(home: Path, name: str = "cache") -> list[bytes]:
    """What a region would load."""
    store = CacheStore(home / name / "compiled", home / "private" / "key")
    found = []
    for entry in store.entries(PLACE):
        try:
            found.append(entry.load(ARTEFACT, lambda folder: [(folder / ARTEFACT).read_bytes()])[0])
        except CacheError as error:
            found.append(error)
    return found


def modes(folder: Path) -> set[str]:
    return {f"{path.relative_to(folder)} {path.stat().st_mode & 0o777:o}" for path in folder.rglob("*") if path.stat().st_mode & 0o077}


@pytest.mark.parametrize("umask", [0, 0o002, 0o022])
def test_every_folder_that_is_made_is_its_owners_alone_whatever_the_umask(home, umask):
    as_user(OURS, put, home, umask=umask)
    assert not modes(home)
    assert as_user(OURS, loaded, home, umask=umask) == [b"ours"]


def chown(path: Path):
    os.chown(path, THEIRS, SHARED)


@pytest.mark.parametrize("spoil", [
    lambda home: home.chmod(0o777), lambda home: home.chmod(0o775), chown,
    lambda home: (home / "cache").chmod(0o777), lambda home: (home / "cache").chmod(0o775), lambda home: chown(home / "cache"),
], ids=["parent 777", "parent 775", "parent theirs", "folder 777", "folder 775", "folder theirs"])
def test_a_cache_below_a_folder_that_another_can_write_to_is_refused(home, spoil):
    as_user(OURS, put, home)
    spoil(home)
    with pytest.raises(CacheError, match=r"who could put other files|belongs to another user|Permission denied"):
        as_user(OURS, loaded, home)


@pytest.mark.parametrize("level", range(1, 7))
@pytest.mark.parametrize("spoil", [lambda path: path.chmod(0o777), lambda path: path.chmod(0o770), chown], ids=["777", "770", "theirs"])
def test_nothing_in_a_folder_of_the_cache_that_another_can_write_to_is_loaded(home, level, spoil):
    """Level 1 is v1, 6 the entry."""
    as_user(OURS, put, home)
    (entry,) = (home / "cache").glob("compiled/*/*/*/*/*/*")
    spoil((entry, *entry.parents)[6 - level])
    assert as_user(OURS, loaded, home) == []
    if level < 6:
        assert (entry / MANIFEST).exists(), "it may be good: the folder is to be mended, not the entry deleted"


def test_a_sticky_folder_and_ones_of_root_are_fine(home):
    """As /tmp, and /home."""
    os.chown(home, 0, 0)
    home.chmod(0o1777)
    as_user(OURS, put, home)
    assert as_user(OURS, loaded, home) == [b"ours"]


@pytest.mark.parametrize("first, member, good", [(4321, None, True), (60003, None, False), (4321, "other", False)],
                         ids=["its own", "another's first group too", "with a member"])
def test_a_folder_that_a_group_may_write_to_is_fine_if_nobody_else_is_in_it(home, monkeypatch, first, member, good):
    """With umask 002, as Debian and Fedora have it: the group of the user's own name."""
    users = [pwd.struct_passwd((name, "x", user, group, "", "/", "/bin/sh"))
             for name, user, group in (("me", OURS, 60003), ("other", 4321, first), ("sync", 5, 60003))]
    group = grp.struct_group(("me", "x", 60003, [member] if member else []))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: users[0])
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    os.chown(home, OURS, 60003)
    home.chmod(0o775)
    if good:
        as_user(OURS, put, home)
        assert as_user(OURS, loaded, home) == [b"ours"]
    else:
        with pytest.raises(CacheError, match="who could put other files"):
            as_user(OURS, put, home)


def test_a_link_on_the_way_is_followed_and_what_it_leads_through_is_looked_at(home):
    def make():
        (home / "open").mkdir()
        (home / "open" / "inner").mkdir(mode=0o700)
        (home / "link").symlink_to("open/../open/inner")
    as_user(OURS, make)
    as_user(OURS, put, home, b"ours", "link/cache")
    assert as_user(OURS, loaded, home, "link/cache") == [b"ours"]
    (home / "open").chmod(0o777)
    with pytest.raises(CacheError, match="open can be written by others"):
        as_user(OURS, loaded, home, "link/cache")


def test_what_is_loaded_is_what_was_checked_whatever_happens_to_the_file(home):
    """The file is replaced between the check and the use, which is what another user would wait for."""
    def attacked():
        folder = put(home, b"ours" * 1000)
        store = CacheStore(home / "cache" / "compiled", home / "private" / "key")
        (entry,) = store.entries(PLACE)

        def meanwhile(content: bytes) -> dict[str, bytes]:
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / ARTEFACT).write_bytes(b"evil")
            return {"library.so": content}

        def load(private: Path):
            info = private.stat(), (private / "library.so").stat()
            assert [i.st_mode & 0o777 for i in info] == [0o700, 0o600] and {i.st_uid for i in info} == {OURS}
            return [(private / "library.so").read_bytes()]
        return entry.load(ARTEFACT, load, meanwhile)[0]
    assert as_user(OURS, attacked) == b"ours" * 1000


def test_a_neighbour_who_swaps_files_all_the_time_is_never_loaded(home):
    """He may write to the folder above the cache, as umask 002 and a common group had it."""
    as_user(OURS, put, home)
    shutil.copytree(home / "cache", home / "evil")
    for path in (home / "evil", *(home / "evil").rglob("*")):
        os.chown(path, OURS, SHARED)  # even with our owner, as root would set it
    for artifact in (home / "evil").rglob(ARTEFACT):
        artifact.write_bytes(b"evil")
    os.chown(home, THEIRS, SHARED)
    home.chmod(0o777)
    libc = ctypes.CDLL(None, use_errno=True)
    swapper = os.fork()
    if not swapper:
        os.setresuid(THEIRS, THEIRS, THEIRS)
        names = [str(home / name).encode() for name in ("cache", "evil")]
        while True:
            libc.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE

    def attacked():
        seen, end = [], time.monotonic() + 1.5
        while time.monotonic() < end:
            with contextlib.suppress(CacheError, OSError):
                seen += loaded(home)
        return [item for item in seen if not isinstance(item, Exception) and item != b"ours"]
    try:
        assert as_user(OURS, attacked) == []
    finally:
        os.kill(swapper, signal.SIGKILL)
        os.waitpid(swapper, 0)


def test_running_out_of_file_handles_while_an_artifact_is_read_says_nothing_of_it(home):
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX")

    def starved():
        put(home)
        store = CacheStore(home / "cache" / "compiled", home / "private" / "key")
        (entry,) = store.entries(PLACE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        try:
            entry.read(ARTEFACT)
        except CacheError as error:
            return type(error)
    assert as_user(OURS, starved) is CacheError is not Damaged


# The folder of torch's own cache, and of the headers that its compiler reads


@pytest.fixture
def torchs(tmp_path, monkeypatch):
    """Where torch would keep what it compiles, not there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"torchinductor_{getpass.getuser()}"


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder.mkdir(), chown(folder)), lambda folder: (folder.mkdir(), folder.chmod(0o777)),
    lambda folder: (folder.mkdir(), folder.chmod(0o775), os.chown(folder, 0, SHARED)),
    lambda folder: ((other := folder.with_name("other")).mkdir(), chown(other), folder.symlink_to("other")),
    lambda folder: (folder.with_name("other").mkdir(), folder.symlink_to("other"), os.lchown(folder, THEIRS, SHARED))],
    ids=["theirs", "777", "775", "a link to theirs", "their link"])
def test_nothing_is_compiled_where_torch_would_load_it_from_a_folder_of_another(torchs, spoil, caplog):
    """Anybody can make it in /tmp before this user does."""
    import torch
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions
    from int8_compile.compile.torch_internals import warmup

    spoil(torchs)
    net, x = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(3)]), torch.randn(2, 32)
    compiled = CompiledModule(CompileOptions())
    with torch.inference_mode():
        assert torch.equal(compiled.run(net, lambda: net(x), filter_guards=True, passthrough=lambda error: False), net(x))
    assert "compile failed; running uncompiled" in caplog.text and "belongs to another user or can be written by others" in caplog.text
    assert not list(torchs.iterdir())
    for other in ("cpu", "cuda"):
        with pytest.raises(CacheError, match="set TMPDIR"):
            warmup.prepare(other)


def test_the_folder_of_torchs_cache_is_made_for_this_user_only(torchs):
    from int8_compile.compile.torch_internals import warmup

    before = os.umask(0)
    try:
        warmup.require_own_cache()
    finally:
        os.umask(before)
    assert torchs.stat().st_mode & 0o777 == 0o700
    torchs.chmod(0o755)
    warmup.require_own_cache()


# The library of the CPU kernels

NATIVE = """
import sys, types
for name in ("", ".int8", ".int8.kernels"):
    package = sys.modules["pack" + name] = types.ModuleType("pack" + name)
    package.__path__ = ["/".join((sys.argv[1], *name[1:].split(".")))]
import logging
logging.basicConfig(format="%(message)s")
from pack.int8.kernels import native
print("library", native.library() is not None)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """{name: a library}: one with the kernels' names, one that says so when it is loaded."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("libraries")
    names = "int8c_quant_rows", "int8c_epilogue", "int8c_gemm", "int8c_has_gemm"
    sources = {"good": "".join(f"void {name}(void) {{}}\n" for name in names) + "char filler[20000] = {1};",
               "evil": "#include <stdio.h>\n__attribute__((constructor)) void f(void) { puts(\"EVIL CODE RAN\"); fflush(stdout); }"}
    for name, source in sources.items():
        (folder / f"{name}.c").write_text(source)
        subprocess.run(["gcc", "-shared", "-fPIC", f"{name}.c", "-o", f"{name}.so"], cwd=folder, check=True)
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit\necho run >> {folder}/runs\n'
                        f'while [ "$1" != -o ]; do shift; done\ncp {folder}/good.so "$2"\n')
    compiler.chmod(0o755)
    return folder


@pytest.fixture
def native(tmp_path, libraries):
    """native() -> what a new process that asks for the library prints; native.kept() -> the file."""
    def run(**environment) -> str:
        (libraries / "runs").write_text("")
        done = subprocess.run([sys.executable, "-c", NATIVE, str(REPO)], capture_output=True, text=True, env={
            **os.environ, "INT8_COMPILE_CACHE_DIR": str(tmp_path / "cache"), "INT8_COMPILE_CACHE_KEY_FILE": str(tmp_path / "keys" / "key"),
            "CXX": str(libraries / "g++"), **environment})
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        return done.stdout + done.stderr

    def kept() -> Path:
        (path,) = (tmp_path / "cache" / "native").glob("*.so")
        return path

    def built() -> bool:
        return bool((libraries / "runs").read_text())
    run.kept, run.built, run.folder = kept, built, tmp_path / "cache" / "native"
    return run


def test_the_kernels_are_built_once_and_found_by_the_next_process(native):
    assert native() == "library True\n" and native.built()
    assert native() == "library True\n" and not native.built()
    assert not modes(native.folder.parent) and [path.suffix for path in native.folder.iterdir()] == [".so"]


@pytest.mark.parametrize("size", [0, 100, 4096, 10_000])
def test_kernels_that_were_cut_are_built_anew(native, size):
    """A power cut: this was SIGBUS at every start."""
    native()
    os.truncate(native.kept(), size)
    assert "library True" in native() and native.built()
    assert native() == "library True\n" and not native.built()


@pytest.mark.parametrize("spoil", ["content", "owner", "link", "mode", "replaced"])
def test_kernels_of_another_user_are_never_loaded(native, libraries, tmp_path, spoil):
    native()
    kept = native.kept()
    evil = tmp_path / "evil.so"
    shutil.copy(libraries / "evil.so", evil)
    if spoil == "link":
        kept.unlink()
        chown(evil)
        kept.symlink_to(evil)
    elif spoil == "replaced":  # by one that was good once, under another name
        shutil.copy(kept, tmp_path / "signed")
        shutil.copy(evil, kept)
    elif spoil != "mode":
        shutil.copy(evil, kept)
    if spoil == "owner":
        chown(kept)
    if spoil == "mode":
        kept.chmod(0o666)
    output = native()
    assert "EVIL" not in output and "library True" in output and native.built()
    if spoil != "owner":
        assert native() == "library True\n" and not native.built()


@pytest.mark.parametrize("spoil", [lambda folder: folder.chmod(0o777), chown, lambda folder: folder.parent.chmod(0o777)],
                         ids=["777", "theirs", "above 777"])
def test_kernels_in_a_folder_of_others_are_neither_loaded_nor_kept(native, libraries, spoil):
    native()
    kept = native.kept()
    shutil.copy(libraries / "evil.so", kept)
    spoil(native.folder)
    output = native()
    assert "EVIL" not in output and "library True" in output and native.built()
    assert "are built anew at every start" in output and kept.read_bytes() == (libraries / "evil.so").read_bytes()


def test_kernels_run_where_the_disk_is_full_or_no_code_may_run_from_it(native, tmp_path):
    native()
    for options in ("size=4k,mode=700", "size=1m,mode=700,noexec"):
        shutil.rmtree(native.folder)
        native.folder.mkdir(mode=0o700)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(native.folder)], capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            assert "library True" in native()
            assert not [path for path in native.folder.iterdir() if path.name.startswith(".")]
        finally:
            subprocess.run(["umount", "-l", str(native.folder)], check=True)


def test_two_processes_that_start_together_both_have_the_kernels(native):
    outputs: list[str] = []
    starts = [threading.Thread(target=lambda: outputs.append(native())) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert outputs == ["library True\n"] * 4
