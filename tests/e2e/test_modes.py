"""Modes over HTTP: applied, shown, saved by one ComfyUI and restored by another; and a mode of another pack."""
from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest
from toys import difference

from benchmarks.workflows import flux_prompt

from .conftest import latent
from .test_contract import errors_of

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(3)]
HELP = Path(__file__).resolve().parents[2] / "web" / "docs" / "ApplyModes.md"
# In place of inductor: what is tested here does not depend on it.
COMPILE = {"name": "compile", "config": {"backend": "aot_eager"}}


def with_modes(modes, save=False, **arguments):
    """A prompt that applies modes, shows them, and saves the model."""
    prompt = flux_prompt(model_nodes=[("ApplyModes", {"modes": json.dumps(modes)})], **arguments)
    prompt["show"] = {"class_type": "ShowModes", "inputs": {"model": ["model_1", 0]}}
    if save:
        inputs = {"model": ["model_1", 0], "filename_prefix": "diffusion_models/modes"}
        prompt["save_model"] = {"class_type": "SaveINT8Model", "inputs": inputs}
    return prompt


def shown(result) -> list:
    return json.loads(result.outputs["show"]["text"][0].splitlines()[0])


def move_model(of, to):
    (saved,) = (of.base_dir / "output" / "diffusion_models").glob("modes_*.safetensors")
    folder = to.base_dir / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(saved, folder / "saved.safetensors")


def test_another_process_restores_the_modes_and_samples_the_same_image(server, serve, defaults):
    eager = latent(server, server.run(flux_prompt()))
    first = server.run(with_modes(["convrot", "int8", COMPILE], save=True))
    want = latent(server, first)
    assert shown(first) == ["convrot", "int8", COMPILE] and 1e-6 < difference(want, eager) < 0.05
    # The same done by the nodes is recorded the same.
    prompt = flux_prompt(model_nodes=[defaults("INT8QuantizeModel", method="convrot"), defaults("CompileModel", backend="aot_eager")])
    prompt["show"] = {"class_type": "ShowModes", "inputs": {"model": ["model_2", 0]}}
    by_nodes = server.run(prompt)
    assert shown(by_nodes)[:2] == ["convrot", "int8"] and shown(by_nodes)[2]["name"] == "compile"
    assert difference(latent(server, by_nodes), want) < 1e-3
    with serve() as second:
        move_model(server, second)
        loaders = ["saved.safetensors", ("LoadINT8Model", {**second.defaults("LoadINT8Model"), "unet_name": "saved.safetensors"})]
        for loader in loaders:
            again = second.run(with_modes([COMPILE], unet=loader))
            assert shown(again) == ["convrot", "int8", COMPILE]
            assert difference(latent(second, again), want) < 0.01
        assert "Cannot add convrot after int8" in errors_of(second, with_modes(["convrot", "int8"], unet="saved.safetensors"))
        assert "compile failed" not in second.log_text()
    assert "compile failed" not in server.log_text()


def test_what_the_first_sampling_measures_is_shown_by_the_next_run(server):
    modes = [{"name": "smoothquant", "config": {"where": "better"}}, "int8"]
    first, second = (server.run(with_modes(modes, seed=seed)) for seed in (3, 4))
    assert shown(first) == shown(second) == modes
    # ComfyUI may show it before or after it samples.
    assert re.search(r"int8: \d+ layers (to be measured at the first sampling|\(.*least SQNR)", first.outputs["show"]["text"][0])
    assert re.search(r"int8: \d+ layers \(.*\), least SQNR \d+\.\d dB", second.outputs["show"]["text"][0])


def test_the_browser_gets_the_script_that_shows_the_text_on_the_node(server):
    scripts = json.loads(urllib.request.urlopen(f"{server.url}/extensions").read())
    assert "/extensions/int8-compile/int8_compile.js" in scripts
    script = urllib.request.urlopen(f"{server.url}/extensions/int8-compile/int8_compile.js").read().decode()
    assert "ShowModes" in script


@pytest.mark.rotating
def test_a_mode_of_another_pack_as_the_help_page_has_it(serve, tmp_path):
    (pack,) = re.findall(r"```python\n(.*?)```", HELP.read_text(), re.DOTALL)
    (tmp_path / "__init__.py").write_text(pack)
    chain = ["convrot", "int8", {"name": "my_pack.gain", "config": {"gain": 0.5}}]
    with serve(extra_packs={"a-pack-that-loads-first": tmp_path}) as server:
        plain = latent(server, server.run(with_modes(chain[:2])))
        result = server.run(with_modes(chain, save=True))
        want = latent(server, result)
        assert shown(result) == chain and difference(want, plain) > 0.1
        assert "my_pack.gain does not allow my_pack.gain after it" in errors_of(server, with_modes([*chain, "my_pack.gain"]))
        move_model(server, server)
        again = server.run(with_modes([], unet="saved.safetensors"))
        assert shown(again) == chain and difference(latent(server, again), want) < 0.01
        saved = server.base_dir / "models" / "diffusion_models" / "saved.safetensors"
        with serve() as without:
            folder = without.base_dir / "models" / "diffusion_models"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved, folder)
            loader = ("LoadINT8Model", {**without.defaults("LoadINT8Model"), "unet_name": "saved.safetensors"})
            assert "saved.safetensors: There is no mode 'my_pack.gain'" in errors_of(without, flux_prompt(unet=loader))
            latent(without, without.run(flux_prompt(unet="saved.safetensors")))  # stock
