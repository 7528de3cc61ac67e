"""The attacks that ran code on a server over HTTP, or from a file, and those that broke it for everybody."""
from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import wait_until

from benchmarks.comfy_server import PromptRejected
from benchmarks.workflows import flux_prompt

from .conftest import request, upload

pytestmark = pytest.mark.e2e


def shell(marker: Path) -> dict:
    """Options that run a program when g++ is told of them."""
    return {"cpp.enable_floating_point_contract_flag": f"off -wrapper /bin/sh,-c,'id>{marker}'"}


def answer(server, prompt) -> str:
    """What a client is told of a prompt that must not work."""
    try:
        result = server.run(prompt)
    except PromptRejected as error:
        assert error.status == 400
        return str(error)
    assert result.status == "error"
    return result.error["exception_message"]


def only(class_type, **inputs) -> dict:
    return {"node": {"class_type": class_type, "inputs": inputs}}


def samples(server) -> bool:
    return server.run(flux_prompt(steps=1, width=64, height=64, seed=time.monotonic_ns() % 2**32)).status == "success"


@pytest.mark.parametrize("background", [False, True], ids=["server", "builder"])
@pytest.mark.parametrize("node", ["CompileModel", "ApplyModes"])
def test_options_of_a_prompt_run_no_program(server, tmp_path, node, background):
    marker = tmp_path / "ran"
    options = json.dumps(shell(marker))
    if node == "CompileModel":
        inputs = {**server.defaults("CompileModel"), "options": options, "background": background}
    else:
        inputs = {"modes": json.dumps([{"name": "compile", "config": {"options": options, "background": background}}])}
    said = answer(server, flux_prompt(model_nodes=[(node, inputs)], steps=2))
    assert "Compilation failed due to invalid options: a workflow may not set 'cpp.enable_floating_point_contract_flag'" in said
    assert "epilogue_fusion" in said and "-wrapper" not in said and not marker.exists()


@pytest.fixture(scope="module")
def int8_file(watched):
    """An INT8 file as Save INT8 Model writes it, among the server's models: -> (tensors, metadata, where to put others)."""
    server = watched.server
    prompt = flux_prompt(model_nodes=[("INT8QuantizeModel", {**server.defaults("INT8QuantizeModel"), "method": "rowwise"})])
    save = {"class_type": "SaveINT8Model", "inputs": {"model": ["model_1", 0], "filename_prefix": "int8"}}
    assert server.run({"unet": prompt["unet"], "model_1": prompt["model_1"], "save": save}).status == "success"
    (path,) = (server.base_dir / "output").glob("int8_*.safetensors")
    folder = server.base_dir / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata(), folder


@pytest.mark.parametrize("node", ["LoadINT8Model", "ApplyModes", "ShowModes", "SaveINT8Model"])
def test_a_file_runs_no_program_and_compiles_nothing(server, int8_file, tmp_path, node):
    tensors, metadata, folder = int8_file
    marker, name = tmp_path / "ran", f"hostile_{node}.safetensors"
    record = json.loads(metadata["int8_compile.modes"])
    record["modes"].append({"name": "compile", "config": {"options": json.dumps(shell(marker))}, "metadata": {}})
    save_file(tensors, folder / name, metadata={**metadata, "int8_compile.modes": json.dumps(record)})
    if node == "LoadINT8Model":
        prompt = flux_prompt(unet=(node, {**server.defaults(node), "unet_name": name}), steps=1)
    else:
        prompt = flux_prompt(unet=name, steps=1, model_nodes=[("ApplyModes", {"modes": "[]"})] if node == "ApplyModes" else [])
        if node != "ApplyModes":
            more = {"filename_prefix": "again"} if node == "SaveINT8Model" else {}
            prompt = {"unet": prompt["unet"], "node": {"class_type": node, "inputs": {"model": ["unet", 0], **more}}}
    said = answer(server, prompt)
    assert f"{name}: The record has the mode compile, which is never saved" in said and str(server.base_dir) not in said
    assert not marker.exists() and "compiled" not in said


