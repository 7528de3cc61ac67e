"""Save, Load and Clear Compile Cache, as ComfyUI runs them, on a cache of their own."""
from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.comfy

REPO = Path(__file__).resolve().parents[2]
PLACE = "DoubleStreamBlock_dynamic_aoti_0123456789abcdef/single/forward"


@pytest.fixture
def cache(comfy, tmp_path, monkeypatch):
    """The folder of the compile cache."""
    monkeypatch.setenv("INT8_COMPILE_CACHE", "1")
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path / "cache.key"))
    return tmp_path / "cache"


@pytest.fixture
def store(cache):
    from int8_compile.compile.comfyui.artifact_cache import open_store

    store = open_store()
    put(store, "aaaaaaaaaaaa")
    put(store, "bbbbbbbbbbbb", torch="2.8.0")
    return store


def put(store, name, place=PLACE, **body):
    with store.writing(place, name) as (folder, finish):
        (folder / "artifact.pt2").write_bytes(name.encode() * 1000)
        finish({"name": place.partition("_")[0], "device": "cpu", "torch": "2.11.0", **body})
    return store.base / place / name


def names(store) -> list[str]:
    return [folder.name for folder in store.own()]


@pytest.fixture
def run(nodes):
    """A node class by its id, with defaults: -> NodeOutput."""
    from int8_compile.nodes import NODES

    classes = {cls.define_schema().node_id: cls for cls in NODES}

    def run(node_id, **inputs):
        cls = classes[node_id]
        defaults = {i.id: i.default for i in cls.define_schema().inputs if not i.optional}
        return cls.execute(**{**defaults, **inputs})
    return run


@pytest.fixture
def trust(cache):
    """Puts a digest on the list of the server, as the command does, and gives it back."""
    from int8_compile.compile.artifacts import trusted_bundles

    def trust(digest):
        trusted_bundles.set_trusted(digest)
        return digest
    return trust


def text_of(output) -> str:
    (text,) = output.ui.as_dict()["text"]
    return text


def test_save_clear_load_brings_back_what_was_compiled(cache, store, run, trust):
    saved = run("SaveCompileCache")
    path, digest = saved.args
    assert path == str(cache / "bundles" / "int8_compile_00001_.zip") and len(digest) == 64
    assert path in text_of(saved) and digest in text_of(saved) and "DoubleStreamBlock for cpu, torch 2.11.0: 1 compiled" in text_of(saved)
    assert "Deleted 2 compiled, 0.0 MB. 1 bundles, 0.0 MB, stay" in text_of(run("ClearCompileCache"))
    assert names(store) == []
    loaded = run("LoadCompileCache", bundle="int8_compile_00001_.zip", trust=f" {trust(digest).upper()}\n")
    assert "2 compiled added, 0 were there already" in text_of(loaded) == loaded.args[0]
    assert "compiled by another version is not used" in text_of(loaded)
    assert names(store) == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]
    assert all(store.whole(folder) for folder in store.own())
    assert "0 compiled added, 2 were there already" in text_of(run("LoadCompileCache", bundle="int8_compile_00001_.zip", trust=digest))


