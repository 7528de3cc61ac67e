"""What each method costs on the distributions that activations have: SQNR of a layer's output, against figures measured before."""
from __future__ import annotations

import pytest
import torch
from int8_compile.int8.calibrate import LayerStats
from int8_compile.int8.options import Int8Options
from int8_compile.int8.plan import choose_methods, measure_layer, smoothing_scale

M, K, N = 1024, 3072, 3072


def gaussian(generator):
    return torch.randn(M, K, generator=generator)


def some_channels(generator):
    x = gaussian(generator)
    x[:, 7::100] *= 30
    return x


def few_channels(generator):
    x = gaussian(generator)
    x[:, [7, 300, 600, 2000]] *= 100  # each in a rotation group of its own; two in one cost 1.2 dB
    return x


def constant_offset(generator):
    return gaussian(generator) + 5 * torch.randn(M, 1, generator=generator).sign()


def after_gelu(generator):
    return torch.nn.functional.gelu(gaussian(generator))


# dB: rowwise, ConvRot-256, smoothed and rotated (research: kernels, part 6).
FIGURES = {gaussian: (38.4, 38.4, 38.3), some_channels: (25.6, 38.6, 46.0), few_channels: (20.5, 38.9, 48.8),
           constant_offset: (40.6, 40.5, 40.6), after_gelu: (36.8, 38.5, 38.4)}


@pytest.mark.parametrize("distribution", FIGURES, ids=lambda f: f.__name__)
def test_methods_reach_their_measured_quality_and_auto_takes_the_best(distribution):
    seed = torch.seed()
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    x, weight = distribution(generator), torch.randn(N, K, generator=generator) / K ** 0.5
    stats = LayerStats(torch.zeros(K))
    stats.add(x)
    stats.rows = [x]
    plan = measure_layer("layer", weight, stats, Int8Options())
    print(plan.sqnr)
    for method, db in zip(("rowwise", "convrot", "smoothquant"), FIGURES[distribution]):
        assert plan.sqnr[method] > db - 0.5, method
    choose_methods([plan], Int8Options())
    assert plan.sqnr[plan.method] >= plan.sqnr["convrot"]


def test_smoothing_leaves_dead_channels_alone_and_has_no_extremes():
    weight, amax = torch.randn(64, 128), torch.rand(128) + 0.1
    weight[:, 3], amax[5], amax[7] = 0, 0, 1e6
    scale = smoothing_scale(weight, amax, 0.5)
    assert scale.isfinite().all() and (scale > 0).all() and scale[3] == scale[5] == 1
    assert scale[7] == scale.min()


def test_layers_of_one_role_get_one_method_and_only_the_bad_one_stays_float():
    from int8_compile.int8.plan import LayerPlan

    def layer(name, rowwise, convrot, smooth):
        return LayerPlan(name, "", torch.ones(4), {"rowwise": rowwise, "convrot": convrot, "smoothquant": smooth})

    layers = [layer("a", 39.0, 38.0, 38.0), layer("b", 30.0, 38.0, 38.1), layer("c", 20.0, 21.0, 21.0)]
    choose_methods(layers, Int8Options(min_sqnr_db=25))
    assert [plan.method for plan in layers] == ["convrot", "convrot", "float"]
    assert layers[2].reason == "below 25 dB" and all(plan.pre_quant_scale is None for plan in layers)
    choose_methods(layers := [layer("a", 39.0, 38.0, 38.0), layer("b", 38.5, 38.0, 38.0)], Int8Options())
    assert {plan.method for plan in layers} == {"rowwise"}
    choose_methods(layers := [layer("a", 39.0, 38.0, 40.0), layer("b", 38.5, 38.0, 38.0)], Int8Options())
    assert {plan.method for plan in layers} == {"smoothquant"}
