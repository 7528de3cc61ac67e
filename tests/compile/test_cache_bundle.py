"""Bundles: what one machine has compiled is served on another, and nothing else gets in."""
from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from int8_compile.compile.artifacts import bundle as cache_bundle
from int8_compile.compile.artifacts.bundle import load_bundle, read_bundle, save_bundle
from int8_compile.compile.artifacts.entry import MANIFEST
from int8_compile.compile.artifacts.store import CacheStore

GROUP = "Block_dynamic_aoti_0123456789abcdef"
PLACE = f"{GROUP}/single/forward"
ARTEFACT = "artifact.pt2"
BODY = {"name": "Block", "device": "cuda", "torch": "2.11.0+cu130"}


def put(store: CacheStore, name: str, place: str = PLACE, content: bytes = b"code" * 1000, **body) -> Path:
    with store.writing(place, name) as (folder, finish):
        (folder / ARTEFACT).write_bytes(content)
        (folder / "readable.py").write_text("# what it does")
        finish({**BODY, **body})
    return store.base / place / name


def content_of(store: CacheStore) -> dict:
    return {folder.relative_to(store.base).as_posix(): {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
            for folder in store.own()}


@pytest.fixture
def here(tmp_path):
    store = CacheStore(tmp_path / "here", tmp_path / "here.key")
    put(store, "aaaaaaaaaaaa")
    put(store, "bbbbbbbbbbbb", content=os.urandom(3 << 20), device="cpu")
    put(store, "aaaaaaaaaaaa", f"{GROUP[:-1]}e/world2global_rank1_tp_rank0/forward")
    return store


@pytest.fixture
def there(tmp_path):
    return CacheStore(tmp_path / "there", tmp_path / "there.key")


@pytest.fixture
def bundle(here, tmp_path):
    path = tmp_path / "bundle.zip"
    save_bundle(here, here.own(), path)
    return path


def test_what_one_store_has_another_serves_after_loading(here, there, tmp_path):
    path = tmp_path / "bundles" / "bundle.zip"
    digest = save_bundle(here, here.own(), path)
    found = read_bundle(path)
    assert digest == found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_bundle(there, found) == (3, 0)
    assert content_of(there) == content_of(here)
    bodies = [[store.whole(folder).body for folder in store.own()] for store in (here, there)]
    assert bodies[0] == bodies[1] and here.base.name != there.base.name
    assert load_bundle(there, found) == (0, 3)


def test_it_says_what_it_holds(bundle):
    found = read_bundle(bundle)
    assert found.contents().splitlines() == ["Block for cpu, torch 2.11.0+cu130: 1 compiled, 3.1 MB",
                                             "Block for cuda, torch 2.11.0+cu130: 2 compiled, 0.0 MB"]
    assert 3_000_000 < found.size < 3_300_000


def test_the_same_entries_give_the_same_digest(here, bundle, tmp_path):
    assert save_bundle(here, here.own()[::-1], tmp_path / "again.zip") == read_bundle(bundle).digest


def test_only_the_entries_asked_for_are_saved(here, tmp_path):
    save_bundle(here, here.own()[:1], tmp_path / "one.zip")
    assert len(read_bundle(tmp_path / "one.zip").held) == 1


def test_damaged_entries_are_left_out_and_without_a_good_one_there_is_no_file(here, tmp_path):
    for index, folder in enumerate(here.own()):
        (folder / ARTEFACT).write_bytes(b"other code")
        path = tmp_path / "out" / f"{index}.zip"
        if index < 2:
            save_bundle(here, here.own(), path)
            assert len(read_bundle(path).held) == 2 - index
    with pytest.raises(ValueError, match="nothing compiled to save"):
        save_bundle(here, here.own(), path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["0.zip", "1.zip"]


def test_a_damaged_entry_is_replaced_by_the_bundles(here, there, bundle):
    load_bundle(there, read_bundle(bundle))
    (there.own()[0] / ARTEFACT).write_bytes(b"")
    assert load_bundle(there, read_bundle(bundle)) == (1, 2)
    assert content_of(there) == content_of(here)


def test_a_bundle_larger_than_the_cache_may_be_is_refused(there, bundle):
    there.limit = 1 << 20
    with pytest.raises(ValueError, match="INT8_COMPILE_CACHE_SIZE"):
        load_bundle(there, read_bundle(bundle))
    assert not there.all()


def test_loading_looks_at_the_whole_cache_once_and_can_be_interrupted_between_two(there, bundle, monkeypatch):
    looks, ticks = [], []
    evict = CacheStore.evict
    monkeypatch.setattr(CacheStore, "evict", lambda store: (looks.append(len(store.own())), evict(store)))

    def tick():
        ticks.append(None)
        if len(ticks) == 2:
            raise KeyboardInterrupt
    found = read_bundle(bundle)
    with pytest.raises(KeyboardInterrupt):
        load_bundle(there, found, tick)
    assert looks == [1] and load_bundle(there, found) == (2, 1) and looks == [1, 3]


def test_a_bundle_that_is_changed_after_the_check_is_loaded_as_it_was_checked(here, there, bundle, tmp_path):
    """Written in place, as uploads do, or replaced."""
    found, again = read_bundle(bundle), read_bundle(bundle)
    bundle.write_bytes(hostile(tmp_path, {}).read_bytes())
    assert load_bundle(there, found) == (3, 0) and content_of(there) == content_of(here)
    there.clear()
    os.replace(tmp_path / "hostile.zip", bundle)
    assert load_bundle(there, again) == (3, 0) and content_of(there) == content_of(here)


def test_an_archive_comment_is_refused(bundle):
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.comment = b"any bytes"
    rejected(bundle, "it has a comment")


def test_what_is_saved_keeps_a_limit(here, tmp_path):
    with pytest.raises(ValueError, match=r"larger than the 1\.0 MB that bundles may still take"):
        save_bundle(here, here.own(), tmp_path / "saved" / "large.zip", 1_000_000)
    assert not list((tmp_path / "saved").iterdir())


def test_what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not(tmp_path):
    old, new, busy = (tmp_path / f".bundle-{name}" for name in ("old", "new", "busy"))
    for path in (old, new, busy):
        path.write_bytes(b"part")
    for path in (old, busy):
        os.utime(path, (1, 1))
    with busy.open("rb") as file:
        cache_bundle._lock(file.fileno())
        cache_bundle.sweep(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".bundle-busy", ".bundle-new"] if os.name == "posix" else [".bundle-new"]
    cache_bundle.sweep(tmp_path / "none")


def rejected(path: Path, message: str = "damaged or no bundle"):
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match=message) as raised:
        read_bundle(path)
    assert path.name in str(raised.value) and len(str(raised.value)) < 1000
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + bytes(18), b"\x80\x04]."])
def test_a_file_that_is_no_bundle_is_refused(tmp_path, content):
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    rejected(path)


