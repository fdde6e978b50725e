import pytest
import torch
from helpers import lazy_zeros
from hypothesis import given, settings
from hypothesis import strategies as st

import nf4
from nf4.codebook import BLOCK_SIZES, NF4_LEVELS, nf4_thresholds
from nf4.reference import quantize as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(64, 96), (7, 33), (5,), (3, 5, 7), (1, 4096), (129, 64), (2, 3, 64), ()]


def codes_of(q: nf4.NF4Tensor) -> torch.Tensor:
    byte = q.packed.flatten()
    return torch.stack([byte >> 4, byte & 15], dim=1).flatten()[: q.numel()]


def literal_codes(w: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize element by element, as FORMAT's sentences say it, with a search of the levels."""
    codes, absmaxes = [], []
    for block in w.float().flatten().split(block_size):
        absmax = block.abs().max()
        absmaxes.append(absmax)
        scaled = block * (torch.ones(()) / absmax)
        codes.append((scaled[:, None] > torch.tensor(nf4_thresholds())).sum(dim=1))
    return torch.cat(codes).to(torch.uint8), torch.stack(absmaxes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_matches_the_literal_definition(shape, dtype, block_size) -> None:
    w = torch.randn(shape).to(dtype)
    q = nf4.quantize(w, block_size, double_quant=False)
    codes, absmax = literal_codes(w, block_size)
    assert torch.equal(codes_of(q), codes)
    assert torch.equal(q.absmax, absmax)
    assert (q.shape, q.dtype, q.block_size) == (w.shape, dtype, block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize_matches_bitsandbytes(bnb_parts, dtype, block_size) -> None:
    w = torch.randn(20, 4096).to(dtype)  # whole blocks a row, see test_dequantize
    w[3] *= 1000
    theirs = bnb_parts(w, block_size)
    ours = nf4.quantize(w, block_size, double_quant=False)
    assert torch.equal(ours.packed, theirs.q.packed)
    assert torch.equal(ours.absmax, theirs.q.absmax)
    assert torch.equal(nf4.dequantize(ours), theirs.dequantized)


@pytest.mark.parametrize("sign", [1, -1])
def test_quantize_ties_and_neighbours_match_bitsandbytes(bnb_parts, sign) -> None:
    """Every threshold, one fp32 step to each side, under absmax of many mantissas."""
    thresholds = torch.tensor(nf4_thresholds())
    near = torch.cat(
        [torch.nextafter(thresholds, thresholds + d) for d in (-torch.inf, 0, torch.inf)]
    )
    rows = []
    for absmax in torch.cat([torch.ones(1), torch.rand(200) + 0.5, 2.0 ** torch.arange(-20, 20)]):
        x = near * absmax
        block = torch.zeros(64)
        block[:45], block[63] = x, sign * absmax
        rows.append(block)
    w = torch.stack(rows)
    ours, theirs = nf4.quantize(w, double_quant=False), bnb_parts(w)
    assert torch.equal(ours.packed, theirs.q.packed)
    exact = codes_of(ours)[:45].view(3, 15)
    assert torch.equal(exact[0], torch.arange(15).to(torch.uint8))
    assert torch.equal(exact[1], torch.arange(15).to(torch.uint8)), "a tie takes the lower code"
    assert torch.equal(exact[2], torch.arange(1, 16).to(torch.uint8))


def test_quantize_every_pair_of_bf16_value_and_absmax_matches_bitsandbytes(bnb_parts) -> None:
    """All bf16 x with |x| ≤ absmax, for absmax of every mantissa: other exponents only scale."""
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for mantissa in range(128):
        absmax = torch.tensor(0x3F80 | mantissa, dtype=torch.int16).view(torch.bfloat16)
        x = every[every.abs() <= absmax]
        x = torch.cat([x, x.new_zeros(-len(x) % 63)]).view(-1, 63)
        w = torch.cat([x, absmax.expand(len(x), 1)], dim=1)
        ours, theirs = nf4.quantize(w, double_quant=False), bnb_parts(w)
        assert torch.equal(ours.packed, theirs.q.packed), f"mantissa {mantissa}"
        assert torch.equal(ours.absmax, theirs.q.absmax)


def test_quantize_all_zero_block_gives_code_seven_and_positive_zero() -> None:
    w = torch.cat([torch.zeros(64), torch.randn(64), -torch.zeros(64)])
    q = nf4.quantize(w, double_quant=False)
    assert q.absmax[0] == 0 and q.absmax[2] == 0
    assert (codes_of(q)[:64] == 7).all() and (codes_of(q)[128:] == 7).all()
    out = nf4.dequantize(q)
    assert not out[:64].signbit().any() and (out[:64] == 0).all()


@pytest.mark.parametrize("largest", [1e-45, 5e-39, 1.1754942e-38])
def test_quantize_subnormal_block_is_zero(largest) -> None:
    w = torch.full((64,), -1e-45)
    w[5] = largest
    q = nf4.quantize(w, double_quant=False)
    assert q.absmax.item() == 0
    assert (codes_of(q) == 7).all()
    assert not nf4.dequantize(q).signbit().any()


def test_quantize_smallest_normal_and_largest_blocks_are_kept() -> None:
    for largest in (2.0**-126, 3.4028235e38):
        w = torch.linspace(-1, 1, 64) * largest
        q = nf4.quantize(w, double_quant=False)
        assert q.absmax.item() == torch.tensor(largest).item()
        assert codes_of(q)[0] == 0 and codes_of(q)[-1] == 15


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_rejects_nan_and_infinity_naming_the_first(bad, dtype) -> None:
    w = torch.randn(5, 40).to(dtype)
    w[2, 7] = w[4, 0] = bad
    before = w.clone()
    with pytest.raises(
        ValueError, match=rf"w: expected finite values, got {bad} at index \(2, 7\)"
    ):
        nf4.quantize(w)
    assert torch.equal(w.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_empty(double_quant) -> None:
    q = nf4.quantize(torch.empty(0, 64), double_quant=double_quant)
    assert q.packed.numel() == 0 and q.absmax.numel() == 0
    assert nf4.dequantize(q).shape == (0, 64)


def test_quantize_odd_count_pads_with_code_seven() -> None:
    q = nf4.quantize(torch.full((65,), -1.0), double_quant=False)
    assert q.packed.shape == (33,)
    assert q.packed[-1] == 0x07


def test_quantize_last_block_partial_has_its_own_absmax() -> None:
    w = torch.cat([torch.full((64,), 100.0), torch.tensor([0.5, -0.25])])
    q = nf4.quantize(w, double_quant=False)
    assert q.absmax.tolist() == [100.0, 0.5]
    assert nf4.dequantize(q)[64] == 0.5


def test_quantize_blocks_straddle_rows() -> None:
    w = torch.randn(3, 96)
    q = nf4.quantize(w, double_quant=False)
    assert torch.equal(q.absmax, nf4.quantize(w.flatten(), double_quant=False).absmax)
    assert q.packed.shape == (3, 48)


def test_quantize_non_contiguous_equals_its_copy() -> None:
    for w in (torch.randn(96, 64).T, torch.randn(64, 200)[:, 3:131], torch.randn(2, 6, 64)[:, ::2]):
        ours, copy = nf4.quantize(w), nf4.quantize(w.contiguous())
        assert torch.equal(ours.packed, copy.packed) and torch.equal(ours.absmax, copy.absmax)
        assert ours.shape == w.shape


@st.composite
def tensors(draw) -> torch.Tensor:
    """Draw a tensor of a few blocks with an ugly mixture of magnitudes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 300))
    w = torch.randn(n, generator=generator)
    if draw(st.booleans()):
        w *= torch.exp(4 * torch.randn(n, generator=generator))
    if draw(st.booleans()):
        w[torch.rand(n, generator=generator) < 0.5] = 0
    return w.clamp(-60000, 60000).to(draw(st.sampled_from(DTYPES)))


@settings(deadline=None, max_examples=200)
@given(w=tensors(), block_size=st.sampled_from((32, 64, 128)))
def test_quantize_is_idempotent(w, block_size) -> None:
    q = nf4.quantize(w.float(), block_size, double_quant=False)
    again = nf4.quantize(nf4.dequantize(q), block_size, double_quant=False)
    assert torch.equal(q.packed, again.packed)
    assert torch.equal(q.absmax, again.absmax)


@settings(deadline=None, max_examples=200)
@given(w=tensors(), exponent=st.integers(-30, 30))
def test_quantize_scaling_by_a_power_of_two_changes_only_the_scales(w, exponent) -> None:
    w = w.float()
    q = nf4.quantize(w, double_quant=False)
    scaled = nf4.quantize(w * 2.0**exponent, double_quant=False)
    assert torch.equal(q.packed, scaled.packed)
    assert torch.equal(q.absmax * 2.0**exponent, scaled.absmax)


@settings(deadline=None, max_examples=200)
@given(w=tensors(), block_size=st.sampled_from((32, 64, 128)))
def test_quantize_error_is_at_most_half_the_widest_gap(w, block_size) -> None:
    """The bound holds in exact arithmetic; two fp32 roundings add at most 2^-22 of absmax."""
    w = w.float()
    out = nf4.dequantize(nf4.quantize(w, block_size, double_quant=False))
    levels = torch.tensor(NF4_LEVELS)
    bound = (levels[1:] - levels[:-1]).max().item() / 2 + 2**-22
    for block, close in zip(w.split(block_size), out.split(block_size), strict=True):
        assert (block - close).abs().max() <= bound * block.abs().max()


MAE = {32: 0.067746, 64: 0.072798, 128: 0.076831, 256: 0.080337}
SIGMA = {32: 0.000069, 64: 0.000074, 128: 0.000091, 256: 0.000102}


@pytest.mark.parametrize("block_size", MAE)
def test_quantize_measures_the_known_error_on_normal_weights(block_size) -> None:
    """FORMAT's figures for N(0, 1), 1024 × 1024, within four of their standard deviations."""
    w = torch.randn(1024, 1024)
    q = nf4.quantize(w, block_size, double_quant=False)
    mae = nf4.quantization_error(w, q).mae
    assert abs(mae - MAE[block_size]) < 4 * SIGMA[block_size]


def test_quantize_into_out() -> None:
    for shape, double_quant in (((12, 64), True), ((7, 33), True), ((5, 130), False)):
        out = nf4.quantize(torch.randn(shape), double_quant=double_quant)
        pointers = [part.data_ptr() for part in out.tensors()]
        w = torch.randn(shape)
        assert nf4.quantize(w, double_quant=double_quant, out=out) is out
        assert pointers == [part.data_ptr() for part in out.tensors()]
        for part, expected in zip(
            out.tensors(), nf4.quantize(w, double_quant=double_quant).tensors(), strict=True
        ):
            assert torch.equal(part, expected)


def test_quantize_leaves_out_as_it_was_when_a_value_is_not_finite() -> None:
    out = nf4.quantize(torch.randn(4, 64))
    before = [part.clone() for part in out.tensors()]
    w = torch.randn(4, 64)
    w[2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"got inf at index \(2, 3\)"):
        nf4.quantize(w, out=out)
    for part, expected in zip(out.tensors(), before, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_quantize_unchecked_never_gives_finite_values_for_a_block_that_is_not(
    bad, double_quant
) -> None:
    w = torch.randn(8, 64)
    w[3, 5] = bad
    q = nf4.quantize(w, double_quant=double_quant, check=False)
    out = nf4.dequantize(q)
    assert not out[3].isfinite().any()
    if not double_quant:
        assert out.isfinite().sum() == 7 * 64


KERNEL_SHAPES = [(7, 33), (129, 130), (), (0, 64), (3, 4096), (300, 72)]
KERNEL_BLOCK_SIZES = (32, 64, 512, 4096)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
@pytest.mark.parametrize("block_size", KERNEL_BLOCK_SIZES)
def test_quantize_kernel_matches_reference(block_size, shape, dtype, device) -> None:
    from nf4.kernels import quantize as kernel

    check_kernel(kernel, torch.randn(shape).to(device, dtype), block_size)


def threshold_neighbours() -> torch.Tensor:
    """Return rows of 64 with an absmax of 1: bucket edges, thresholds, and four steps around."""
    points = torch.cat([torch.tensor(nf4_thresholds()), torch.arange(-16, 17) / 16])
    steps = [points]
    for direction in (-torch.inf, torch.inf):
        near = points
        for _ in range(4):
            near = torch.nextafter(near, torch.full_like(near, direction))
            steps.append(near)
    x = torch.cat(steps).clamp(-1, 1)
    x = torch.cat([x, x.new_zeros(-len(x) % 63)]).view(-1, 63)
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def check_kernel(kernel, w: torch.Tensor, block_size: int = 64) -> None:
    for ours, expected in zip(
        kernel.quantize(w, block_size), reference.quantize(w, block_size), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.kernel
def test_quantize_kernel_bucket_edges_thresholds_and_their_neighbours(device) -> None:
    from nf4.kernels import quantize as kernel

    check_kernel(kernel, threshold_neighbours().to(device))


@pytest.mark.kernel
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1.1754942e-38, 2.0**-126, 2.0**126, 3.4028235e38])
def test_quantize_kernel_special_blocks(largest, device) -> None:
    from nf4.kernels import quantize as kernel

    check_kernel(kernel, torch.linspace(-1, 1, 64, device=device) * largest)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_kernel_shows_nan_and_infinity_in_absmax(bad, device) -> None:
    from nf4.kernels import quantize as kernel

    w = torch.randn(300, device=device)
    w[70] = bad
    _, absmax = kernel.quantize(w, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True, True]


@pytest.mark.kernel
def test_quantize_kernel_takes_views(device) -> None:
    from nf4.kernels import quantize as kernel

    for w in (torch.randn(96, 64).T, torch.randn(64, 200)[:, 3:131], torch.randn(999)[1:]):
        check_kernel(kernel, w.to(device))


PTX_CASES = {
    "whole_bf16": ((128, 64), 64, torch.bfloat16),
    "masked_bf16": ((129, 136), 64, torch.bfloat16),
    "odd_fp16": ((7, 33), 32, torch.float16),
    "even_fp32": ((5, 30), 32, torch.float32),
    "long_blocks": ((300, 72), 4096, torch.bfloat16),
    "two_programs": ((257, 64), 64, torch.float32),
}


@pytest.mark.parametrize("case", PTX_CASES.values(), ids=PTX_CASES.keys())
def test_quantize_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import quantize as kernel

    shape, block_size, dtype = case
    check_kernel(kernel, torch.randn(shape).to(dtype), block_size)
    assert emulate.launches == ["_quantize_kernel"]


def test_quantize_ptx_bucket_edges_thresholds_and_special_blocks(emulate) -> None:
    from nf4.kernels import quantize as kernel

    largest = torch.tensor([0.0, 1e-45, 1.1754942e-38, 2.0**-126, 2.0**126, 3.4028235e38])
    special = largest[:, None] * torch.linspace(-1, 1, 64)
    check_kernel(kernel, torch.cat([threshold_neighbours(), special]))


def test_quantize_ptx_shows_nan_and_infinity_in_absmax(emulate) -> None:
    from nf4.kernels import quantize as kernel

    w = torch.randn(5, 64)
    w[1, 6], w[2, 0], w[4, 63] = torch.nan, torch.inf, -torch.inf
    _, absmax = kernel.quantize(w, 64)
    assert absmax.isfinite().tolist() == [True, False, False, True, False]


def test_quantize_ptx_past_2_31_elements(emulate) -> None:
    from nf4.kernels import quantize as kernel

    n = 2**31 + 3 * 8192
    w = lazy_zeros(n, torch.bfloat16)
    out = lazy_zeros(n // 2, torch.uint8), lazy_zeros(n // 64, torch.float32)
    w[-8192:] = torch.randn(8192)
    emulate.programs = [(n // 8192 - 1, 0, 0)]
    kernel.quantize(w, 64, out)
    packed, absmax = reference.quantize(w[-8192:], 64)
    assert torch.equal(out[0][-4096:], packed) and torch.equal(out[1][-128:], absmax)
    assert not out[0][-8192:-4096].any() and not out[1][:128].any()


MISTAKES = {
    "load_mask": ("quantize", "offs // MASK * MASK", "offs - 1"),
    "store_mask": ("quantize", "group * (2 * group) < left)", "group * (2 * group) + 2 < left)"),
    "absmax_mask": ("quantize", "mask=rows * BLOCK_SIZE < left", "mask=rows < left"),
    "offset": ("quantize", "x_ptr + first * BLOCK_SIZE", "x_ptr + first * BLOCK_SIZE // 2"),
    "nibbles_swapped": ("quantize", "(high << 4) | low", "(low << 4) | high"),
    "absmax_without_sign": ("quantize", "tl.abs(x)", "x"),
    "threshold_of_the_next_bucket": ("_encode", "$2, i, 0x1f", "$2, i, 0xf"),
    "tie_goes_up": ("_encode", "setp.gt.f32", "setp.ge.f32"),
    "approximate_reciprocal": ("_encode", "rcp.rn.f32", "rcp.approx.f32"),
    "subnormal_block": ("quantize", "absmax < SMALLEST", "absmax < 0"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_quantize_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("quantize", *mistake, tmp_path)
    cases = [(torch.randn(s).to(d), b) for s, b, d in PTX_CASES.values()]
    cases += [(threshold_neighbours(), 64), (torch.linspace(-1, 1, 64) * 2.0**-127, 64)]
    assert is_noticed(check_kernel, ((wrong, *case) for case in cases))
