"""Generated inputs, 10000 in all (nox -s fuzz: many more): whatever comes is taken or refused with a short message, within a second, and no
program is started and nothing written outside of the pack's folders. The seed is fixed: what fails once fails again."""
from __future__ import annotations

import json
import os
import random
import time
import zipfile

import pytest
import torch
from int8_compile.compile.allowed_options import ALLOWED
from int8_compile.compile.artifacts.bundle import load_bundle, read_bundle, save_bundle
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.compile.modes import MODES, ApplyModeError, apply_modes, mode_state, restore_modes
from int8_compile.compile.modes.apply import parse_modes
from int8_compile.compile.modes.record import parse_state
from int8_compile.compile.options import CompileOptions, parse_options
from int8_compile.int8.options import Int8Options

from benchmarks.workflows import flux_prompt

from .conftest import TEXTS, mutated, request, text_of, value

SEED = int(os.environ.get("INT8_COMPILE_FUZZ_SEED", "1"))
# Shares of all inputs.
SHARES = {"options": 0.25, "modes": 0.15, "records": 0.2, "metadata": 0.1, "bundles": 0.12, "settings": 0.1, "int8": 0.05, "api": 0.03}
REFUSED = (ValueError, RuntimeError, LookupError)


@pytest.fixture
def count(inputs):
    return lambda name: max(1, int(inputs * SHARES[name]))


def seeded(number: int) -> random.Random:
    return random.Random(SEED * 1_000_003 + number)


def test_options(count, within):
    from torch._inductor import config

    names = [*config.get_config_copy(), *ALLOWED, *TEXTS]
    parse_options('{"epilogue_fusion": true}', "inductor")  # what is imported at the first is no answer

    def ask(number):
        r = seeded(number)
        options = {r.choice(names): value(r, 2) if r.random() < 0.7 else r.choice((True, False, 1, 256, "ATEN"))
                   for _ in range(r.randrange(4))}
        text = text_of(r, options if r.random() < 0.9 else value(r))
        taken = json.loads(parse_options(text, r.choice(("inductor", "inductor", "velocator", "eager", *TEXTS))))
        assert set(taken) <= {name for key in ALLOWED for name in (key, key.replace("_", "-"))}
        mode = r.choice(("default", value(r, 1)))
        CompileOptions(options=json.dumps(taken), mode=mode, dynamic=value(r, 0), fullgraph=value(r, 0))
    assert within(count("options"), ask, REFUSED) > count("options") / 3


def test_modes(count, within, registries):
    int8 = {"keep_layers": ["a.*"], "min_sqnr_db": 20, "kernel": "auto", "chosen": [["a", "convrot"]]}
    good = ["convrot", {"name": "int8", "config": int8},
            {"name": "export", "config": {}}, {"name": "compile", "config": {"backend": "inductor", "options": "{}", "target": "a"}}]

    def ask(number):
        r = seeded(number)
        modes = mutated(r, good) if r.random() < 0.8 else value(r)
        parse_modes(json.loads(json.dumps(modes)), r.choice(registries))
    assert within(count("modes"), ask, REFUSED) > count("modes") / 3


def test_records(count, within, registries):
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)]).eval()
    good = [mode_state(apply_modes(model, chain)) for chain in (["int8"], ["convrot", "int8"], ["convrot", "int8", "export"])]
    before = {name: id(module) for name, module in model.named_modules()}
    good[0]["modes"].append({"name": "compile", "config": {"options": "{}"}, "metadata": {}})

    def ask(number):
        r = seeded(number)
        text = text_of(r, mutated(r, r.choice(good)))
        if r.random() < 0.5:
            restore_modes(model, text)
        else:
            assert "compile" not in parse_state(text, r.choice(registries)).names
    assert within(count("records"), ask, (*REFUSED, ApplyModeError)) > count("records") / 3
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_int8_settings(count, within):
    def ask(number):
        r = seeded(number)
        text = "\n".join(str(r.choice(TEXTS)) for _ in range(r.randrange(5))) * r.choice((1, 1, 10_000))
        Int8Options(r.choice(("auto", *TEXTS)), Int8Options.parse_keep_layers(text), value(r, 1), r.choice(("auto", *TEXTS)))
    within(count("int8"), ask, REFUSED)


