import pytest
import torch

import nf4
from nf4.codebook import ABSMAX_ZERO_CODE, absmax_map
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.quantize_absmax import quantize_absmax

MAP = absmax_map(torch.device("cpu"))


def nearest(x: torch.Tensor) -> torch.Tensor:
    """Search the map in float64; argmin takes the lower of two that are as near."""
    return (MAP.double() - x.double()[:, None]).abs().argmin(dim=1).to(torch.uint8)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
def test_quantize_absmax_matches_a_search_of_the_map(blocks) -> None:
    absmax = torch.rand(blocks) + 0.5
    codes, absmax2, offset = quantize_absmax(absmax)
    assert offset == absmax.double().mean().float()
    for j, d in enumerate((absmax - offset).split(256)):
        assert absmax2[j] == d.abs().max()
        scaled = d * (1 / absmax2[j]) if absmax2[j] else d
        assert torch.equal(codes[256 * j : 256 * (j + 1)], nearest(scaled))


def test_quantize_absmax_ties_take_the_lower_code() -> None:
    middles = (MAP.double()[1:] + MAP.double()[:-1]) / 2
    exact = middles[middles.float().double() == middles].float()
    x = torch.cat([exact, -exact.flip(0), torch.ones(1), -torch.ones(1)])
    codes, absmax2, offset = quantize_absmax(x[:256])
    assert offset == x[:256].double().mean().float()
    scaled = (x[:256] - offset) * (1 / absmax2)
    assert torch.equal(codes, nearest(scaled))
    assert len(exact) > 100


@pytest.mark.parametrize("value", [0.0, 1.0, 3.7])
def test_quantize_absmax_of_equal_scales_is_exact(value) -> None:
    absmax = torch.full((300,), value)
    codes, absmax2, offset = quantize_absmax(absmax)
    assert (codes == ABSMAX_ZERO_CODE).all() and (absmax2 == 0).all()
    assert torch.equal(dequantize_absmax(codes, absmax2, offset), absmax)


def test_quantize_absmax_mean_does_not_depend_on_the_order() -> None:
    absmax = torch.rand(100_000) + 0.01
    _, _, offset = quantize_absmax(absmax)
    for seed in range(5):
        order = torch.randperm(len(absmax), generator=torch.Generator().manual_seed(seed))
        assert quantize_absmax(absmax[order])[2] == offset


def test_quantize_absmax_of_scales_as_far_apart_as_fp32_reaches_is_finite() -> None:
    absmax = PTX_CASES["farther_than_fp32_reaches"]
    codes, absmax2, offset = quantize_absmax(absmax)
    assert absmax2 == torch.finfo(torch.float32).max
    found = dequantize_absmax(codes, absmax2, offset)
    assert torch.allclose(found[1:], absmax[1:], rtol=0.01) and found.isfinite().all()


