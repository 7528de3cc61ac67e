"""What differs on Windows, with the platform stood in for: only what Python and Windows do is, not what the pack does."""
from __future__ import annotations

import ctypes
import os
import time

import pytest
from int8_compile.compile.artifacts import trusted_bundles
from int8_compile.compile.artifacts.bundle import is_name
from int8_compile.compile.artifacts.call import flatten
from int8_compile.compile.artifacts.store import CacheError, CacheStore
from int8_compile.int8.files import liveness, system, whole
from int8_compile.int8.files.liveness import has_ended, here
from int8_compile.int8.files.whole import move

ME, OTHER, SYSTEM, INSTALLER = "S-1-5-21-1-2-3-1001", "S-1-5-21-1-2-3-1002", "S-1-5-18", system.WINDOWS_ADMINISTRATORS[-1]
PLACE = "Block_dynamic_aoti_0123/single/forward"


@pytest.fixture
def windows(monkeypatch):
    """{path: owner}, all others being the system's above the user's folder and the user's in it."""
    owners: dict = {}
    monkeypatch.setattr(system, "IS_POSIX", False)
    monkeypatch.setattr(system, "windows_has_ended", lambda pid: False)
    monkeypatch.setattr(system, "windows_user", lambda: ME)
    monkeypatch.setattr(system, "windows_owner", lambda path: owners.get(path, ME if "int8-user" in str(path) else INSTALLER))
    return owners


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "int8-user"
    folder.mkdir()
    return folder


def put(store: CacheStore, replace: bool = False, content: bytes = b"code"):
    with store.writing(PLACE, "entry", replace) as (folder, finish):
        (folder / "artifact.pt2").write_bytes(content)
        finish({"name": "Block"})
    return store.base / PLACE / "entry"


def test_an_own_cache_works(windows, home):
    store = CacheStore(home / "compiled", home / "key")
    put(store)
    assert [entry.read("artifact.pt2") for entry in CacheStore(home / "compiled", home / "key").entries(PLACE)] == [b"code"]


@pytest.mark.parametrize("whose", [OTHER, "S-1-1-0"])
@pytest.mark.parametrize("what", ["above", "root", "key", "entry", "file"])
def test_what_another_user_owns_is_refused(windows, home, what, whose):
    store = CacheStore(home / "compiled", home / "key")
    entry = put(store)
    windows[{"above": home, "root": home / "compiled", "key": home / "key", "entry": entry, "file": entry / "artifact.pt2"}[what]] = whose
    if what in ("entry", "file"):
        with pytest.raises(CacheError):
            [found.read("artifact.pt2") for found in [store.entry(entry)]]
    else:
        with pytest.raises(CacheError, match=r"owned by the current user|belongs to another user"):
            CacheStore(home / "compiled", home / "key")


def test_what_an_elevated_process_makes_is_the_administrators_and_works(windows, home, monkeypatch):
    monkeypatch.setattr(system, "windows_owner", lambda path: "S-1-5-32-544")
    put(CacheStore(home / "compiled", home / "key"))
    assert [entry.read("artifact.pt2") for entry in CacheStore(home / "compiled", home / "key").entries(PLACE)] == [b"code"]


def test_folders_of_the_system_and_its_administrators_may_be_above(windows, home):
    for owner in system.WINDOWS_ADMINISTRATORS:
        windows[home] = owner
        CacheStore(home / "compiled", home / "key")


def test_an_owner_that_cannot_be_found_out_is_an_error_with_its_reason(windows, home, monkeypatch):
    def fail(path):
        raise OSError(5, "Access is denied")
    monkeypatch.setattr(system, "windows_owner", fail)
    with pytest.raises(CacheError, match="Access is denied"):
        CacheStore(home / "compiled", home / "key")


def test_the_lock_of_a_dead_process_is_taken_over_though_nobody_can_ask_for_the_process(windows, home, monkeypatch):
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.3)
    store = CacheStore(home / "compiled", home / "key")
    lock = put(store).with_name(".lock-entry")
    lock.write_text(f"{here()} 999999999")
    for expected in (False, True):
        with store.lock(PLACE, "entry") as alone:
            assert alone is expected
        time.sleep(0.4)


