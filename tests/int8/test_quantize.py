from __future__ import annotations

import pytest
import torch
from int8_compile.int8.options import Int8Options
from int8_compile.int8.quantize import drop_kept, eligible_linears, quantize_weight
from int8_compile.int8.structure import repeated_blocks, signature


class Block(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.gate = torch.nn.Linear(width, 1)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(2)])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Linear(64, 64)
        self.stages = torch.nn.Sequential(torch.nn.ModuleList([Block(), Block(), torch.nn.Linear(64, 64)]))
        self.named = torch.nn.ModuleDict({"block0": Block(), "block1": Block()})
        self.acts = torch.nn.ModuleList([torch.nn.GELU(), torch.nn.GELU()])
        self.last = torch.nn.Linear(64, 64)


def test_blocks_are_found_by_structure_at_any_depth():
    assert [name for name, _, _ in repeated_blocks(Net())] == ["stages.0.0", "stages.0.1", "named.block0", "named.block1"]


def test_only_large_linears_of_repeated_blocks_are_eligible():
    names = eligible_linears(Net())
    assert "stages.0.0.up" in names and "named.block1.heads.1" in names
    assert not {"patch", "last", "stages.0.0.gate", "stages.0.2"} & set(names)
    assert len(names) == 4 * 4


def test_a_model_without_repeats_offers_all_its_linears():
    assert eligible_linears(Block()) == ["up", "down", "heads.0", "heads.1"]


def test_signature_tells_configurations_apart_but_not_values():
    assert signature(Block()) == signature(Block())
    assert signature(Block()) != signature(Block(128))
    half = Block()
    half.up.half()
    assert signature(Block()) != signature(half)


def test_keep_layers_matches_whole_names_only():
    names = ["a.0.first", "a.0.firstborn", "a.1.first"]
    assert drop_kept(names, ["a.0.first"]) == ["a.0.firstborn", "a.1.first"]
    assert drop_kept(names, ["diffusion_model.a.*.first"]) == ["a.0.firstborn"]


def test_keep_layers_that_match_nothing_name_the_nearest():
    with pytest.raises(ValueError, match=r"'first' matches no layer.*nearest is 'a\.0\.first'"):
        drop_kept(["a.0.first", "b"], ["first"])


def test_a_preset_stands_for_its_familys_layers_and_for_no_others():
    names = ["context_refiner.0.attention.qkv", "layers.0.attention.qkv", "layers.1.attention.qkv", "layers.1.adaLN_modulation.1",
             "layers.10.w"]
    assert drop_kept(names, ["preset:z-image", "layers.10.*"]) == ["layers.1.attention.qkv"]
    with pytest.raises(ValueError, match="'preset:krea2' is for another family of models"):
        drop_kept(names, ["preset:krea2"])
    with pytest.raises(ValueError, match=r"there is no preset 'flux'\. There are: anima, boogu, .*, z-image"):
        drop_kept(names, ["preset:flux"])


def test_weights_are_quantized_in_fp32_and_rotated_where_a_group_fits():
    w = torch.randn(32, 128, dtype=torch.bfloat16)
    q, s, group = quantize_weight(w, rotate=True)
    assert (q.dtype, s.dtype, s.shape, group) == (torch.int8, torch.float32, (32, 1), 64)
    assert quantize_weight(torch.randn(4, 100), rotate=True)[2] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    w = torch.randn(8, 64)
    w[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(w, rotate=False)


@pytest.mark.parametrize("arguments, message", [
    ({"min_sqnr_db": -1.0}, "min_sqnr_db is a ratio in dB from 0"),
    ({"min_sqnr_db": 300.0}, "min_sqnr_db is a ratio in dB from 0"),
    ({"method": "int4"}, "Unknown quantization method 'int4'"),
    ({"kernel": "cuda"}, "Unknown INT8 kernel 'cuda'"),
])
def test_options_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Int8Options(**arguments)


def test_keep_layers_are_one_glob_a_line():
    assert Int8Options.parse_keep_layers("a.*\n\n  b.0 \n") == ("a.*", "b.0")
