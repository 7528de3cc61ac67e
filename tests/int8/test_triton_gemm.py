"""The Triton GEMM, on a GPU or in the interpreter: every tile sums exactly, whatever the shape; its tiles are ordered without cliffs."""
from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed on this platform", allow_module_level=True)

from int8_compile.int8.kernels import reference, triton_gemm
from int8_compile.int8.kernels.triton_configs import ARCHITECTURES, GLUON, TMA_TILES, GemmConfig, configs, cycles, like, resident, tiles
from int8_compile.int8.kernels.tuning import BUCKETS

from .conftest import CUDA, DEVICE, On

# The interpreter runs those of every architecture, a GPU its own.
ARCHS = (triton_gemm.card(DEVICE)[0],) if CUDA else ARCHITECTURES
HAS_TMA = 90 in ARCHS
HAS_GLUON = triton_gemm.has_gluon()  # not in the interpreter
TILES = tuple(dict.fromkeys(config for arch in ARCHS for tma in (True, False) for config in tiles(arch, tma, gluon=HAS_GLUON)))
KERNELS = ("pointer", *(("tma", *(GLUON if HAS_GLUON else ())) if HAS_TMA else ()))
GEMM = On(triton_gemm).int8_gemm
# (N, K) of linears of SDXL, Flux and Wan.
LAYERS = ((640, 640), (1280, 1280), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072), (5120, 13824))


def operands(m, n, k, saturated=False):
    low = 127 if saturated else -127
    q, w = (torch.randint(low, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    return q, torch.rand(m) + 0.1, w, torch.rand(n, 1) + 0.1, torch.randn(n)


def same(q, s, w, scale, bias, config=None):
    """Bit for bit: sums of fewer than 2**24 / 127**2 products are exact in the oracle's fp32 too, and the epilogue rounds as it does. On a
    GPU it rounds once less (fused multiply-add)."""
    y = GEMM(q, s, w, scale, bias, torch.float32, config)
    want = reference.int8_gemm(q, s, w, scale, bias, torch.float32)
    return torch.allclose(y, want, rtol=1e-6, atol=1e-3) if CUDA else torch.equal(y, want)


def test_the_list_has_every_kernel_that_runs_here():
    assert {config.kernel for config in TILES} == set(KERNELS)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_tile_is_exact_on_ragged_edges(config, split):
    assert same(*operands(150, 304, 1000), config._replace(split_k=split))


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile_is_as_exact_when_it_is_launched_again_with_other_operands_and_rows(kernel, split):
    """From the second call on it is bound, see bound.py; freed memory is used anew."""
    for m in (40, 40, 40, 33, 130, 1, 40):
        assert same(*operands(m, 96, 2048), GemmConfig(kernel, 64, 128, 128, 4, 3, split)), m


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 16), (3, 33, 40), (17, 100, 129), (65, 257, 255), (129, 16, 4096)], ids=str)
@pytest.mark.parametrize("config", [config for config in (
    GemmConfig("pointer", 16, 64, 256, 4, 3), GemmConfig("pointer", 64, 64, 128, 4, 4, 8), GemmConfig("tma", 64, 128, 128, 4, 4),
    GemmConfig("tma", 128, 128, 128, 8, 4, 8), *(GemmConfig(kernel, *tile) for kernel in GLUON for tile in ((64, 128, 128, 4, 3),
                                                                                                        (128, 256, 128, 8, 4))))
    if config.kernel in KERNELS], ids=str)
def test_odd_shapes_are_exact_also_where_a_part_of_k_is_empty(shape, config):
    assert same(*operands(*shape), config)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("split", [1, 8])
def test_long_saturated_sums_do_not_overflow(kernel, split):
    q, _, w, _, _ = operands(20, 40, 20000, saturated=True)
    one = torch.ones(())
    y = GEMM(q, torch.ones(20), -w, one, None, torch.float32, GemmConfig(kernel, 64, 128, 128, 4, 3, split))
    assert (y == -127 * 127 * 20000).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_are_of_the_type_asked_for_and_no_rows_are_none(kernel, dtype):
    q, s, w, scale, bias = operands(40, 48, 64)
    s /= 1000
    config = GemmConfig(kernel, 64, 128, 128, 4, 3)
    y = GEMM(q, s, w, scale, bias.to(dtype), dtype, config)
    want = reference.int8_gemm(q, s, w, scale, bias.to(dtype), torch.float32)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), want, rtol=2 ** -7, atol=0.01)  # the interpreter cuts bits off where GPUs round
    assert GEMM(q[:0], s[:0], w, scale, bias, dtype, config).shape == (0, 48)