@pytest.mark.parametrize("times", [3, 10**6])
def test_a_file_that_is_open_somewhere_is_replaced_when_it_is_closed_or_said_to_be_in_use(windows, home, monkeypatch, times):
    store = CacheStore(home / "compiled", home / "key")
    entry, refusals = put(store), []

    def rename(source, target):
        if str(source) == str(entry) and len(refusals) < times:
            refusals.append(source)
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        os.replace(source, target)
    monkeypatch.setattr(move, "__defaults__", (rename,))
    monkeypatch.setattr(whole, "RENAME_SECONDS", 0.5)
    if times == 3:
        put(store, replace=True, content=b"new")
    else:
        with pytest.raises(PermissionError, match="being used by another process"):
            put(store, replace=True, content=b"new")
    assert store.entry(entry).read("artifact.pt2") == (b"new" if times == 3 else b"code")


@pytest.mark.parametrize("name", ["NUL", "con", "nul.zip", "COM1", "lpt9.pt2", "aux.tar.gz", "name.", "name ", "..", "a..", "",
                                  "com1", "COM¹", "lpt².pt2", "con.x_00001_.zip"])
def test_names_that_windows_reserves_are_in_no_bundle(name):
    assert not is_name(name)


def test_a_method_of_such_a_name_has_a_folder_of_another():
    import torch
    from int8_compile.compile.artifacts.cache_compile import cache_compile

    class Net(torch.nn.Module):
        def aux(self, x):
            return x + 1

        def auxiliary(self, x):
            return x + 1

    net = Net()
    for method, name in ((net.aux, "aux_"), (net.auxiliary, "auxiliary")):
        assert cache_compile(method)._place(flatten((torch.ones(2),), {})).endswith(f"/single/{name}")


@pytest.mark.parametrize("name", ["null", "console.pt2", "com", "com10", "manifest.json", "a", "Block_dynamic_aoti_0123", "nul-a"])
def test_other_names_are(name):
    assert is_name(name)


def test_an_entry_that_cannot_be_renamed_is_deleted_later_not_in_part(windows, home, monkeypatch):
    """Somebody reads one of its files: half of the entry would be a damaged one."""
    store = CacheStore(home / "compiled", home / "key")
    entry = put(store)

    def refuse(source, target):
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")
    with monkeypatch.context() as open_somewhere:
        open_somewhere.setattr(os, "rename", refuse)
        assert store.clear() == (0, 0)
        store.limit = 0
        store.evict()
    assert store.whole(entry).read("artifact.pt2") == b"code"
    assert store.clear()[0] == 1 and not store.all()


@pytest.mark.parametrize("call", ["open", "unlink"])
def test_a_lock_that_another_process_looks_at_is_taken_and_given_back_when_it_has_looked(windows, home, monkeypatch, call):
    """A deleted file is there, and refused, until the last who has it open closes it; one that is open cannot be deleted."""
    store, refusals = CacheStore(home / "compiled", home / "key"), []
    lock, real = put(store).with_name(".lock-entry"), {"open": os.open, "unlink": os.unlink}[call]

    def patient(path, *arguments, **named):
        if str(path) == str(lock) and len(refusals) < 3:
            refusals.append(path)
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        return real(path, *arguments, **named)
    monkeypatch.setattr(os, call, patient)
    for _ in range(2):
        with store.lock(PLACE, "entry") as alone:
            assert alone
        assert not lock.exists()
    assert len(refusals) == 3


@pytest.mark.parametrize("whose, good", [(ME, True), (INSTALLER, True), (OTHER, False)])
@pytest.mark.parametrize("what", ["list", "folder"])
def test_the_list_of_trusted_bundles_is_of_this_user_or_the_administrators(windows, home, monkeypatch, what, whose, good):
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(home / "keys" / "key"))
    path = trusted_bundles.set_trusted("0" * 64)
    windows[path if what == "list" else path.parent] = whose
    if good:
        assert list(trusted_bundles.trusted()) == ["0" * 64]
    else:
        with pytest.raises(CacheError, match="belongs to another user"):
            trusted_bundles.trusted()