def test_a_bundle_cut_off_anywhere_is_refused(bundle):
    content = bundle.read_bytes()
    for end in (*range(0, len(content), len(content) // 40), len(content) - 1):
        bundle.write_bytes(content[:end])
        rejected(bundle)


def test_a_flipped_bit_is_found_or_changes_nothing_but_the_digest(bundle):
    """Some bytes of a zip mean nothing: dates, attributes."""
    content = bundle.read_bytes()
    digest = read_bundle(bundle).digest
    held = read_bundle(bundle).held
    for position in (*range(0, 3000, 67), *range(len(content) - 1500, len(content), 17)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        bundle.write_bytes(changed)
        try:
            found = read_bundle(bundle)
        except ValueError:
            continue
        assert found.digest != digest and found.held == held


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("bundle.zip"), os.mkfifo])
def test_a_link_or_folder_or_pipe_is_refused(bundle, make):
    path = bundle.with_name("other.zip")
    make(path)
    rejected(path, "a link or a folder")


def hostile(tmp_path: Path, files: dict[str, bytes], **body) -> Path:
    """A bundle with a good entry and these files, each with the manifest that its folder needs."""
    path = tmp_path / "hostile.zip"
    folders: dict[str, dict[str, bytes]] = {f"{PLACE}/aaaaaaaaaaaa": {ARTEFACT: b"code"}}
    for name, content in files.items():
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, {})[file] = content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, inside in folders.items():
            digests = {file: hashlib.sha256(content).hexdigest() for file, content in inside.items() if file != MANIFEST}
            for file, content in {MANIFEST: json.dumps({"body": {**BODY, **body, "files": digests}}).encode(), **inside}.items():
                archive.writestr(f"{folder}/{file}", content)
    return path