@pytest.mark.parametrize("case", ["farther_than_fp32_reaches", "not_finite", "2000"])
def test_quantize_absmax_on_the_cpu_gives_the_bits_of_the_reference(case) -> None:
    cpu = pytest.importorskip("nf4.cpu.quantize_absmax")
    absmax = PTX_CASES.get(case, torch.tensor([torch.inf] + [1.0] * 299))
    pairs = zip(cpu.quantize_absmax(absmax), quantize_absmax(absmax), strict=True)
    for ours, expected in pairs:
        assert torch.equal(ours.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_quantize_absmax_empty() -> None:
    codes, absmax2, offset = quantize_absmax(torch.empty(0))
    assert (codes.shape, absmax2.shape, offset.item()) == ((0,), (0,), 0.0)


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_quantize_absmax_agrees_with_bitsandbytes_up_to_its_lookup(bnb_parts, block_size) -> None:
    """Its approximate lookup differs in about 0.12 % of codes, and then it is the one farther off.

    The means differ by at most 2 fp32 steps: bitsandbytes sums in fp32.
    """
    w = torch.randn(512, 2048)
    theirs, ours = bnb_parts(w, block_size, double_quant=True).q, nf4.quantize(w, block_size)
    assert torch.equal(ours.packed, theirs.packed)
    torch.testing.assert_close(ours.offset, theirs.offset, rtol=2**-22, atol=0)
    torch.testing.assert_close(ours.absmax2, theirs.absmax2, rtol=1e-5, atol=0)
    differ = ours.absmax != theirs.absmax
    assert differ.float().mean() < 0.005
    absmax = nf4.quantize(w, block_size, double_quant=False).absmax
    off = [
        (dequantize_absmax(q.absmax, q.absmax2, q.offset) - absmax).abs() for q in (ours, theirs)
    ]
    assert (off[0] <= off[1] + 2**-22 * absmax)[differ].all()


@pytest.mark.kernel
@pytest.mark.parametrize("blocks", [0, 1, 2, 255, 256, 257, 5000, 300_000])
def test_quantize_absmax_kernel_matches_reference(blocks, device) -> None:
    from nf4.kernels import quantize_absmax as kernel

    absmax = (torch.rand(blocks) + 0.01).to(device)
    for ours, expected in zip(kernel.quantize_absmax(absmax), quantize_absmax(absmax), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.kernel
def test_quantize_absmax_kernel_ties_and_equal_scales(device) -> None:
    from nf4.kernels import quantize_absmax as kernel

    middles = ((MAP[1:] + MAP[:-1]) / 2).repeat(3)
    ties = torch.cat([middles, -middles, torch.ones(1), -torch.ones(1)]).to(device)
    for absmax in (ties, torch.full((300,), 3.7, device=device), torch.zeros(5, device=device)):
        for ours, expected in zip(
            kernel.quantize_absmax(absmax), quantize_absmax(absmax), strict=True
        ):
            assert torch.equal(ours, expected)


def check_kernel(kernel, absmax: torch.Tensor) -> None:
    for ours, expected in zip(kernel.quantize_absmax(absmax), quantize_absmax(absmax), strict=True):
        assert torch.equal(ours, expected)


PTX_CASES = {
    **{f"{n}": torch.rand(n) + 0.01 for n in (1, 255, 257, 2000)},
    "equal": torch.full((300,), 3.7),
    "farthest_below_the_mean": torch.tensor([0.1] + [1.0] * 99),
    "farthest_above_the_mean": torch.tensor([1.9] + [1.0] * 99),
    "farther_than_fp32_reaches": torch.tensor([-3.4e38] + [3.4e38] * 99),
}


@pytest.mark.parametrize("absmax", PTX_CASES.values(), ids=PTX_CASES.keys())
def test_quantize_absmax_ptx_matches_reference(absmax, emulate) -> None:
    from nf4.kernels import quantize_absmax as kernel

    check_kernel(kernel, absmax)
    assert emulate.launches == ["_sum_kernel", "_quantize_absmax_kernel"]


def test_quantize_absmax_ptx_ties(emulate) -> None:
    from nf4.kernels import quantize_absmax as kernel

    middles = (MAP[1:] + MAP[:-1]) / 2
    check_kernel(kernel, torch.cat([middles, -middles, torch.ones(1), -torch.ones(1)]))


MISTAKES = {
    "sum_mask": ("offs < blocks, other=0.0).to", "offs <= blocks, other=0.0).to"),
    "mask": ("mask = offs < blocks", "mask = offs < blocks + 1"),
    "part_left_out": ("start + tl.arange(0, TILE)", "start + 1 + tl.arange(0, TILE)"),
    "mean_in_fp32": ("axis=0) / blocks", "axis=0).to(tl.float32) / blocks"),
    "sign_lost": ("tl.max(tl.abs(d)", "tl.max(d"),
    "tie_goes_up": ("scaled > tl.load", "scaled >= tl.load"),
    "one_step_too_few": ("tl.static_range(8)", "tl.static_range(7)"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_quantize_absmax_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("quantize_absmax", "quantize_absmax", *mistake, tmp_path)
    middles = (MAP[1:] + MAP[:-1]) / 2
    ties = torch.cat([middles, -middles, torch.ones(1), -torch.ones(1)])
    assert is_noticed(check_kernel, ((wrong, absmax) for absmax in (ties, *PTX_CASES.values())))