# What is asked of Windows itself: each function with the types that it is declared with, as a 64-bit process needs them.


class Function:
    """A function of a DLL: converts as ctypes does by argtypes, which must be given; of restype only the default for what is wider."""

    def __init__(self, name: str, does, wide: bool):
        self.name, self.does, self.wide = name, does, wide
        self.argtypes = self.restype = None

    def __call__(self, *arguments):
        assert self.argtypes is not None or not arguments, f"{self.name} without argtypes"
        for kind, argument in zip(self.argtypes or (), arguments, strict=True):
            kind.from_param(argument)
        assert not self.wide or self.restype is not None, f"{self.name} returns a handle and has no restype"
        return self.does(*arguments)


@pytest.fixture
def dlls(monkeypatch):
    """dlls(name=what it does): functions that Windows has; -> the names of those that were called."""
    called = []

    def dlls(wide=(), **functions):
        class Library:
            def __init__(self, name, use_last_error=False):
                self.made = {}

            def __getattr__(self, name):
                def does(*arguments):
                    called.append(name)
                    return functions[name](*arguments)
                return self.made.setdefault(name, Function(name, does, name in wide))
        monkeypatch.setattr(ctypes, "WinDLL", Library, raising=False)
        return called
    return dlls


@pytest.mark.parametrize("opened, error, waited, ended", [
    (None, 87, None, True), (None, 5, None, False), (1 << 40, 0, 0, True), (1 << 40, 0, 258, False)],
    ids=["there is none", "another user's", "it has ended", "it runs"])
def test_whether_a_process_has_ended_is_asked_and_nothing_is_done_to_it(dlls, monkeypatch, opened, error, waited, ended):
    asked = []
    called = dlls(wide=("OpenProcess",), OpenProcess=lambda access, inherit, pid: asked.append((access, inherit, pid)) or opened,
                  WaitForSingleObject=lambda process, milliseconds: waited, CloseHandle=lambda process: 1)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: error, raising=False)
    monkeypatch.setattr(system, "IS_POSIX", False)
    assert has_ended(here(), "4321") is ended
    assert asked == [(0x00100000, False, 4321)]  # SYNCHRONIZE: no right to end it
    assert called == ["OpenProcess", *(["WaitForSingleObject", "CloseHandle"] if opened else [])]
    assert not has_ended("elsewhere", "4321") and not has_ended(here(), "9" * 20)


def test_the_owner_of_a_file_and_the_user_are_their_sids(dlls):
    def owner_of(path, kind, what, owner, *more):
        assert (path, kind, what) == ("C:\\x", 1, 1) and more[:3] == (None, None, None)
        owner._obj.value, more[3]._obj.value = 7 << 40, 9 << 40
        return 0

    def text_of(sid, text):
        assert sid.value == 7 << 40
        text._obj.value = ctypes.addressof(buffer)
        return 1

    def user(token, kind, content, size, needed):
        assert kind == 1 and size >= 84
        ctypes.c_void_p.from_buffer(content).value = 7 << 40
        return 1
    buffer, freed = ctypes.create_unicode_buffer(ME), []
    called = dlls(wide=("GetCurrentProcess", "GetNamedSecurityInfoW"), GetNamedSecurityInfoW=owner_of, ConvertSidToStringSidW=text_of,
                  LocalFree=lambda pointer: freed.append(pointer.value), GetCurrentProcess=lambda: -1,
                  OpenProcessToken=lambda process, access, token: 1, GetTokenInformation=user, CloseHandle=lambda handle: 1)
    assert system.windows_owner("C:\\x") == ME
    assert freed == [ctypes.addressof(buffer), 9 << 40], "the text, and the descriptor that the owner is in"
    system.windows_user.cache_clear()
    try:
        assert system.windows_user() == ME and called[-1] == "CloseHandle"
    finally:
        system.windows_user.cache_clear()
