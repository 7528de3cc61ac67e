"""Tables of choices that ship: written for a card, served to that card and stack only, below what the user's machine measured."""
from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import threading
import time

import pytest
import torch
from int8_compile.int8.kernels import reference, tables
from int8_compile.int8.kernels.tuning import Choices
from toys import wait_until

from .conftest import CUDA, DEVICE

CARD, STACK = "Test Card 9000 Ti", "triton 3.6.0, CUDA 13.0, driver 13"
SHAPE = "torch.bfloat16 | K 64 N 48 M 64"


def test_a_table_serves_its_card_and_stack_and_keeps_what_others_measured(tmp_path):
    for stack, choice in ((STACK, "a"), ("triton 3.8.0, CUDA 13.0, driver 13", "b")):
        path = tables.save(tmp_path, CARD, stack, {"date": "2026-11-21"}, {SHAPE: choice})
    tables.save(tmp_path, CARD, STACK, {}, {"another shape": "c"})
    assert path.name == "test-card-9000-ti.json"
    shipped = Choices(None, tables.load(tmp_path))
    assert shipped.get(tables.key(CARD, STACK, SHAPE)) == "a"
    assert shipped.get(tables.key(CARD, "triton 3.8.0, CUDA 13.0, driver 13", SHAPE)) == "b"
    assert shipped.get(tables.key(CARD, STACK, "another shape")) == "c"
    for card, stack in ((CARD, "triton 3.6.0, CUDA 13.0, driver 12"), (CARD, "triton 3.6.1, CUDA 13.0, driver 13"), ("Test Card", STACK)):
        assert shipped.get(tables.key(card, stack, SHAPE)) is None


@pytest.mark.parametrize("content", ["", "[]", '{"card": "x"}', '{"card": "x", "stacks": {"s": 1}}', '{"card": "x", "stacks": []}'])
def test_a_table_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog, content):
    tables.save(tmp_path, CARD, STACK, {}, {SHAPE: "a"})
    (tmp_path / "broken.json").write_text(content)
    assert tables.load(tmp_path) == {tables.key(CARD, STACK, SHAPE): "a"}
    assert caplog.text.count("broken.json cannot be read") == 1


