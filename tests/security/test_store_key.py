"""The signing key: nobody but its user can know it, have written it, or lose it."""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from int8_compile.compile.artifacts.store import CacheError, CacheStore
from int8_compile.int8.files.signed import KEY_BYTES, signing_key

posix_only = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")


@pytest.fixture
def home():
    home = Path(tempfile.mkdtemp(prefix="int8-compile-test-"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


def given(home: Path, content: bytes = b"k" * KEY_BYTES, mode: int = 0o600) -> Path:
    key = home / "keys" / "key"
    key.parent.mkdir(mode=0o700, exist_ok=True)
    key.write_bytes(content)
    key.chmod(mode)
    return key


def test_a_given_key_is_taken_as_it_is(home):
    for content in (b"k" * KEY_BYTES, os.urandom(100)):
        assert signing_key(given(home, content)) == content


@pytest.mark.parametrize("content, message", [
    (b"", "has 0 bytes; 32 are needed"), (b"correct horse staple", "has 20 bytes"), (b"k" * 31, "has 31 bytes"),
    (bytes(KEY_BYTES), "all zeros"), (bytes(100), "all zeros")])
def test_a_key_that_can_be_guessed_is_an_error_and_stays(home, content, message):
    key = given(home, content)
    os.utime(key, (0, 0))
    with pytest.raises(CacheError, match=message):
        CacheStore(home / "cache", key)
    assert key.read_bytes() == content


@posix_only
@pytest.mark.parametrize("mode, message", [(0o644, "can be read by others: chmod 600"), (0o640, "can be read by others"),
                                           (0o604, "can be read by others"), (0o620, "chmod go-w"), (0o602, "chmod go-w")])
def test_a_key_that_others_can_read_or_write_is_an_error(home, mode, message):
    with pytest.raises(CacheError, match=message):
        CacheStore(home / "cache", given(home, mode=mode))


@posix_only
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_key_in_a_shared_folder_is_an_error(home, mode):
    key = given(home)
    if mode == 0o770 and not os.getuid():
        os.chown(key.parent, 0, 60000)  # a group that is not this user's own
    key.parent.chmod(mode)
    with pytest.raises(CacheError, match=r"can be written by others|others can write to"):
        CacheStore(home / "cache", key)
    key.unlink()
    with pytest.raises(CacheError):
        CacheStore(home / "cache", key)
    assert not list(key.parent.iterdir()), "nor is one made there"


@pytest.mark.parametrize("place", ["cache/key", "cache/v1/key", "link/key"])
def test_a_key_in_the_cache_that_it_signs_is_an_error(home, place, monkeypatch):
    (home / "cache").mkdir(mode=0o700)
    if place.startswith("link"):
        (home / "link").symlink_to("cache")
    with pytest.raises(CacheError, match="must not be in the cache"):
        CacheStore(home / "cache", home / place)
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(home / "cache"))
    with pytest.raises(CacheError, match="must not be in the cache"):
        CacheStore(home / "elsewhere", home / place)


def test_a_key_file_that_names_no_file_is_an_error(home):
    with pytest.raises(CacheError, match="is no file"):
        CacheStore(home / "cache", Path(home.anchor))


@posix_only
@pytest.mark.parametrize("make", [lambda key: os.mkfifo(key, 0o600), lambda key: key.mkdir(mode=0o700),
                                  lambda key: key.symlink_to("/dev/zero"), lambda key: key.symlink_to(key),
                                  lambda key: os.truncate(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600), 1 << 40)],
                         ids=["pipe", "folder", "link", "loop", "huge"])
def test_a_key_that_is_no_file_is_an_error_at_once(home, make):
    key = given(home)
    key.unlink()
    make(key)
    done = threading.Event()

    def attempt():
        with pytest.raises(CacheError):
            CacheStore(home / "cache", key)
        done.set()
    threading.Thread(target=attempt, daemon=True).start()
    assert done.wait(5)


@posix_only
def test_processes_that_start_together_get_one_key(home):
    """Forked after all is imported, and let go together, so that they do meet."""
    for attempt in range(10):
        key, (ready, go), (source, target) = home / f"{attempt}" / "key", os.pipe(), os.pipe()
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                os.close(go)
                os.read(ready, 1)  # the end of the pipe
                try:
                    os.write(target, signing_key(key))
                finally:
                    os._exit(0)
            children.append(child)
        for end in (ready, go, target):
            os.close(end)
        with os.fdopen(source, "rb") as file:
            keys = file.read()
        for child in children:
            os.waitpid(child, 0)
        assert keys == key.read_bytes() * 8 and len(keys) == 8 * KEY_BYTES
        assert [path.name for path in key.parent.iterdir()] == ["key"]


@posix_only
def test_processes_that_start_together_get_one_key_where_there_are_no_hard_links(home, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    test_processes_that_start_together_get_one_key(home)


@posix_only
def test_on_a_full_disk_there_is_no_key_and_no_cache(home, monkeypatch):
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")
    try:
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"0" * 100)
        for links in (True, False):
            if not links:
                monkeypatch.setattr(os, "link", refuse)
            with pytest.raises(CacheError, match="cannot be used"):
                CacheStore(home / "cache", disk / "key")
            assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        CacheStore(home / "cache", disk / "key")
        assert (disk / "key").stat().st_size == KEY_BYTES
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