def bundle_of(tmp_path: Path) -> tuple[bytes, str]:
    """A good bundle with code of one's own, as anybody can make it: -> (content, digest)."""
    path, code = tmp_path / "evil.zip", b"code"
    with zipfile.ZipFile(path, "w") as archive:
        place = "Block_dynamic_aoti_0123456789abcdef/single/forward/0123456789ab"
        body = {"name": "Block", "device": "cpu", "torch": "2.11.0", "files": {"artifact.pt2": hashlib.sha256(code).hexdigest()}}
        archive.writestr(f"{place}/manifest.json", json.dumps({"body": body}))
        archive.writestr(f"{place}/artifact.pt2", code)
    return path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest()


def test_http_decides_neither_where_code_lies_nor_which_is_trusted(server, tmp_path):
    """The folder by a setting, the bundle by an upload, the trust by a prompt."""
    content, digest = bundle_of(tmp_path)
    target = server.base_dir / "output" / "x"
    assert request(server, "/settings/INT8Compile.Cache.Folder", json.dumps(str(target)).encode())[0] == 200
    assert upload(server, "evil.zip", content, "x/bundles") == 200 and (target / "bundles" / "evil.zip").exists()
    target.chmod(0o700), (target / "bundles").chmod(0o700)
    said = answer(server, only("LoadCompileCache", bundle="evil.zip", trust=digest))
    assert "there is no evil.zip in the bundles folder" in said and str(server.base_dir) not in said
    assert not (target / "compiled").exists()
    # And where it does lie there, put by hand, it is still not trusted.
    own = server.base_dir / "user" / "__int8_compile" / "bundles" / "evil.zip"
    own.write_bytes(content)
    try:
        for trust in (digest, digest[:12], ""):
            said = answer(server, only("LoadCompileCache", bundle="evil.zip", trust=trust))
            assert "not on this server's list of trusted bundles" in said and str(server.base_dir) not in said
        assert not list((server.base_dir / "user" / "__int8_compile").rglob("artifact.pt2"))
    finally:
        own.unlink()
        request(server, "/settings/INT8Compile.Cache.Folder", b'""')


WRONG = ["[]", "{}", "null", "Infinity", "-Infinity", "NaN", "1e308", "1e400", "-1", "0", '"\\u0000"', '"x"', "true", "[5]", "9" * 400]


@pytest.mark.parametrize("setting", ["SizeLimit", "Enabled", "Folder"])
def test_no_value_of_a_setting_breaks_a_node_and_it_is_said_once(server, setting):
    def warnings():
        return server.log_text().count(f"INT8 Compile: INT8Compile.Cache.{setting} is n")
    before = warnings()
    compiled = flux_prompt(model_nodes=[("CompileModel", {**server.defaults("CompileModel"), "backend": "eager"})])
    prompt = {**only("ClearCompileCache"), "unet": compiled["unet"], "model_1": compiled["model_1"],
              "show": {"class_type": "ShowModes", "inputs": {"model": ["model_1", 0]}}}
    for wrong in WRONG:
        request(server, f"/settings/INT8Compile.Cache.{setting}", wrong.encode())
        assert server.run(prompt).status == "success", wrong
    assert warnings() - before == (0 if setting == "Folder" else 1)
    good = {"SizeLimit": b"5", "Enabled": b"true", "Folder": b'""'}[setting]
    assert request(server, f"/settings/INT8Compile.Cache.{setting}", good)[0] == 200


def test_settings_that_are_no_settings_break_nothing(server):
    """Whoever may write user data may write the file itself."""
    path = server.base_dir / "user" / "default" / "comfy.settings.json"
    before = path.read_bytes() if path.exists() else b"{}"
    try:
        for content in (b"[" * 100_000, b"[]", b"null", b"\xff\xfe", b"{", b"5", b'{"a": "' + b"x" * (5 << 20) + b'"}'):
            path.write_bytes(content)
            assert server.run(only("ClearCompileCache")).status == "success", content[:20]
    finally:
        path.write_bytes(before)
    assert server.log_text().count("ComfyUI's settings cannot be read") == 1


