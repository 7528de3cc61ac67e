"""Tables of choices that ship: written for a card, served to that card and stack only, below what the user's machine measured."""
from __future__ import annotations

import ctypes
import importlib.util
import json
import os

import pytest
import torch
from int8_compile.int8.kernels import reference, tables
from int8_compile.int8.kernels.tuning import Choices

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
    from int8_compile.int8.kernels import fastest

    q, w = (torch.randint(-127, 128, (rows, 64), dtype=torch.int8, device=DEVICE) for rows in (40, 48))
    arguments = q, torch.rand(40, device=DEVICE), w, torch.rand(48, 1, device=DEVICE), None, torch.float32
    found = fastest.candidates(q, w)
    assert "torch._int_mm" in found and 3 < len(found) <= fastest.TRIED + 2 < len(fastest.candidates(q, w, None))
    want = reference.int8_gemm(*arguments)
    for name, candidate in found.items():
        torch.testing.assert_close(candidate(*arguments), want, rtol=1e-6, atol=0, msg=name)
    shape = fastest.shape_key(q, w, torch.float32)
    key = tables.key(CARD, fastest.stack(), shape)
    slowest_first = iter(range(len(found), 0, -1))
    best = fastest.choose(Choices(None), key, found, arguments, lambda call: next(slowest_first))
    assert best == list(found)[-1]
    tables.save(tmp_path, CARD, fastest.stack(), {}, {shape: best})

    def never(call):
        raise AssertionError("measured")
    own = tmp_path / "choices.json"
    assert fastest.choose(Choices(own, tables.load(tmp_path)), key, found, arguments, never) == best
    own.write_text(json.dumps({key: list(found)[1]}))
    assert fastest.choose(Choices(own, tables.load(tmp_path)), key, found, arguments, never) == list(found)[1]
    # A tile that no longer ships is measured anew, by the clock of the device.
    tables.save(tmp_path, CARD, fastest.stack(), {}, {shape: "pointer of another version"})
    assert fastest.choose(Choices(None, tables.load(tmp_path)), key, found, arguments) in found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform")
def test_a_card_is_told_apart_by_the_driver_that_it_has_and_none_is_not_an_error(monkeypatch):
    """torch has no function for it: one that was thought of stopped every INT8 layer of every CUDA card."""
    from int8_compile.int8.kernels import fastest

    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = 13020
            return 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = "WinDLL" if os.name == "nt" else "CDLL"
    for library, version in ((lambda name: Driver(), 13), (lambda name: object(), 0), (getattr(ctypes, loader), fastest.driver_version())):
        monkeypatch.setattr(ctypes, loader, library)
        fastest.stack.cache_clear()
        assert fastest.stack().endswith(f", driver {version}")
    fastest.stack.cache_clear()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_gpu_chooses_keeps_and_computes(tmp_path, monkeypatch):
    from int8_compile.int8.kernels import fastest

    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path))
    fastest.choices.cache_clear()
    monkeypatch.setattr(fastest, "_CHOSEN", {})
    try:
        for m in (0, 1, 300):
            q, w = (torch.randint(-127, 128, (rows, 272), dtype=torch.int8, device=DEVICE) for rows in (m, 136))
            arguments = q, torch.rand(m, device=DEVICE), w, torch.rand(136, 1, device=DEVICE), None, torch.float32
            torch.testing.assert_close(fastest.int8_gemm(*arguments), reference.int8_gemm(*arguments), rtol=1e-6, atol=0)
        assert len(json.loads((tmp_path / "choices.json").read_text())) == 2
    finally:
        fastest.choices.cache_clear()


def test_an_unaligned_weight_is_another_shape():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from int8_compile.int8.kernels import fastest

    q, storage = torch.zeros((32, 64), dtype=torch.int8), torch.zeros(64 * 64 + 1, dtype=torch.int8)
    assert fastest.shape_key(q, storage[1:].view(64, 64), torch.bfloat16) == \
        fastest.shape_key(q, storage[:-1].view(64, 64), torch.bfloat16) + ", unaligned"
