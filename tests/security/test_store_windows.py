"""What differs on Windows, with the platform stood in for: only what Python and Windows do is, not what the pack does."""
from __future__ import annotations

import os
import time

import pytest
from int8_compile.compile.cache_bundle import _NAME
from int8_compile.compile.cache_store import CacheError, CacheStore
from int8_compile.int8 import own_files

ME, OTHER, SYSTEM, INSTALLER = "S-1-5-21-1-2-3-1001", "S-1-5-21-1-2-3-1002", "S-1-5-18", own_files._WINDOWS_ADMINISTRATORS[-1]
PLACE = "Block_dynamic_aoti_0123/single/forward"


@pytest.fixture
def windows(monkeypatch):
    """{path: owner}, all others being the system's above the user's folder and the user's in it."""
    owners: dict = {}
    monkeypatch.setattr(own_files, "IS_POSIX", False)
    monkeypatch.setattr(own_files, "windows_user", lambda: ME)
    monkeypatch.setattr(own_files, "windows_owner", lambda path: owners.get(path, ME if "int8-user" in str(path) else INSTALLER))
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
    monkeypatch.setattr(own_files, "windows_owner", lambda path: "S-1-5-32-544")
    put(CacheStore(home / "compiled", home / "key"))
    assert [entry.read("artifact.pt2") for entry in CacheStore(home / "compiled", home / "key").entries(PLACE)] == [b"code"]


def test_folders_of_the_system_and_its_administrators_may_be_above(windows, home):
    for owner in own_files._WINDOWS_ADMINISTRATORS:
        windows[home] = owner
        CacheStore(home / "compiled", home / "key")


def test_an_owner_that_cannot_be_found_out_is_an_error_with_its_reason(windows, home, monkeypatch):
    def fail(path):
        raise OSError(5, "Access is denied")
    monkeypatch.setattr(own_files, "windows_owner", fail)
    with pytest.raises(CacheError, match="Access is denied"):
        CacheStore(home / "compiled", home / "key")


def test_the_lock_of_a_dead_process_is_taken_over_though_nobody_can_ask_for_the_process(windows, home, monkeypatch):
    monkeypatch.setattr(own_files, "SILENT_SECONDS", 0.3)
    store = CacheStore(home / "compiled", home / "key")
    lock = put(store).with_name(".lock-entry")
    lock.write_text(f"{own_files.here()} 999999999")
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
    monkeypatch.setattr(own_files.move, "__defaults__", (rename,))
    monkeypatch.setattr(own_files, "RENAME_SECONDS", 0.5)
    if times == 3:
        put(store, replace=True, content=b"new")
    else:
        with pytest.raises(PermissionError, match="being used by another process"):
            put(store, replace=True, content=b"new")
    assert store.entry(entry).read("artifact.pt2") == (b"new" if times == 3 else b"code")


@pytest.mark.parametrize("name", ["NUL", "con", "nul.zip", "COM1", "lpt9.pt2", "aux.tar.gz", "name.", "name ", "..", "a..", ""])
def test_names_that_windows_reserves_are_in_no_bundle(name):
    assert not _NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["null", "console.pt2", "com", "com10", "manifest.json", "a", "Block_dynamic_aoti_0123", "nul-a"])
def test_other_names_are(name):
    assert _NAME.fullmatch(name)