def test_every_table_that_ships_can_be_read(caplog):
    choices = tables.load()
    assert not caplog.text and all(isinstance(name, str) for name in choices.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform")
def test_a_measured_table_is_taken_without_measuring_and_a_users_own_goes_before_it(tmp_path):
    """The way of a real card: candidates of real operands, measured, written, read by another process."""
    from int8_compile.int8.kernels import autotune

    q, w = (torch.randint(-127, 128, (rows, 64), dtype=torch.int8, device=DEVICE) for rows in (40, 48))
    arguments = q, torch.rand(40, device=DEVICE), w, torch.rand(48, 1, device=DEVICE), None, torch.float32
    found = autotune.candidates(q, w)
    assert "torch._int_mm" in found and 3 < len(found) <= autotune.TRIED + 2 < len(autotune.candidates(q, w, None))
    want = reference.int8_gemm(*arguments)
    for name, candidate in found.items():
        torch.testing.assert_close(candidate(*arguments), want, rtol=1e-6, atol=0, msg=name)
    shape = autotune.shape_key(q, w, torch.float32)
    key = tables.key(CARD, autotune.stack(), shape)
    slowest_first = iter(range(len(found), 0, -1))
    best = autotune.choose(Choices(None), key, found, arguments, lambda call: next(slowest_first))
    assert best == list(found)[-1]
    tables.save(tmp_path, CARD, autotune.stack(), {}, {shape: best})

    def never(call):
        raise AssertionError("measured")
    own = tmp_path / "choices.json"
    assert autotune.choose(Choices(own, tables.load(tmp_path)), key, found, arguments, never) == best
    own.write_text(json.dumps({key: list(found)[1]}))
    assert autotune.choose(Choices(own, tables.load(tmp_path)), key, found, arguments, never) == list(found)[1]
    # A tile that no longer ships is measured anew, by the clock of the device.
    tables.save(tmp_path, CARD, autotune.stack(), {}, {shape: "pointer of another version"})
    assert autotune.choose(Choices(None, tables.load(tmp_path)), key, found, arguments) in found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform")
def test_a_card_is_told_apart_by_the_driver_that_it_has_and_none_is_not_an_error(monkeypatch):
    """torch has no function for it: one that was thought of stopped every INT8 layer of every CUDA card."""
    from int8_compile.int8.kernels import autotune

    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = 13020
            return 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = "WinDLL" if os.name == "nt" else "CDLL"
    for library, version in ((lambda name: Driver(), 13), (lambda name: object(), 0), (getattr(ctypes, loader), autotune.driver_version())):
        monkeypatch.setattr(ctypes, loader, library)
        autotune.stack.cache_clear()
        assert autotune.stack().endswith(f", driver {version}")
    autotune.stack.cache_clear()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_gpu_chooses_keeps_and_computes(tmp_path, monkeypatch):
    from int8_compile.int8.kernels import autotune

    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path))
    autotune.choices.cache_clear()
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    try:
        for m in (0, 1, 300):
            q, w = (torch.randint(-127, 128, (rows, 272), dtype=torch.int8, device=DEVICE) for rows in (m, 136))
            arguments = q, torch.rand(m, device=DEVICE), w, torch.rand(136, 1, device=DEVICE), None, torch.float32
            torch.testing.assert_close(autotune.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=0)
        autotune.waiting.measure()
        assert len(json.loads((tmp_path / "choices.json").read_text())) == 2
    finally:
        autotune.choices.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """fastest with nothing chosen: -> the key of operands in choices"""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from int8_compile.int8.kernels import autotune, triton_gemm

    chosen = Choices(tmp_path / "choices.json")
    waiting = autotune.Waiting()
    waiting._thread = threading.current_thread()  # the test measures
    monkeypatch.setattr(autotune, "waiting", waiting)
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "choices", lambda: chosen)
    monkeypatch.setattr(triton_gemm, "_BROKEN", set())
    return autotune, lambda q, w, dtype: tables.key(autotune.card(q.device), autotune.stack(), autotune.shape_key(q, w, dtype)), chosen


def operands(m, n, k):
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=DEVICE) for rows in (m, n))
    return q, torch.rand(m, device=DEVICE), w, torch.rand(n, 1, device=DEVICE), None, torch.float32


def test_a_choice_that_this_number_of_rows_does_not_offer_falls_to_the_predicted_one_without_measuring(fresh, monkeypatch):
    autotune, key, chosen = fresh
    one, sixteen = operands(1, 48, 64), operands(16, 48, 64)
    offered = [set(autotune.candidates(a[0], a[2], None)) for a in (one, sixteen)]
    name = next(name for name in offered[1] if name not in offered[0])
    chosen.get("read")
    chosen._known[key(one[0], one[2], torch.float32)] = name
    monkeypatch.setattr(autotune, "timer", lambda device: pytest.fail)
    for arguments in (one, one, sixteen):
        torch.testing.assert_close(autotune.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=1e-6)
    names = {str(found.keywords["config"]) for found in autotune._CHOSEN.values()}
    assert names == {next(iter(autotune.candidates(one[0], one[2]))), name}


def test_a_candidate_that_was_chosen_and_cannot_be_launched_is_out_and_the_layer_runs(fresh, monkeypatch):
    autotune, _, _ = fresh
    arguments = operands(40, 48, 64)
    found = autotune.candidates(arguments[0], arguments[2])
    names = list(found)

    def broken(*_, **__):
        raise RuntimeError("no kernel image")
    monkeypatch.setattr(autotune, "choose", lambda *a: names[0])
    for alive in (names[2:], ["torch._int_mm"], []):
        made = {name: call if name in alive else functools.partial(broken, **getattr(call, "keywords", {})) for name, call in found.items()}
        monkeypatch.setattr(autotune, "_CHOSEN", {})
        monkeypatch.setattr(autotune, "candidates", lambda *a, made=made: made)
        for _ in range(2):
            torch.testing.assert_close(autotune.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=1e-6)