def test_a_weight_at_an_odd_address_is_copied_and_read_like_any_other():
    q, s, _, scale, bias = operands(40, 48, 64)
    storage = torch.randint(-127, 128, (48 * 64 + 1,), dtype=torch.int8)
    # On a GPU the weight keeps its odd address there.
    moved = storage.to(DEVICE)[1:].view(48, 64)
    assert moved.data_ptr() % 16 and not triton_gemm.dense(moved).data_ptr() % 16 and triton_gemm.dense(q) is q
    for kernel in KERNELS:
        y = triton_gemm.int8_gemm(*(t.to(DEVICE) for t in (q, s)), moved, scale.to(DEVICE), bias.to(DEVICE), torch.float32,
                                  GemmConfig(kernel, 64, 128, 128, 4, 3))
        want = reference.int8_gemm(q, s, storage[1:].view(48, 64), scale, bias, torch.float32)
        torch.testing.assert_close(y.cpu(), want, rtol=1e-6, atol=1e-3)


def strided(t):
    """t's values with something else between them."""
    return torch.stack((t, torch.full_like(t, 77)), dim=-1)[..., 0]


@pytest.mark.parametrize("which", range(5), ids=["q", "s", "weight", "scale", "bias"])
@pytest.mark.parametrize("split", [1, 4])
def test_operands_that_are_strided_are_read_as_what_they_are(which, split):
    given = list(operands(33, 48, 1024))
    want = reference.int8_gemm(*given, torch.float32)
    given[which] = strided(given[which])
    assert not given[which].is_contiguous()
    configs = [None, *(GemmConfig(kernel, 64, 128, 128, 4, 3, split) for kernel in KERNELS)]
    for y in (*(GEMM(*given, torch.float32, config) for config in configs), On(triton_gemm).int_mm(*given, torch.float32)):
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-3)


def test_a_scale_that_is_one_value_expanded_is_read_as_that():
    q, s, w, _, bias = operands(33, 48, 64)
    one = torch.full((1, 1), 0.25).expand(48, 1)
    want = reference.int8_gemm(q, s, w, one, bias, torch.float32)
    torch.testing.assert_close(GEMM(q, s, w, one, bias, torch.float32), want, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 64, 96), (17, 33, 40), (150, 304, 1000), (70, 16, 8)], ids=str)
@pytest.mark.parametrize("plain", [False, True])
def test_cublaslt_with_one_pass_after_it_is_exact(shape, plain, monkeypatch):
    from int8_compile.int8.kernels import torch_mm

    monkeypatch.setattr(torch_mm, "BLOCK_BYTES", 4 * shape[1] * 40)  # more than one block of rows
    q, s, w, scale, bias = operands(*shape)
    scale, bias = (scale[:1].reshape(()), None) if plain else (scale, bias)
    for call in (On(triton_gemm).int_mm, On(torch_mm).int8_gemm):
        y = call(q, s, w, scale, bias, torch.float32)
        torch.testing.assert_close(y, reference.int8_gemm(q, s, w, scale, bias, torch.float32), rtol=1e-6, atol=1e-3)
    assert On(triton_gemm).int_mm(q[:0], s[:0], w, scale, bias, torch.float32).shape == (0, shape[1])


def test_a_tile_that_cannot_be_launched_is_left_out_and_the_next_one_runs(monkeypatch, caplog):
    monkeypatch.setattr(triton_gemm, "_BROKEN", set())
    given = [t.to(DEVICE) for t in operands(40, 48, 64)]
    found, multiply, tried = triton_gemm.candidates(given[0], given[2]), triton_gemm._multiply, []

    def failing(*arguments):
        tried.append(arguments[-1])
        if arguments[-1] in found[:2]:
            raise RuntimeError("out of resource: shared memory\nand more")
        return multiply(*arguments)
    monkeypatch.setattr(triton_gemm, "_multiply", failing)
    for _ in range(2):
        y = triton_gemm.int8_gemm(*given, torch.float32)
        torch.testing.assert_close(y, reference.int8_gemm(*given, torch.float32), rtol=1e-6, atol=1e-3)
    assert tried == [*found[:3], found[2]] and caplog.text.count("cannot run") == 2 and "and more" not in caplog.text
    assert triton_gemm.candidates(given[0], given[2]) == found[2:]


