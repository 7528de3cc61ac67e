"""Images over HTTP: eager, compiled, INT8 + compiled."""
from __future__ import annotations

import pytest
from older_comfyui import needs_for
from toys import difference

from benchmarks.workflows import flux_prompt, reports, wan_prompt

from .conftest import latent

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(2)]
PROMPTS = {"flux": flux_prompt, "wan": wan_prompt}


@pytest.mark.parametrize("family", PROMPTS)
def test_a_model_samples_the_same_compiled(server, defaults, family):
    needs_for(f"tiny_{family}")
    prompt = PROMPTS[family]
    eager = latent(server, server.run(prompt()))
    for node_id, title in (("CompileModel", "Compile Model"), ("INT8LazyTorchCompile", "INT8 Lazy Torch Compile")):
        compiled = latent(server, server.run(prompt(model_nodes=[defaults(node_id)])))
        assert difference(compiled, eager) < 1e-3
        assert f"{title}: compiled" in server.log_text()
    assert "compile failed" not in server.log_text()
    server.free()
    assert difference(latent(server, server.run(prompt())), eager) == 0


@pytest.mark.parametrize("family", PROMPTS)
def test_a_model_samples_the_same_compiled_and_almost_the_same_in_int8(server, defaults, family):
    prompt = PROMPTS[family]
    eager = latent(server, server.run(prompt()))
    compiled = latent(server, server.run(prompt(model_nodes=[defaults("CompileModel")])))
    assert difference(compiled, eager) < 1e-3
    int8 = [defaults("INT8QuantizeModel", method="convrot"), defaults("INT8LazyTorchCompile")]
    quantized = latent(server, server.run(prompt(model_nodes=int8)))
    assert 1e-6 < difference(quantized, eager) < 0.05
    # Compiled, both: no silent fallback.
    log = server.log_text()
    assert "compile failed" not in log
    assert "Compile Model: compiled" in log and "INT8 Lazy Torch Compile: compiled" in log
    # And without the nodes the same bits as before them.
    server.free()
    assert difference(latent(server, server.run(prompt())), eager) == 0


def test_a_quantized_and_compiled_model_goes_on_after_lora_size_and_batch_changed(server, defaults):
    int8 = [defaults("INT8QuantizeModel", method="convrot"), defaults("INT8LazyTorchCompile")]
    for change in (dict(lora=("tiny_flux_a.safetensors", 0.8)), dict(width=128, height=192), dict(batch=2)):
        eager = latent(server, server.run(flux_prompt(**change)))
        assert 1e-6 < difference(latent(server, server.run(flux_prompt(**change, model_nodes=int8))), eager) < 0.05
    assert "compile failed" not in server.log_text()


def test_unloading_between_prompts_keeps_the_image(server, defaults):
    prompt = flux_prompt(model_nodes=[defaults("INT8QuantizeModel", method="rowwise")])
    first = latent(server, server.run(prompt))
    server.free()
    assert difference(latent(server, server.run(prompt)), first) == 0


@pytest.mark.parametrize("flag", ["--use-split-cross-attention", "--use-pytorch-cross-attention"])
def test_one_graph_a_block_class_with_every_attention(serve, defaults, flag):
    with serve(extra_args=[flag]) as server:
        eager = latent(server, server.run(wan_prompt()))
        compiled = server.run(wan_prompt(model_nodes=[defaults("CompileModel", backend="aot_eager")]))
        assert difference(latent(server, compiled), eager) < 1e-3
        details = reports(compiled.outputs)[-1]["details"]
        assert details["graphs"] == len(details["regions"]) and not details["breaks"], details


@pytest.mark.rotating
def test_without_a_cpp_compiler_the_image_is_eagers_and_one_warning_says_why(serve, defaults, tmp_path):
    # An empty inductor cache, or code compiled earlier would be found there.
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with serve(env=broken) as server:
        eager = latent(server, server.run(wan_prompt()))
        lazy = [defaults("INT8LazyTorchCompile")]
        assert difference(latent(server, server.run(wan_prompt(model_nodes=lazy))), eager) == 0
        again = latent(server, server.run(wan_prompt(model_nodes=lazy, seed=2)))
        assert difference(again, latent(server, server.run(wan_prompt(seed=2)))) == 0
        warnings = [line for line in server.log_text().splitlines() if "compile failed" in line]
        assert len(warnings) == 1, warnings
        assert "INT8 Lazy Torch Compile: compile failed; running uncompiled. No working C++ compiler was found" in warnings[0]
