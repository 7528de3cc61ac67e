"""Blocks that get a function which is made anew in each forward: compiled once, kept in the compile cache, and right."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import closure_nets as nets
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from test_artifacts import open_cache, restarted
from test_right_under_change import KEPT, TRACED, cached, exported, inference, refused, run  # noqa: F401
from toys import difference, wait_for_builder

LENGTHS = (10, 4), (10, 4), (12, 4), (14, 7)  # tokens of the image, of the text


def inputs(tokens=10, text=4):
    torch.manual_seed(1)
    return torch.randn(1, tokens, 32), torch.randn(1, text, 32)


def check(compiled, net, *sizes, **options):
    x = inputs(*sizes)
    assert difference(run(compiled, net, *x, **options), net(*x, **options)) < 1e-5, sizes


@pytest.mark.parametrize("attention", [nets.prefixed, nets.scaled, nets.scaled_by_tensor, nets.nested, nets.normed])
def test_a_function_made_anew_in_each_forward_is_compiled_once_for_all_lengths(attention):
    net, compiled = nets.make(attention), CompiledModule(TRACED)
    for sizes in LENGTHS:
        check(compiled, net, *sizes)
    assert compiled.report.graphs == 1, compiled.report.recompiles


@pytest.mark.rotating
@pytest.mark.parametrize("attention", [nets.prefixed, nets.scaled, nets.scaled_by_tensor, nets.nested, nets.normed])
def test_it_is_kept_and_serves_every_block_step_and_length(tmp_path, attention):
    net, compiled = nets.make(attention), cached(tmp_path / "cache")
    run(compiled, net, *inputs())
    for sizes in LENGTHS:
        check(compiled, net, *sizes)
    assert compiled.report.last_calls == {"artifact": 4, "graph": 0, "eager": 0}, compiled.report.fallbacks
    assert len(compiled.report.artifacts) == 1 and not compiled.report.fallbacks
    again = cached(tmp_path / "cache")
    check(again, nets.make(attention), *LENGTHS[-1])
    assert again.report.last_calls["artifact"] == 4


@pytest.mark.rotating
def test_a_number_that_the_function_does_not_read_is_no_part_of_what_is_kept(tmp_path):
    net, compiled = nets.make(nets.masked), cached(tmp_path / "cache")
    run(compiled, net, *inputs(4, 4))
    check(compiled, net, 4, 4)
    assert compiled.report.last_calls["artifact"] == 4 and len(compiled.report.artifacts) == 1, compiled.report.fallbacks


@pytest.mark.rotating
def test_a_number_that_it_reads_counts(tmp_path):
    net, compiled = nets.make(nets.numbered), cached(tmp_path / "cache")
    for _ in range(5):  # one is built a step
        check(compiled, net)
    assert compiled.report.last_calls["artifact"] == 4 and len(compiled.report.artifacts) == 4


@pytest.mark.rotating
@pytest.mark.parametrize("way", [KEPT, TRACED])
@pytest.mark.parametrize("what", ["its code", "a function that it calls", "an option", "its default", "its constant"])
def test_what_it_is_made_of_may_change(tmp_path, monkeypatch, what, way):
    net = nets.make(nets.scaled)
    compiled, options = cached(tmp_path / "cache") if way is KEPT else CompiledModule(way), {}
    for _ in range(2):
        check(compiled, net)
    with monkeypatch.context() as patch:
        if what == "its code":
            net.attention = lambda net, index, text, options: lambda q, k, v: k * 3
        elif what == "a function that it calls":
            patch.setattr(nets, "attend", lambda q, k, v, mask=None, transformer_options=None: q * 2)
        elif what == "an option":
            net.attention = nets.masked
            options = {"no_attention": True}
        elif what == "its default":
            net.attention = lambda net, index, text, options: nets.with_prefix(text, options, 0.75)
        else:
            net.attention = lambda net, index, text, options: nets.with_prefix(text, options, None)
        for _ in range(2):
            check(compiled, net, 4, 4, **options)
    net.attention = nets.scaled
    check(compiled, net)
    assert compiled.report.last_calls["eager"] == 0


@pytest.mark.parametrize("attention, reason", [
    (nets.cached, "an argument is the function causal.<locals>.attention, which keeps a Cache"),
    (nets.normed_elsewhere, "which keeps the module LayerNorm, which is none of the block's own"),
    (nets.counted, "it changes a list that it gets"),
    (nets.rebinding, "it changes what a function that it gets closes over"),
])
def test_what_cannot_be_kept_is_refused_by_name_and_right(tmp_path, attention, reason):
    net, compiled = nets.make(attention), cached(tmp_path / "cache")
    for _ in range(3):
        check(compiled, net, 4, 4)
    assert reason in " ".join(compiled.report.fallbacks) and not compiled.report.artifacts
    assert compiled.report.last_calls["eager"] == 4


def test_a_call_with_what_cannot_be_kept_does_not_keep_others_from_it(tmp_path):
    """Qwen-Image 2.1 calls each block of its first step twice: once for the prefix, which fills a cache."""
    def attention(net, index, text, options):
        return (nets.cached if index % 2 == 0 else nets.prefixed)(net, index, text, options)
    net, compiled = nets.make(attention), cached(tmp_path / "cache")
    for _ in range(3):
        check(compiled, net, 4, 4)
    assert compiled.report.last_calls == {"artifact": 2, "graph": 0, "eager": 2} and len(compiled.report.artifacts) == 1


def test_a_function_that_keeps_an_object_is_not_compiled_for_each_block_anew():
    """Dynamo would take all that the object holds, and the number of the block, for constants."""
    net, compiled = nets.make(nets.cached), CompiledModule(TRACED)
    for _ in range(3):
        check(compiled, net, 4, 4)
    assert compiled.report.graphs == 0 and compiled.report.last_calls["eager"] == 4
    assert [message for message in compiled.report.fallbacks if "a function that keeps a Cache" in message]
    assert sorted(net.cache.kept) == [0, 1, 2, 3]


def test_what_transformer_options_hold_is_not_what_the_function_keeps():
    """ComfyUI has wrappers there: objects, this pack's among them."""
    net, compiled = nets.make(nets.prefixed), CompiledModule(TRACED)
    for _ in range(2):
        check(compiled, net, wrappers={"apply_model": {"int8_compile": [nets.Cache()]}})
    assert compiled.report.last_calls["graph"] == 4 and compiled.report.graphs == 1 and not compiled.report.fallbacks


@pytest.mark.rotating
def test_the_builder_process_makes_the_function_again(tmp_path):
    """With the compiler and the packages of AOTInductor."""
    cache, net = open_cache(tmp_path / "cache", tmp_path / "key"), nets.make(nets.scaled_by_tensor)
    compiled = CompiledModule(KEPT, cache=cache)
    run(compiled, net, *inputs())
    wait_for_builder(cache)
    for sizes in LENGTHS:
        check(compiled, net, *sizes)
    assert compiled.report.last_calls["artifact"] == 4 and compiled.report.graphs == 0, compiled.report.fallbacks
    again = CompiledModule(CompileOptions(mark_sizes=True, dynamic=False), cache=restarted(cache, tmp_path / "key"))
    check(again, net, *LENGTHS[-1])
    assert again.report.last_calls["artifact"] == 4