def test_clearing_says_what_it_leaves_and_the_help_page_says_where_that_is(cache, store, run, tmp_path, monkeypatch):
    """Of what is there, without naming a folder to the client."""
    from int8_compile.compile.artifacts import trusted_bundles
    from int8_compile.compile.artifacts.store import default_key_file

    page = (REPO / "web" / "docs" / "ClearCompileCache.md").read_text(encoding="utf-8")
    said = text_of(run("ClearCompileCache"))
    assert said == "Deleted 2 compiled, 0.0 MB. Also left: the signing key."
    trusted_bundles.set_trusted("0" * 64)
    (cache / "choices.json").write_text("{}")
    for name in ("native", "inductor", "methods"):
        (cache / name / "deep").mkdir(parents=True)
        (cache / name / "deep" / "file").write_bytes(bytes(1_500_000))
    kept = {path: path.read_bytes() for path in (*cache.rglob("*"), default_key_file(), trusted_bundles.list_file()) if path.is_file()}
    said = text_of(run("ClearCompileCache"))
    assert said == ("Deleted 0 compiled, 0.0 MB. Also left: the signing key, the list of trusted bundles, measured choices of kernels, the "
                    "library of CPU kernels (1.5 MB), the compiler's own files (1.5 MB), what cache_compile keeps (1.5 MB).")
    assert {path: path.read_bytes() for path in kept} == kept
    for name in ("bundles", "native", "inductor", "methods", "choices.json", "cache.key", "trusted_bundles.txt"):
        assert f"`{name}`" in page or f"/{name}`" in page, name
    for what in said.partition("left: ")[2].rstrip(".").split(", "):
        assert what.partition(" (")[0].replace("cache_compile", "`cache_compile`") in page, what


def test_a_machine_with_another_key_loads_and_serves_it(cache, store, run, trust, monkeypatch, tmp_path):
    from int8_compile.compile.comfyui.artifact_cache import open_store

    path, digest = run("SaveCompileCache").args
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "worker"))
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(tmp_path / "worker.key"))
    (tmp_path / "worker" / "bundles").mkdir(parents=True)
    shutil.copy(path, tmp_path / "worker" / "bundles" / "from the first.zip")
    run("LoadCompileCache", bundle="from the first.zip", trust=trust(digest))
    worker = open_store()
    assert worker.base.name != store.base.name
    assert [entry.folder.name for entry in worker.entries(PLACE)] == ["aaaaaaaaaaaa", "bbbbbbbbbbbb"]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("entered", ["", "  ", "yes", "0" * 12, "0" * 64, "first 12", "first 63", "all"])
def test_without_the_whole_digest_and_the_servers_list_it_says_what_would_run_and_loads_nothing(store, run, trust, entered, listed):
    _, digest = run("SaveCompileCache").args
    store.clear()
    if listed:
        trust(digest)
    entered = {"first 12": digest[:12], "first 63": digest[:63], "all": digest}.get(entered, entered)
    if listed and entered == digest:
        run("LoadCompileCache", bundle="int8_compile_00001_.zip", trust=entered)
        return
    with pytest.raises(ValueError) as raised:
        run("LoadCompileCache", bundle="int8_compile_00001_.zip", trust=entered)
    message = str(raised.value)
    assert message.startswith("Load Compile Cache: int8_compile_00001_.zip holds code that would run here with your rights")
    assert "DoubleStreamBlock for cpu, torch 2.8.0: 1 compiled" in message and digest in message and "as trust" in message
    assert ("not on this server's list" in message) != listed and "python -m trust" in message
    assert names(store) == []


@pytest.mark.parametrize("name", ["", "../int8_compile_00001_.zip", "bundles/int8_compile_00001_.zip", "/etc/passwd", "..", ".", "a\\b.zip",
                                  ".bundle-x", "C:x.zip", "x\0.zip", "x\n.zip"])
def test_a_bundle_elsewhere_is_not_loaded(cache, store, run, name):
    run("SaveCompileCache")
    with pytest.raises(ValueError, match="is not a file name") as raised:
        run("LoadCompileCache", bundle=name, trust="0" * 12)
    assert str(cache.parent) not in str(raised.value)


def test_a_missing_bundle_is_answered_with_those_that_there_are(store, run):
    run("SaveCompileCache", filename_prefix="other")
    with pytest.raises(ValueError, match=r"there is no mine\.zip in .*There: other_00001_\.zip"):
        run("LoadCompileCache", bundle="mine.zip")


def test_a_damaged_bundle_is_explained(cache, store, run):
    path, digest = run("SaveCompileCache").args
    (cache / "bundles" / "cut.zip").write_bytes(Path(path).read_bytes()[:-50])
    store.clear()
    with pytest.raises(ValueError, match=r"cut\.zip is damaged or no bundle of compiled code .*copy it again"):
        run("LoadCompileCache", bundle="cut.zip", trust=digest)
    assert names(store) == []


