"""More of the same promise: whatever is changed, the result is eager's. See test_right_under_change."""
from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import changing_nets as nets
from int8_compile.compile.engine import CompiledModule
from test_right_under_change import COMPILED, KEPT, Here, cached, difference, exported, inference, inputs, refused, run  # noqa: F401


def test_a_thread_that_a_run_starts_and_waits_for_may_call_the_same_model():
    net, compiled, x, results = nets.make(nets.Plain), CompiledModule(COMPILED), inputs()[0], []

    def inner():
        with torch.inference_mode():
            results.append(run(compiled, net, x))

    def call():
        thread = threading.Thread(target=inner, daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        return net(x)
    for _ in range(2):
        got = compiled.run(net, call, filter_guards=True, passthrough=lambda error: False)
        assert difference(got, net(x)) < 1e-4
    assert len(results) == 2 and all(difference(result, net(x)) < 1e-4 for result in results)
    assert compiled.report.last_calls["graph"] == 3