def test_the_hostile_bundles_below_are_good_but_for_one_thing(tmp_path):
    assert len(read_bundle(hostile(tmp_path, {f"{PLACE}/bbbbbbbbbbbb/{ARTEFACT}": b"code"})).held) == 2


@pytest.mark.parametrize("name", [
    f"../{PLACE}/x", f"{GROUP}/../forward/entry/x", f"{PLACE}/../x", f"{PLACE}/entry/..", f"/{PLACE}/x", f"//{GROUP}/forward/entry/x",
    f"{PLACE}/entry/sub/x", f"{GROUP}/forward/entry/x", "x", f"{PLACE}/entry/.hidden", f"{PLACE}/.bad-entry/x", f"{PLACE}/.tmp-entry/x",
    f"{PLACE}/entry/C:x", f"{PLACE}/entry/a\\b", "..\\..\\x", f"{PLACE}/entry/x.", f"{PLACE}/entry/ x", f"{PLACE}/entry/a\x1bb",
    f"{PLACE}/entry/{'x' * 201}", f"{PLACE}/entry/{'名' * 67}", f"{PLACE}/./x", f"~/{GROUP}/forward/entry/x"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    rejected(hostile(tmp_path, {name: b"code"}), "it has a file named")


def test_a_name_twice_is_refused(tmp_path):
    rejected(hostile(tmp_path, {f"{PLACE}/aaaaaaaaaaaa/{ARTEFACT.upper()}": b"code"}), "it has a file named")


@pytest.mark.parametrize("manifest", [
    b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"body": []}', b'{"body": {"files": []}}', b'{"body": {"files": {}}}',
    json.dumps({"body": {**BODY, "files": {"x": "0" * 64}}}).encode(),
    json.dumps({"body": {**BODY, "files": {"x": None}}}).encode(),
    json.dumps({"body": {**BODY, "files": {"x": hashlib.sha256(b"code").hexdigest(), "../y": "0" * 64}}}).encode(),
    b'{"body": {"name": %s}}' % (b"1" * 5000)])
def test_a_manifest_that_does_not_match_its_files_is_refused(tmp_path, manifest):
    rejected(hostile(tmp_path, {f"{PLACE}/entry/x": b"code", f"{PLACE}/entry/{MANIFEST}": manifest}))


def test_an_entry_without_manifest_is_refused(bundle):
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.writestr(f"{PLACE}/cccccccccccc/{ARTEFACT}", b"code")
    rejected(bundle, "has no manifest.json")


@pytest.mark.parametrize("body", [{"name": "Block\n\x1b[2J"}, {"torch": 2}, {"device": "x" * 1000}, {"name": ""}])
def test_what_a_person_is_to_read_must_be_readable(tmp_path, body):
    rejected(hostile(tmp_path, {}, **body))


@pytest.mark.parametrize("limit, value, message", [
    ("MAX_BYTES", 5 << 20, "unpacks to more"), ("MAX_FILE_BYTES", 1 << 20, "x in it is too large"), ("MAX_MANIFEST_BYTES", 10, "too large"),
    ("MAX_ENTRIES", 1, "more than a bundle can hold"), ("MAX_FILES", 1, "more than a bundle can hold"),
    ("MAX_MANIFESTS_BYTES", 300, "more than a bundle can hold"), ("MAX_DIRECTORY_BYTES", 300, "its directory is larger")])
def test_sizes_are_checked_before_anything_is_unpacked(tmp_path, monkeypatch, limit, value, message):
    path = hostile(tmp_path, {f"{PLACE}/entry/x": bytes(10 << 20)})
    assert path.stat().st_size < 100_000
    read_bundle(path)
    monkeypatch.setattr(cache_bundle, limit, value)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    rejected(path, message)


def test_a_file_of_very_many_names_is_refused_at_once(tmp_path):
    """Python would read them all before anything can be asked."""
    path, record = tmp_path / "names.zip", struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    content = (record + b"x") * 1_000_000
    path.write_bytes(content + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(content), 0, 0))
    start = time.monotonic()
    rejected(path, "its directory is larger")
    assert time.monotonic() - start < 10