@pytest.mark.parametrize("prefix", ["", "../x", "a/b", "/x", ".x", "a\\b"])
def test_a_bundle_is_saved_beside_the_cache_only(cache, store, run, prefix):
    with pytest.raises(ValueError, match="must be a plain name, without folders"):
        run("SaveCompileCache", filename_prefix=prefix)
    assert not (cache / "bundles").exists()


def test_saving_again_makes_another_file(store, run):
    first, second = (run("SaveCompileCache") for _ in range(2))
    assert second.args[0].endswith("_00002_.zip") and first.args[1] == second.args[1]


def test_with_nothing_compiled_the_message_says_what_to_do(cache, run):
    with pytest.raises(ValueError, match=r"nothing has been compiled and kept yet\. Make an image with a compile node first"):
        run("SaveCompileCache")
    assert "Deleted 0 compiled" in text_of(run("ClearCompileCache"))


def test_a_folder_that_others_can_write_to_is_refused(cache, store, run):
    _, digest = run("SaveCompileCache").args
    (cache / "bundles").chmod(0o777)
    with pytest.raises(RuntimeError, match=r"^bundles can be written by others: chmod go-w it$"):
        run("LoadCompileCache", bundle="int8_compile_00001_.zip", trust=digest)


@pytest.mark.rotating
def test_of_a_model_only_what_it_runs_is_saved(store, run, nodes, flux, sample):
    from int8_compile.compile.artifacts.bundle import read_bundle
    from int8_compile.compile.comfyui import artifact_cache, compile_model

    compiled = nodes.INT8LazyTorchCompile(flux, background=True, disable_dynamic_vram=False)
    with pytest.raises(ValueError, match="nothing has been compiled"):
        run("SaveCompileCache", model=compiled)
    put(store, "cccccccccccc", "OtherBlock_dynamic_aoti_0123456789abcdef/single/forward")
    put(store, "dddddddddddd", "DoubleStreamBlock_dynamic_aoti_0123456789abcdef/single/forward")
    sample(compiled)  # eager; the builder starts
    output = run("SaveCompileCache", model=compiled, filename_prefix="flux")
    held = read_bundle(Path(output.args[0])).held
    (report,) = compile_model.reports(compiled)
    assert {item.labels[0] for item in held} == {name for name, _ in report.regions}
    assert not {"aaaaaaaaaaaa", "cccccccccccc", "dddddddddddd"} & {item.name for item in held}
    sample(compiled)  # loads what was built
    assert report.artifacts
    artifact_cache.get_cache().builder.built.clear()
    assert run("SaveCompileCache", model=compiled).args[1] == output.args[1]


def test_waiting_for_the_builder_can_be_interrupted(store, run, comfy):
    import comfy.model_management
    from int8_compile.compile.artifacts.builder import BuildRequest
    from int8_compile.compile.comfyui import artifact_cache

    builder = artifact_cache.get_cache().builder
    reasons = []
    with store.lock(PLACE, "eeeeeeeeeeee"):  # another process builds it: this one's builder waits
        builder.submit(BuildRequest(SimpleNamespace(name="Block", device="cpu"), PLACE, "eeeeeeeeeeee", reasons.append, urgent=True))
        threading.Timer(0.3, comfy.model_management.interrupt_current_processing).start()
        started = time.monotonic()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run("SaveCompileCache")
        assert 0.2 < time.monotonic() - started < 10
        folder = put(store, "eeeeeeeeeeee")
    assert len(run("SaveCompileCache").args[1]) == 64
    assert reasons == [""] and builder.built[-1] == ("Block", folder)


def test_the_nodes_run_at_every_prompt():
    from int8_compile.nodes import ClearCompileCache, LoadCompileCache, SaveCompileCache

    for cls in (SaveCompileCache, LoadCompileCache, ClearCompileCache):
        assert cls.fingerprint_inputs() != cls.fingerprint_inputs()