LONG = {
    "modes": ("ApplyModes", {"modes": json.dumps(["int8"] * 1_000_000)}, "are the limit"),
    "keep_layers": ("INT8QuantizeModel", {"keep_layers": "a*\n" * 1_000_000}, "at most 500 globs of 200 characters"),
    "one glob": ("INT8QuantizeModel", {"keep_layers": "*a" * 100_000}, "at most 500 globs of 200 characters"),
    "object_to_patch": ("CompileModel", {"object_to_patch": "a." * 500_000}, "a path of 1000000 characters; 200 are the limit"),
    "target": ("ApplyModes", {"modes": json.dumps([{"name": "compile", "config": {"target": "a" * 1_000_000}}])}, "200 are the limit"),
    "options": ("CompileModel", {"options": json.dumps({"a" * 1_000_000: 1})}, "characters; 10000 are the limit"),
    "memory_format": ("CompileModel", {"memory_format": "a" * 1_000_000}, "Invalid memory format"),
    "mode name": ("ApplyModes", {"modes": json.dumps(["a" * 1_000_000])}, "There is no mode 'aaa"),
}


@pytest.mark.parametrize("case", LONG)
def test_long_input_is_refused_at_once_with_a_short_message(server, case):
    node, inputs, message = LONG[case]
    defaults = {name: value for name, value in server.defaults(node).items() if name != "model"}
    prompt = flux_prompt(model_nodes=[(node, {**defaults, **inputs})])
    show = {"class_type": "ShowModes", "inputs": {"model": ["model_1", 0]}}
    prompt = {"unet": prompt["unet"], "model_1": prompt["model_1"], "show": show}
    said = answer(server, prompt)
    assert message in said and len(said) < 2000


@pytest.mark.parametrize("text", ["\ud800", "blocks.\udfff", '["\ud800"]', '[{"name": "int8", "config": {"\ud800": 1}}]', '{"\ud800": 1}',
                                  "\\ud800", '["\\ud800"]', '{"\\ud800": 1}'])
def test_text_that_no_console_can_write_does_not_end_the_server(server, text):
    """JSON's halves of surrogate pairs: a log line or a traceback with one ended the thread that runs prompts, for good."""
    nodes = [node for node in server.object_info().values() if node["category"] == "INT8 Compile"]
    asked = 0
    for node in nodes:
        defaults = server.defaults(node["name"])
        texts = [name for name, spec in node["input"]["required"].items() if spec[0] == "STRING"]
        for name in texts:
            inputs = {**defaults, name: text, **({"model": ["unet", 0]} if "model" in node["input"]["required"] else {})}
            prompt = {"unet": flux_prompt()["unet"], "node": {"class_type": node["name"], "inputs": inputs}}
            if "MODEL" in node["output"]:
                prompt["show"] = {"class_type": "ShowModes", "inputs": {"model": ["node", 0]}}
            with contextlib.suppress(PromptRejected):  # by core, for another reason
                server.run(prompt, timeout=60)
            asked += 1
    assert asked > 4 and samples(server)


def test_the_type_of_an_error_names_no_folder(server):
    """ComfyUI names a pack's modules by their path."""
    prompt = {"unet": flux_prompt()["unet"], "node": {"class_type": "ApplyModes", "inputs": {"model": ["unet", 0], "modes": '["none"]'}},
              "show": {"class_type": "ShowModes", "inputs": {"model": ["node", 0]}}}
    assert server.run(prompt).error["exception_type"].startswith("int8_compile.compile.modes.errors.")


@pytest.mark.parametrize("body", ["[]", "null", "5", '"x"', '{"prompt": null}', '{"prompt": [5]}', '{"prompt": {"1": 5}}',
                                  '{"prompt": {"1": {"class_type": {"a": 1}, "inputs": 5}}}',
                                  '{"prompt": {"1": {"class_type": "CompileModel", "inputs": [1]}}}'])
def test_no_body_of_a_prompt_is_an_error_of_this_pack(server, body):
    """It sees each before core looks at it; what core then says is core's."""
    assert request(server, "/prompt", body.encode())[0] in (400, 500)
    assert "on_prompt_handler" not in server.log_text()


def test_what_a_killed_server_has_left_of_an_int8_file_is_gone_after_the_start(server):
    """Wherever below output it was, and though nothing is saved there again."""
    wait_until(lambda: not list((server.base_dir / "output").rglob(".int8-tmp-*")), 10)


def test_afterwards_the_server_still_samples_and_has_written_nothing_elsewhere(server):
    assert samples(server)
    assert not list(server.base_dir.rglob("ran"))