def test_a_large_file_that_is_no_zip_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_bundle, "_copy", None)
    path = tmp_path / "large.zip"
    path.write_bytes(b"x" * 10_000)
    rejected(path, "it is no zip file")


def test_reading_can_be_interrupted_at_each_entry_and_each_mb(tmp_path):
    class Interrupted(Exception):
        pass
    path, ticks = hostile(tmp_path, {f"{PLACE}/bbbbbbbbbbbb/{ARTEFACT}": os.urandom(3 << 20)}), []
    read_bundle(path, tick=lambda: ticks.append(1)).copy.close()
    assert len(ticks) >= 4 + 2 + 3 + 1

    def interrupt():
        raise Interrupted
    with pytest.raises(Interrupted):
        read_bundle(path, tick=interrupt)


def test_a_file_larger_than_a_bundle_can_be_is_not_read(bundle, monkeypatch):
    monkeypatch.setattr(cache_bundle, "MAX_BYTES", 1000)
    rejected(bundle, "larger than a bundle can be")


def test_a_file_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    path = hostile(tmp_path, {f"{PLACE}/entry/x": bytes(1 << 20)})
    content = path.read_bytes()
    assert content.count((1 << 20).to_bytes(4, "little")) == 2
    path.write_bytes(content.replace((1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    rejected(path)


def test_what_a_file_says_of_its_size_is_all_that_is_unpacked(here, tmp_path):
    """zipfile's read() unpacks up to a GiB, and then cuts it."""
    size, digest = 300 << 20, hashlib.sha256(b"code").hexdigest()
    head = json.dumps({"body": {**BODY, "files": {ARTEFACT: digest}}}).encode()
    path = hostile(tmp_path, {f"{PLACE}/entry/{MANIFEST}": head + b" " * size, f"{PLACE}/entry/{ARTEFACT}": b"code"})
    content = path.read_bytes()
    for is_said, instead in ((len(head) + size, len(head)), (zlib.crc32(head + b" " * size), zlib.crc32(head))):
        assert content.count(is_said.to_bytes(4, "little")) == 2
        content = content.replace(is_said.to_bytes(4, "little"), instead.to_bytes(4, "little"))
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with (found := read_bundle(path)).copy:
            load_bundle(here, found)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_file_that_is_packed_in_another_way_is_refused_unread(tmp_path, kind):
    """LZMA asks for as much memory as the file says."""
    path = hostile(tmp_path, {})
    with zipfile.ZipFile(path) as archive:
        files = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for info, content in files.items():
            archive.writestr(info.filename, content, kind)
    rejected(path, "packed in another way")


def test_what_is_kept_of_a_bundle_is_small_whatever_its_manifests_say(tmp_path):
    """Empty lists, as Python has them, take twenty times their text: a bundle of 20 MB took all memory before it was trusted."""
    content = hashlib.sha256(b"code").hexdigest()
    manifest = json.dumps({"body": {"name": "Block", "device": "cpu", "torch": "2.11.0", "files": {"x": content}, "more": [[]] * 250_000}})
    entries = {f"{PLACE}/entry{number}/{name}": text for number in range(8)
               for name, text in (("x", b"code"), (MANIFEST, manifest.encode()))}
    with (found := read_bundle(hostile(tmp_path, entries))).copy:
        assert len(found.held) == 9 and len(pickle.dumps(found.held)) < 10_000


def test_an_encrypted_file_is_refused(tmp_path):
    path = hostile(tmp_path, {})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    rejected(path)