@pytest.fixture(scope="module")
def registries(comfy):
    from int8_compile.compile.comfyui.modes import PATCHER_MODES
    return [MODES, PATCHER_MODES]


@pytest.mark.comfy
def test_metadata_of_files(count, within, comfy, tmp_path):
    """The header is written here, so that it may say anything."""
    from int8_compile.compile.comfyui.checkpoint_file import CheckpointFile
    from int8_compile.compile.comfyui.int8_checkpoint import _check_format

    conf = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64, "params": {"convrot": False, "convrot_groupsize": 16}}
    path = tmp_path / "x.safetensors"

    def ask(number):
        r = seeded(number)
        entry = text_of(r, mutated(r, conf)).encode(errors="replace")[:5000]
        stored = text_of(r, mutated(r, {"format_version": "1.0", "layers": {"a": conf, "b": conf}}))
        sizes = {"a.comfy_quant": len(entry), "a.weight": 4096, "a.weight_scale": 256}
        header, at = {"__metadata__": {"_quantization_metadata": stored} if r.random() < 0.5 else {}}, 0
        for key, size in sizes.items():
            kind = {"a.comfy_quant": "U8", "a.weight": "I8", "a.weight_scale": "F32"}[key]
            header[key] = {"dtype": kind, "shape": [size] if key != "a.weight" else [64, 64], "data_offsets": [at, at + size]}
            at += size
        header["a.weight_scale"]["shape"] = [64]
        if r.random() < 0.3:
            header = mutated(r, header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + entry + bytes(4096 + 256))
        _check_format(CheckpointFile(str(path)), path.name)
    assert within(count("metadata"), ask, (ValueError,)) > count("metadata") / 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bundles(count, within, tmp_path):
    here, there = (CacheStore(tmp_path / name, tmp_path / f"{name}.key") for name in ("here", "there"))
    for number in range(2):
        with here.writing("Block_dynamic_aoti_0123456789abcdef/single/forward", f"entry{number}") as (folder, finish):
            (folder / "artifact.pt2").write_bytes(b"code" * 200)
            finish({"name": "Block", "device": "cpu", "torch": "2.11.0"})
    good = tmp_path / "good.zip"
    save_bundle(here, here.own(), good)
    content, path = good.read_bytes(), tmp_path / "bad.zip"
    with zipfile.ZipFile(good) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}

    def ask(number):
        r = seeded(number)
        if r.random() < 0.6:  # bytes
            changed = bytearray(content)
            for _ in range(r.randrange(1, 6)):
                changed[r.randrange(len(changed))] = r.randrange(256)
            path.write_bytes(changed[:r.choice((len(changed), len(changed), r.randrange(len(changed))))] + r.choice((b"", b"", b"x")))
        else:  # names and manifests
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, text in files.items():
                    if name.endswith("manifest.json") and r.random() < 0.8:
                        text = text_of(r, mutated(r, json.loads(text))).encode(errors="replace")
                    parts = [part if r.random() < 0.95 else r.choice(TEXTS).strip("\ud800\0") for part in name.split("/")]
                    archive.writestr("/".join(parts) or "x", text)
                archive.comment = r.choice((b"", b"", b"", b"comment"))
        with (found := read_bundle(path)).copy:
            load_bundle(there, found)
    within(count("bundles"), ask, (ValueError,))
    assert all(entry.relative_to(there.base).as_posix().count("/") == 3 for entry in there.all())
    assert {path.name for path in tmp_path.iterdir()} == {"here", "here.key", "there", "there.key", "good.zip", "bad.zip"}