def test_an_unaligned_weight_is_the_same_shape_and_copied_once_for_all_that_is_measured(fresh, monkeypatch):
    autotune, key, _ = fresh
    q, s, w, scale, bias, dtype = operands(32, 64, 64)
    storage = torch.cat((w.new_zeros(1), w.reshape(-1)))
    odd = storage[1:].view(64, 64)
    assert odd.data_ptr() % 16 and key(q, odd, dtype) == key(q, w, dtype)
    given = []
    monkeypatch.setattr(autotune, "choose", lambda choices, key, found, arguments: given.append(arguments[2]) or next(iter(found)))
    torch.testing.assert_close(autotune.int8_gemm(q, s, odd, scale, bias, dtype), reference.int8_gemm(q, s, w, scale, bias, dtype))
    assert not given[0].data_ptr() % 16


def test_an_image_is_never_measured_in_and_what_is_measured_later_runs_from_then_on(fresh, monkeypatch):
    autotune, key, chosen = fresh
    chosen.budget = autotune.BUDGET
    times, timed = iter(range(9, 0, -1)), []  # the last candidate is the fastest
    monkeypatch.setattr(autotune, "timer", lambda device: lambda call: timed.append(call) or next(times))
    arguments = operands(40, 48, 64)
    found = autotune.candidates(arguments[0], arguments[2])
    for _ in range(2):
        torch.testing.assert_close(autotune.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=1e-6)
    (running,) = autotune._CHOSEN.values()
    assert not timed and len(autotune.waiting) == 1 and str(running.keywords["config"]) == next(iter(found))
    autotune.waiting.measure()
    assert len(timed) == len(found) and not len(autotune.waiting)
    full = key(arguments[0], arguments[2], torch.float32)
    assert chosen.get(full) == Choices(chosen.path).get(full) == list(found)[-1]
    torch.testing.assert_close(autotune.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=1e-6)
    assert len(timed) == len(found) and not len(autotune.waiting)


def test_measuring_stops_between_two_candidates_when_a_prompt_comes_and_goes_on_later(fresh, monkeypatch):
    autotune, key, chosen = fresh
    chosen.budget = 0.0
    arguments = operands(40, 48, 64)
    autotune.int8_gemm(*arguments)
    timed = []
    monkeypatch.setattr(autotune, "timer", lambda device: lambda call: timed.append(call) or 1.0)
    autotune.waiting.measure(lambda: len(timed) == 2)
    assert len(timed) == 2 and len(autotune.waiting) == 1 and chosen.get(key(arguments[0], arguments[2], torch.float32)) is None
    autotune.waiting.measure(lambda: False)
    assert not len(autotune.waiting)
    ticks = []
    autotune.int8_gemm(*operands(17, 48, 64))
    autotune.waiting.measure(tick=lambda: ticks.append(1))
    assert ticks


def test_a_thread_measures_once_nothing_has_run_for_a_while(fresh, monkeypatch):
    autotune, _, chosen = fresh
    chosen.budget, autotune.waiting._thread, busy = 0.0, None, [True]
    monkeypatch.setattr(autotune, "IDLE", 0.05)
    monkeypatch.setattr(autotune, "timer", lambda device: lambda call: 1.0)
    autotune.waiting.busy = lambda: busy[0]
    autotune.int8_gemm(*operands(40, 48, 64))
    time.sleep(0.3)
    assert len(autotune.waiting) == 1
    busy[0] = False
    wait_until(lambda: not len(autotune.waiting), 20)
    assert chosen.path.exists()


@pytest.mark.parametrize("where", ["operands", "candidate"])
def test_memory_that_is_short_is_said_and_the_shape_is_measured_another_time(fresh, monkeypatch, caplog, where):
    autotune, key, chosen = fresh
    caplog.set_level("INFO")
    chosen.budget = 0.0
    arguments = operands(40, 48, 64)
    autotune.int8_gemm(*arguments)

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        if where == "operands":
            patch.setattr(autotune.Shape, "arguments", full)
        else:
            patch.setattr(torch, "empty", full)
        autotune.waiting.measure()
    assert len(autotune.waiting) == 1 and chosen.get(key(arguments[0], arguments[2], torch.float32)) is None
    assert "measured later: there is not enough free memory" in caplog.text
    autotune.waiting.measure()
    assert not len(autotune.waiting) and chosen.get(key(arguments[0], arguments[2], torch.float32))

