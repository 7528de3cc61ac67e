"""What the pack tells whoever looks after a server: GET /int8_compile/status."""
from __future__ import annotations

import json

import pytest
from older_comfyui import needs_for

from benchmarks.workflows import flux_prompt

pytestmark = pytest.mark.e2e


def test_the_status_says_what_is_compiled_and_nothing_of_a_prompt(serve):
    needs_for("CompileModel")
    with serve(env={"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_SIZE": "much"}) as server:
        before = server.get("/int8_compile/status")
        assert before["models"] == [] and before["machine"]["torch"] and before["version"].count(".") == 2
        node = "CompileModel", {**server.defaults("CompileModel"), "backend": "eager"}
        prompt = flux_prompt(text="a secret meeting", lora=("tiny_flux_a.safetensors", 1.0), model_nodes=[node])
        assert server.run(prompt).status == "success"
        wrong = "CompileModel", {**node[1], "object_to_patch": "/home/anna/secret picture"}  # a message that is cleaned for the client
        assert server.run(flux_prompt(model_nodes=[wrong])).status == "error" and "secret picture" in server.log_text()
        found = server.get("/int8_compile/status")
    (model,) = found["models"]
    assert (model["model"], model["node"], model["state"][:5]) == ("Flux", "Compile Model", "ready") and model["steps"] > 0
    assert model["checks"] >= 2 and found["kernels"]["wrong"] == {} and not model["warnings"]
    (warning,) = [each for each in found["warnings"] if "INT8_COMPILE_CACHE_SIZE is not a number of GB" in each["text"]]
    assert warning["level"] == "warning" and warning["time"] > 1_700_000_000
    assert found["cache"]["enabled"] and found["cache"]["limit"] == 5 << 30 and found["cache"]["bytes"] >= 0
    text = json.dumps(found)
    assert not any(secret in text for secret in ("secret", "tiny_flux", str(server.base_dir), str(server.comfyui)))