def test_memory_that_is_full_is_no_fault_of_a_tile(monkeypatch):
    monkeypatch.setattr(triton_gemm, "_BROKEN", set())
    given = [t.to(DEVICE) for t in operands(40, 48, 64)]

    def full(*arguments):
        raise torch.cuda.OutOfMemoryError
    monkeypatch.setattr(triton_gemm, "_multiply", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        triton_gemm.int8_gemm(*given, torch.float32)
    assert not triton_gemm._BROKEN


@pytest.mark.parametrize("arch", [*ARCHITECTURES, 87, 100, 121, 75], ids=str)
def test_candidates_are_few_and_fit_the_card(arch):
    shared = ARCHITECTURES[like(arch)].shared
    for (n, k), m in itertools.product((*LAYERS, (100, 96), (64, 256)), (0, 1, *BUCKETS)):
        found = configs(arch, m, n, k)
        assert 1 <= len(found) <= 12 and len(set(map(str, found))) == len(found)
        for config in found:
            assert config.stages * (config.bm + config.bn) * config.bk <= shared
            assert config.kernel == "pointer" or arch == 90
            assert config.split_k == 1 or k >= 512 * config.split_k


def test_gluon_is_never_the_last_resort_never_split_and_takes_no_place_of_tritons_tiles():
    assert not any(config.kernel in GLUON for arch in ARCHITECTURES for config in tiles(arch, gluon=arch != 90))
    for (n, k), m in itertools.product((*LAYERS, (100, 96), (64, 256)), (1, *BUCKETS)):
        found = configs(90, m, n, k, gluon=True)
        assert tuple(config for config in found if config.kernel not in GLUON) == configs(90, m, n, k)
        assert found[-1].kernel not in GLUON
        assert all(config.split_k == 1 for config in found if config.kernel in GLUON)
    assert all(configs(90, 4096, k, n, gluon=True)[0].kernel in GLUON for n, k in ((3072, 3072), (12288, 3072), (3072, 12288)))
    assert {config[1:4] for config in tiles(90, gluon=True) if config.kernel in GLUON} <= {tile[:3] for tile in TMA_TILES}


def test_two_programs_share_an_sm_where_they_fit_and_none_where_they_do_not():
    programs = {str(config).partition(" warps")[0] + f" {config.warps}": resident(config) for config in tiles(90) if config.kernel == "tma"}
    assert programs["tma 64x128x128 4"] == 2 and programs["tma 128x256x256 8"] == programs["tma 128x256x128 8"] == 1
    assert resident(GemmConfig("gluon_specialized", 128, 128, 128, 4, 3)) == 2
    assert resident(GemmConfig("tma", 128, 128, 128, 4, 3)) == 2 and resident(GemmConfig("tma", 128, 128, 128, 4, 4)) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_one_row_more_than_a_bucket_costs_no_more_than_a_full_next_one(arch, layer):
    """vLLM's tables made 17 rows slower than 32 (vllm-project/vllm#56924)."""
    sms = ARCHITECTURES[arch].sms
    for rows in BUCKETS[:-1]:
        here, above, full = (cycles(configs(arch, m, *layer)[0], arch, m, *layer, sms) for m in (rows, rows + 1, 2 * rows))
        assert above <= full
        assert above < 2.01 * here  # a second wave at the most


@pytest.mark.parametrize("scalar_ws", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_a_tile_is_tried_before_it_serves_and_a_wrong_one_is_found_out(monkeypatch, bias_dtype, scalar_ws):
    device, tile = torch.device("cuda" if torch.cuda.is_available() else "cpu"), GemmConfig("pointer", 16, 64, 256, 4, 3)
    triton_gemm._is_exact.cache_clear()
    state = torch.random.get_rng_state()
    assert triton_gemm._is_exact(device, tile, bias_dtype, torch.float32, scalar_ws)
    assert torch.equal(torch.random.get_rng_state(), state)
    right = triton_gemm.launch

    def wrong(*args):
        launched = right(*args)

        def bound(grid, operands, *numbers):
            launched.bound(grid, operands, *numbers)
            operands[-1][-1, -1] += 1  # one product of one step too many
        return launched._replace(bound=bound)
    monkeypatch.setattr(triton_gemm, "launch", wrong)
    triton_gemm._is_exact.cache_clear()
    assert not triton_gemm._is_exact(device, tile, bias_dtype, torch.float32, scalar_ws)
    triton_gemm._is_exact.cache_clear()


def added_of(m, n, images, dtype, strided=False):
    """A residual, and a gate for each of so many images, none for 0. strided: the gate as mod.chunk(6, -1) gives it."""
    gate = torch.randn(images, 6 * n).to(dtype).chunk(6, -1)[2] if images else None
    return reference.Added(torch.randn(m, n).to(dtype), gate if strided or not images else gate.contiguous())


def assert_added(y, q, s, w, scale, bias, dtype, added):
    """Within the last bit of dtype, and fp32's few roundings, of float64. In fp32 the interpreter rounds as the oracle; to less it cuts
    bits off where GPUs round."""
    assert y.dtype == dtype
    if dtype is torch.float32 and not CUDA:
        assert torch.equal(y, reference.int8_gemm(q, s, w, scale, bias, dtype, added))
    bias = torch.zeros(len(w), dtype=torch.double) if bias is None else bias.double()
    gate = torch.ones(1, 1) if added.gate is None else added.gate
    product, gate = q.double() @ w.double().t() * s.double()[:, None] * scale.double().reshape(1, -1), gate.double()
    gate, residual = gate.repeat_interleave(len(y) // len(gate), 0), added.residual.double()
    want = residual + gate * (product + bias)
    rounded = residual.abs() + gate.abs() * (product.abs() + bias.abs())
    limits = torch.finfo(dtype)
    last_bit = limits.eps * want.abs().clamp_min(limits.smallest_normal)  # below which the last bits of all values are the same
    assert ((y.double() - want).abs() <= last_bit + 2.0 ** -22 * rounded).all()


ADDING = (GemmConfig("pointer", 16, 64, 256, 4, 3), GemmConfig("pointer", 64, 256, 64, 4, 4), GemmConfig("pointer", 64, 64, 128, 4, 4, 4),
          *(GemmConfig(kernel, 64, 128, 128, 4, 4) for kernel in KERNELS if kernel != "pointer"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", ADDING, ids=str)
def test_what_is_added_is_added_before_the_cast(config, dtype):
    torch.manual_seed(0)
    kinds = (70, 2, True), (70, 0, False), (70, 1, True), (70, 70, False), (128, 2, False), (1, 1, False)
    for m, images, strided in kinds[:2] if dtype is torch.float16 else kinds:
        q, s, w, scale, bias = operands(m, 80, 528)
        s /= 1000
        scale, bias = (scale, bias.to(dtype)) if images % 2 else (scale[:1].reshape(()), None)
        added = added_of(m, 80, images, dtype, strided)
        assert_added(GEMM(q, s, w, scale, bias, dtype, config, added), q, s, w, scale, bias, dtype, added)
    assert GEMM(q[:0], s[:0], w, scale, bias, dtype, config, added_of(0, 80, 1, dtype)).shape == (0, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [0, 1, 2, 5, 150])
def test_what_is_added_after_cublaslt_is_that_of_the_block_of_rows(images, dtype, monkeypatch):
    from int8_compile.int8.kernels import torch_mm

    monkeypatch.setattr(torch_mm, "BLOCK_BYTES", 4 * 48 * 40)  # more than one block of rows
    q, s, w, scale, bias = operands(150, 48, 64)
    s /= 100
    added = added_of(150, 48, images, dtype, strided=True)
    for call in (On(triton_gemm).int_mm, On(torch_mm).int8_gemm):
        assert_added(call(q, s, w, scale, bias, dtype, added=added), q, s, w, scale, bias, dtype, added)


@pytest.mark.parametrize("images", [0, 1, 2, 40])
def test_a_tile_whose_epilogue_cannot_add_has_it_added_after_it(images, monkeypatch, caplog):
    monkeypatch.setattr(triton_gemm, "_ADD_APART", set())
    launch = triton_gemm.launch

    def failing(*key):
        if len(key) > 6 and key[6]:
            raise RuntimeError("out of resource: registers")
        return launch(*key)
    monkeypatch.setattr(triton_gemm, "launch", failing)
    q, s, w, scale, bias = operands(40, 48, 64)
    for dtype in (torch.float32, torch.float16):
        # y is rounded to its type before it is gated: what that costs is no more than what the result itself is rounded by.
        added = added_of(40, 48, images, dtype)
        want = reference.int8_gemm(q, s / 100, w, scale, bias, torch.float32, added)
        y = GEMM(q, s / 100, w, scale, bias, dtype, GemmConfig("pointer", 64, 64, 128, 4, 4), added)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), want, rtol=eps, atol=8 * eps * want.abs().max().item())
    assert caplog.text.count("cannot add") == 1


def test_who_chooses_among_all_chooses_without_what_is_added_and_runs_with_it(monkeypatch, tmp_path):
    from int8_compile.int8.kernels import autotune
    from int8_compile.int8.kernels.tuning import Choices

    monkeypatch.setattr(autotune, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "choices", lambda: chosen)
    monkeypatch.setattr(autotune.waiting, "add", lambda *_: None)
    chosen = Choices(tmp_path / "choices.json", {}, 0.0)
    q, s, w, scale, bias = (t.to(DEVICE) for t in operands(40, 48, 64))
    added = reference.Added(*(t.to(DEVICE) for t in added_of(40, 48, 2, torch.float32)))
    want = reference.int8_gemm(q, s, w, scale, bias, torch.float32, added)
    for _ in range(2):
        torch.testing.assert_close(autotune.int8_gemm(q, s, w, scale, bias, torch.float32, added), want, rtol=1e-6, atol=1e-3)
        plain = autotune.int8_gemm(q, s, w, scale, bias, torch.float32)
        torch.testing.assert_close(plain, reference.int8_gemm(q, s, w, scale, bias, torch.float32), rtol=1e-6, atol=1e-3)
    assert len(autotune._CHOSEN) == 1
