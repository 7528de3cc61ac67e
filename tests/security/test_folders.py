"""Where compiled code lies, and which of it is trusted: said by whoever starts the server, by nobody else."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from int8_compile.compile.artifacts import trusted_bundles
from int8_compile.compile.artifacts.bundle import read_bundle, save_bundle
from int8_compile.compile.artifacts.store import CacheError, CacheStore
from int8_compile.int8.echo import MAX_CHARACTERS, echo, without_commands, without_folders, writable

REPO = Path(__file__).resolve().parents[2]
DIGEST = "0123456789abcdef" * 4
pytestmark = pytest.mark.comfy


@pytest.fixture
def cache(comfy, tmp_path, monkeypatch):
    """compile.comfy_cache of a ComfyUI that lies in tmp_path."""
    import folder_paths
    from int8_compile.compile.comfyui import artifact_cache, user_settings

    for name in ("input", "output", "temp", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    (tmp_path / "models" / "loras").mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "models" / "loras")], set()))
    for name in ("INT8_COMPILE_CACHE", "INT8_COMPILE_CACHE_DIR", "INT8_COMPILE_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path / "key" / "cache.key"))
    user_settings._said.clear()
    artifact_cache._cache.cache_clear()
    yield artifact_cache
    artifact_cache._cache.cache_clear()


def settings(tmp_path, text: str):
    (tmp_path / "user" / "default").mkdir(exist_ok=True)
    (tmp_path / "user" / "default" / "comfy.settings.json").write_text(text)


def test_no_setting_says_where_code_lies(cache, tmp_path):
    settings(tmp_path, json.dumps({"INT8Compile.Cache.Folder": str(tmp_path / "output")}))
    assert cache.folder() == tmp_path / "user" / "__int8_compile"
    cache.open_store()


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices in folders are POSIX")
@pytest.mark.parametrize("make", [
    lambda path: os.mkfifo(path), os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path),
    lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))])
def test_settings_that_are_no_file_are_none(cache, tmp_path, caplog, make):
    """They are read before each prompt, by what answers all clients."""
    path = tmp_path / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(exist_ok=True)
    from int8_compile.compile.comfyui import user_settings

    make(path)
    for _ in range(2):
        assert user_settings.settings() == {}
    assert caplog.text.count("ComfyUI's settings cannot be read") == 1


def test_settings_are_read_once_for_each_change_and_only_this_packs(cache, tmp_path, monkeypatch):
    """Any client may write 4 MB of others."""
    from int8_compile.compile.comfyui import user_settings

    path, read = tmp_path / "user" / "default" / "comfy.settings.json", []
    monkeypatch.setattr(user_settings, "read_regular", lambda path, size: read.append(path) or path.read_bytes())
    for limit in (1, 2, 2, 3):
        settings(tmp_path, json.dumps({"INT8Compile.Cache.SizeLimit": limit, "Comfy.Other": [[]] * 100}))
        os.utime(path, (len(read), len(read)))  # a test writes faster than a file system's clock goes
        for _ in range(3):
            assert user_settings.settings() == {"INT8Compile.Cache.SizeLimit": limit}
    assert len(read) == 4
    path.unlink()
    assert user_settings.settings() == {}


@pytest.mark.parametrize("inside", ["input", "output", "temp", "models/loras", "output/a/b", "user", "user/default", "user/default/x",
                                    "link/x", ""])
def test_a_folder_that_clients_reach_is_refused_in_one_line(cache, tmp_path, monkeypatch, caplog, inside):
    (tmp_path / "link").symlink_to(tmp_path / "output")
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / inside))
    if not inside:  # around everything: then only what lies in the way of compiled code counts, and the key must not be in it
        monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path.with_name(f"{tmp_path.name}-key") / "cache.key"))
        cache.open_store()
        return
    where = r"(in ComfyUI's \w+ folder|among ComfyUI's user data)"
    with pytest.raises(CacheError, match=f"the compile cache must not be {where}, nor around it") as raised:
        cache.open_store()
    assert "\n" not in str(raised.value) and str(tmp_path) not in str(raised.value)
    with pytest.raises(CacheError):
        cache.bundles()
    assert not list(tmp_path.rglob("compiled")) and not list(tmp_path.rglob("bundles"))
    for _ in range(3):
        assert cache.get_cache() is None
    assert sum("nothing is kept for the next start" in record.message for record in caplog.records) == 1


def test_nor_may_what_clients_reach_lie_inside(cache, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "cache" / "bundles" / "out"))
    with pytest.raises(CacheError):
        cache.bundles()
    cache.open_store()


WRONG = ("null", "[]", "{}", "true", '"5"', "Infinity", "-Infinity", "NaN", "1e308", "9" * 400, "0", "-5", "1001", '"\\u0000"')


@pytest.mark.parametrize("text", ["null", "[]", "5", '"x"', "[" * 100_000, "{", "", '{"a": "' + "x" * (5 << 20) + '"}',
                                  *('{"INT8Compile.Cache.SizeLimit": ' + value + "}" for value in WRONG)], ids=lambda text: text[:60])
def test_settings_of_any_content_are_as_good_as_none(cache, tmp_path, caplog, text):
    settings(tmp_path, text)
    for _ in range(3):
        assert cache.size_limit() == 5 << 30 and cache.is_enabled() and cache.folder() == tmp_path / "user" / "__int8_compile"
    assert len([record for record in caplog.records if record.message.startswith("INT8 Compile: ")]) <= 1


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "x", "1e400", "[]", "1e300"])
def test_the_variable_too(cache, monkeypatch, value):
    monkeypatch.setenv("INT8_COMPILE_CACHE_SIZE", value)
    assert cache.size_limit() == 5 << 30
    monkeypatch.setenv("INT8_COMPILE_CACHE_SIZE", "0.5")
    assert cache.size_limit() == 1 << 29


def test_changing_the_limit_over_http_starts_nothing_anew(cache, tmp_path):
    first = cache.get_cache()
    for limit in (1, 2, 3):
        settings(tmp_path, json.dumps({"INT8Compile.Cache.SizeLimit": limit}))
        assert cache.get_cache() is first and first.store.limit == limit << 30


def test_bundles_count_in_the_limit_and_take_half_of_it_at_most(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_SIZE", str(1 / 1024))  # 1 MiB
    assert cache.open_store().limit == 1 << 20 and cache.room_for_bundles() == 1 << 19
    (cache.bundles() / "a.zip").write_bytes(bytes(200_000))
    (cache.bundles() / ".bundle-x").write_bytes(bytes(10))
    assert cache.open_store().limit == (1 << 20) - 200_000 and cache.room_for_bundles() == (1 << 19) - 200_000
    (cache.bundles() / "b.zip").write_bytes(bytes(2_000_000))
    assert cache.open_store().limit == 1 << 19 and cache.room_for_bundles() == 0
    assert cache.bundle_sizes() == {"a.zip": 200_000, "b.zip": 2_000_000}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_every_folder_that_is_made_for_bundles_is_its_owners_alone_whatever_the_umask(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(0)
    try:
        made = cache.bundles()
    finally:
        os.umask(before)
    assert made == tmp_path / "a" / "b" / "c" / "bundles"
    assert {folder.stat().st_mode & 0o777 for folder in (made, *list(made.parents)[:3])} == {0o700}
    (tmp_path / "a" / "b").chmod(0o777)
    with pytest.raises(CacheError, match="who could put other files in the place"):
        cache.bundles()


# The list of trusted bundles

@pytest.fixture
def listed(tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path / "key" / "cache.key"))
    (tmp_path / "key").mkdir(mode=0o700)
    return tmp_path / "key" / "trusted_bundles.txt"


def test_what_is_on_the_list_is_trusted_and_nothing_else(listed):
    assert trusted_bundles.trusted() == {}
    listed.write_text(f"# a comment\n\n{DIGEST}  from the first server # noted\n{DIGEST[:63]}\n{DIGEST}0\n{DIGEST.upper()}\n  \x00\n")
    listed.chmod(0o600)
    assert trusted_bundles.trusted() == {DIGEST: "from the first server"}
    listed.write_bytes(b"\xff\xfe" * 100_000)
    assert trusted_bundles.trusted() == {}


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a user's folder to the user")
@pytest.mark.parametrize("spoil", [
    lambda path: path.chmod(0o666), lambda path: path.chmod(0o620), lambda path: path.parent.chmod(0o777),
    lambda path: path.parent.parent.chmod(0o777),
    lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")), lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    lambda path: (path.unlink(), path.mkdir())])
def test_a_list_that_others_could_have_written_is_none(listed, spoil):
    trusted_bundles.set_trusted(DIGEST)
    spoil(listed)
    started = time.monotonic()
    with pytest.raises((CacheError, OSError)):
        trusted_bundles.trusted()
    assert time.monotonic() - started < 1


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a file to another user")
def test_a_list_of_another_user_is_none(listed):
    trusted_bundles.set_trusted(DIGEST)
    os.chown(listed, 65534, 65534)
    with pytest.raises(CacheError, match="belongs to another user"):
        trusted_bundles.trusted()


def command(*arguments, cwd=REPO, how=("-m", "trust")):
    run = subprocess.run([sys.executable, *how, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    return run.returncode, run.stdout + run.stderr


def test_the_command_trusts_lists_and_removes_without_torch(listed, tmp_path):
    store = CacheStore(tmp_path / "store", tmp_path / "key" / "cache.key")
    with store.writing("Block_dynamic_aoti_0123456789abcdef/single/forward", "aaaaaaaaaaaa") as (folder, finish):
        (folder / "artifact.pt2").write_bytes(b"code")
        finish({"name": "Block", "device": "cpu", "torch": "2.11.0"})
    path = tmp_path / "a bundle.zip"
    digest = save_bundle(store, store.own(), path)
    code, said = command(path)
    assert code == 0 and f"{digest} is trusted, says {listed}" in said and "Block for cpu" in said
    assert (listed.stat().st_mode & 0o777) == 0o600
    assert command(DIGEST, how=("-I", str(REPO / "trust.py")), cwd=tmp_path)[0] == 0
    assert trusted_bundles.trusted() == {digest: "a bundle.zip", DIGEST: ""}
    assert digest in command()[1] and DIGEST in command()[1]
    assert command("--remove", DIGEST)[0] == command("--remove", path)[0] == 0 and trusted_bundles.trusted() == {}
    assert [entry.name for entry in listed.parent.iterdir() if entry.name.startswith(".trusted")] == []
    for wrong in (DIGEST[:12], tmp_path / "none.zip", REPO / "README.md"):
        code, said = command(wrong)
        assert code == 1 and said.startswith("trust: ") and "Traceback" not in said
    script = "import sys; sys.argv[1:] = []; import trust; trust.main([]); print(sorted({'torch', 'comfy', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO).stdout.endswith("[]\n")


def test_a_bundle_is_read_from_a_copy_that_has_no_name(tmp_path):
    store = CacheStore(tmp_path / "store", tmp_path / "cache.key")
    with store.writing("Block_dynamic_aoti_0123456789abcdef/single/forward", "aaaaaaaaaaaa") as (folder, finish):
        (folder / "artifact.pt2").write_bytes(b"code")
        finish({"name": "Block"})
    (tmp_path / "bundles").mkdir()
    save_bundle(store, store.own(), tmp_path / "bundles" / "x.zip")
    with (found := read_bundle(tmp_path / "bundles" / "x.zip")).copy:
        info = os.fstat(found.copy.fileno())
        assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["x.zip"]
        assert info.st_ino != (tmp_path / "bundles" / "x.zip").stat().st_ino and info.st_mode & 0o777 == 0o600


# Messages

@pytest.mark.parametrize("value", ["a" * 1000, ["a"] * 1000, {"a" * 1000: 1}, 10**300, "\x1b[2J\n", b"x", object(), "\ud800", float("nan"),
                                   None], ids=lambda value: repr(value)[:20])
def test_what_is_repeated_of_input_is_short_and_printable(value):
    assert len(echo(value)) <= MAX_CHARACTERS * 4 and echo(value).isprintable()
    assert len(echo("a" * 1000)) == MAX_CHARACTERS


@pytest.mark.parametrize("text, want", [
    ("the compile cache /srv/a b/compiled cannot be used", "the compile cache compiled cannot be used"),
    ("[Errno 28] No space left on device: '/home/user/x.zip'", "[Errno 28] No space left on device: 'x.zip'"),
    ("ImportError: /usr/lib/x.so: cannot open", "ImportError: x.so: cannot open"), ("C:\\Users\\a b\\x.zip is", "x.zip is"),
    ("\\\\server\\share\\x.zip is", "x.zip is"), ("~/.config/int8-compile/cache.key", "cache.key"),
    ("g++ -I/srv/x/include -L/opt/lib file:///srv/a/b PATH=/usr/bin:/srv/bin/x", "g++ -Iinclude -Llib file://b PATH=bin:x"),
    ("see https://a.b/c/d, 3 GB/s, float/int and user/default/x", "see https://a.b/c/d, 3 GB/s, float/int and user/default/x")])
def test_a_path_is_its_last_part(text, want):
    assert without_folders(text, ["/srv/a b"]) == want


@pytest.mark.parametrize("error", [ValueError("in /srv/x/y"), ValueError("a\n[ERROR] b in /srv/x/y"),
                                   OSError(28, "No space left", "/srv/x/y"), OSError("in /srv/x/y"), KeyError("/srv/x/y"),
                                   FileNotFoundError(2, "No such file", b"/srv/x/y", None, "/srv/x/z")], ids=repr)
def test_an_error_of_a_node_names_no_folder_and_the_console_has_it_all(comfy, caplog, error):
    from comfy_api.latest import io
    from int8_compile.nodes.edge import for_clients

    class Node(io.ComfyNode):
        @classmethod
        def execute(cls, value):
            raise error

    before = str(error)
    with pytest.raises(type(error)) as raised:
        for_clients(Node).execute(value=1)
    assert raised.value is error and "/srv" not in str(error) and "y" in str(error) and before.replace("\n", "\\n") in caplog.text


def test_every_node_is_guarded(comfy):
    from int8_compile.nodes import NODES

    assert all(hasattr(node.execute.__func__, "__wrapped__") for node in NODES)


def test_a_setting_that_says_where_code_lies_is_answered_once(cache, tmp_path, caplog):
    settings(tmp_path, json.dumps({"INT8Compile.Cache.Folder": str(tmp_path / "output")}))
    for _ in range(3):
        assert cache.get_cache() is not None
    assert sum("INT8Compile.Cache.Folder does not count any more" in record.message for record in caplog.records) == 1
    assert not list((tmp_path / "output").iterdir())


def test_a_long_name_of_a_file_is_refused_before_anything_is_done(comfy):
    from int8_compile.compile.comfyui.mode_records import save_model
    from int8_compile.compile.comfyui.modes import PatcherExportConfig

    for make in (lambda name: PatcherExportConfig(name), lambda name: save_model(None, name)):
        with pytest.raises(ValueError, match="filename_prefix: a path of 1000000 characters; 200 are the limit") as raised:
            make("x" * 1_000_000)
        assert len(str(raised.value)) < 200


def test_text_for_a_console_holds_nothing_that_it_cannot_write_or_obeys():
    assert writable("a\u202eb\u2028c") == "a\\u202eb\\u2028c" and writable("a\nb", lines=False) == "a\\nb"
    assert writable("a\n\t\ud800\x1b[2J\x9bJé\U0001F600\0") == "a\n\t\\ud800\\x1b[2J\\x9bJé\U0001F600\\x00"


def test_an_error_before_ours_forges_no_line_of_the_console(comfy):
    """What a file holds is in it: the type of a tensor, say."""
    from comfy_api.latest import io
    from int8_compile.nodes.edge import for_clients

    class Node(io.ComfyNode):
        @classmethod
        def execute(cls, value):
            try:
                raise RuntimeError("of type x\n[ERROR] forged")
            except RuntimeError as error:
                raise ValueError("of many\nlines") from error

    with pytest.raises(ValueError, match="of many\nlines") as raised:
        for_clients(Node).execute(value=1)
    assert str(raised.value.__cause__) == "of type x\\n[ERROR] forged"


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\0" * 7 + b"{}      "], ids=["damaged", "no model"])
def test_the_name_of_a_file_forges_no_line_of_the_console(comfy, tmp_path, caplog, content):
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.int8.options import Int8Options

    path = tmp_path / "a\n[ERROR] forged\x1b[2J\u202e.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Load INT8 Model") as raised:
        load_int8_model(str(path), Int8Options())
    assert str(raised.value).isprintable() and "forged" not in caplog.text


def test_the_check_names_no_folder_to_a_client(comfy, monkeypatch, tmp_path):
    import shutil

    from int8_compile.nodes import check

    monkeypatch.setattr(check, "_own_ids", list)  # of a server's registry, which is not here
    (tmp_path / "cxx").write_text(f"#!/bin/sh\necho {tmp_path}/x.cpp:1: error >&2; exit 1\n")
    (tmp_path / "cxx").chmod(0o700)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    assert shutil.which(str(tmp_path / "cxx"))
    text, numbers, *_ = check.INT8CompileCheck.execute("quick").result
    for shown in (text, numbers):
        assert "cxx fails: x.cpp:1: error" in shown and str(tmp_path) not in shown and "include/python" not in shown


@pytest.mark.parametrize("text", ["Command '[" * 100_000, "Command: " * 100_000, "Command '" * 100_000, "Command:\n" + "x" * 1_000_000,
                                  "Command '[a]' returned " * 50_000, "\nCommand:\n" * 50_000])
def test_long_output_of_a_compiler_is_looked_at_at_once(text):
    start = time.monotonic()
    assert len(without_commands(text)) <= 20_000
    assert time.monotonic() - start < 1