@pytest.mark.comfy
def test_settings(count, within, comfy, tmp_path, monkeypatch, caplog):
    import folder_paths
    from int8_compile.compile.comfyui import artifact_cache, user_settings

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    for name in ("INT8_COMPILE_CACHE", "INT8_COMPILE_CACHE_DIR", "INT8_COMPILE_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(user_settings, "_said", set())
    (tmp_path / "default").mkdir()
    path = tmp_path / "default" / "comfy.settings.json"

    def ask(number):
        r = seeded(number)
        found = {name: value(r, 2) for name in (artifact_cache.ENABLED, artifact_cache.LIMIT, "INT8Compile.Cache.Folder", "other")}
        path.write_bytes(text_of(r, found if r.random() < 0.9 else value(r)).encode(errors=r.choice(("replace", "surrogatepass"))))
        assert artifact_cache.is_enabled() in (True, False) and 0 < artifact_cache.size_limit() <= 1000 << 30
        assert artifact_cache.folder() == tmp_path / "__int8_compile"
    assert within(count("settings"), ask) == 0
    assert len(caplog.records) <= 3


@pytest.mark.e2e
def test_node_inputs_over_the_api(count, watched):
    """Every input of every node, on a server whose programs and files are written down."""
    server = watched.server
    nodes = {name: server.object_info(name)["input"] for name in (
        "CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel", "LoadINT8Model", "SaveINT8Model", "ApplyModes", "ShowModes",
        "SaveCompileCache", "LoadCompileCache", "ClearCompileCache", "OptimizeModel")}
    warm = flux_prompt(model_nodes=[("INT8QuantizeModel", {**server.defaults("INT8QuantizeModel"), "method": "rowwise"}),
                                    ("CompileModel", {**server.defaults("CompileModel"), "options": '{"epilogue_fusion": true}'})])
    ready = {**{name: warm[name] for name in ("unet", "model_1", "model_2")},
             "show": {"class_type": "ShowModes", "inputs": {"model": ["model_2", 0]}}}
    assert server.run(ready).status == "success"
    while watched.events():  # the compiler and the CPU kernels are set up once in a process, and ask g++ what it can do
        time.sleep(3)
    slow, ended = [], 0
    for number in range(count("api")):
        r = seeded(number)
        node = r.choice(list(nodes))
        given = {}
        for kind in nodes[node].values():
            for name, spec in kind.items():
                default = spec[1].get("default") if len(spec) > 1 else None
                wanted = default if r.random() < 0.5 else r.choice((value(r, 2), text_of(r, value(r, 2))))
                given[name] = ["unet", 0] if name in ("model", "after") else wanted
        prompt = {"unet": ready["unet"], "node": {"class_type": node, "inputs": given}}
        if node not in ("SaveINT8Model", "ShowModes", "SaveCompileCache", "LoadCompileCache", "ClearCompileCache"):
            prompt["show"] = {"class_type": "ShowModes", "inputs": {"model": ["node", 0]}}
        for _ in range(2):  # a busy machine is slow once
            started = time.monotonic()
            status, body = request(server, "/prompt", json.dumps({"prompt": prompt}).encode())
            assert status in (200, 400), (node, given, body[:300])
            if status == 200:
                ended += 1
                prompt_id = json.loads(body)["prompt_id"]
                while not (entry := server.history(prompt_id)):
                    assert time.monotonic() - started < 60
                    time.sleep(0.01)
                told = dict(entry["status"]["messages"]).get("execution_error", {}).get("exception_message", "")
                assert len(told) < 8000 and str(server.base_dir) not in told, (node, given, told[:500])
            if (seconds := time.monotonic() - started) < 1:
                break
        else:
            slow.append((node, given, seconds))
    assert not slow
    assert ended
    assert server.process.poll() is None
    assert not (outside := watched.outside()), outside[:20]
