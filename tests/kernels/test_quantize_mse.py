"""The scale of least squared error: what it saves, and the same bits everywhere."""

import pytest
import torch
from helpers import on_gpus
from torch import nn

import nf4
from nf4.reference import quantize as absmax_reference
from nf4.reference.quantize_mse import quantize_mse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(64, 96), (7, 33), (5,), (3, 5, 7), (1, 4096), (), (0, 64), (300, 72)]


def error_of(
    w: torch.Tensor, scale: str, block_size: int = 64, double_quant: bool = False
) -> float:
    return nf4.quantization_error(w, nf4.quantize(w, block_size, double_quant, scale=scale)).mse


def test_normal_weights_lose_less() -> None:
    """Within three standard errors of 0.00684 and 0.00723: the figures a fine search finds."""
    w = torch.randn(2048, 1024)
    signed, positive, absmax = (error_of(w, s) for s in ("mse", "mse-positive", "absmax"))
    assert signed <= 0.00690 and positive <= 0.00725 and absmax > 0.0084
    for scale, single in (("mse", signed), ("mse-positive", positive)):
        assert error_of(w, scale, double_quant=True) < 1.01 * single


@pytest.mark.parametrize("block_size", [32, 256, 4096])
@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers", "uniform"])
def test_never_worse_than_absmax(kind, block_size) -> None:
    w = torch.randn(256, 512)
    if kind == "laplace":
        w = torch.distributions.Laplace(0, 1).sample((256, 512))
    elif kind == "outliers":
        w[torch.rand_like(w) < 0.002] *= 20
    elif kind == "uniform":
        w = torch.rand(256, 512) - 0.5
    signed, positive, absmax = (
        error_of(w, s, block_size) for s in ("mse", "mse-positive", "absmax")
    )
    assert signed <= positive <= absmax


def test_no_other_scale_of_a_fine_search_is_much_better() -> None:
    w = torch.randn(200, 64)
    levels = nf4.codebook.nf4_levels(w.device)
    thresholds = torch.tensor(nf4.codebook.nf4_thresholds())
    largest = w.abs().amax(dim=1, keepdim=True)
    best = torch.full((200,), torch.inf)
    for ratio in torch.cat([torch.linspace(0.4, 1.3, 400), -torch.linspace(0.4, 1.3, 400)]):
        scale = ratio * largest
        l = levels[torch.bucketize(w / scale, thresholds)]  # noqa: E741
        scale = (w * l).sum(dim=1, keepdim=True) / (l * l).sum(dim=1, keepdim=True)
        best = torch.minimum(best, (w - scale * l).square().sum(dim=1))
    q = nf4.quantize(w, double_quant=False, scale="mse")
    found = (w - nf4.dequantize(q)).square().sum(dim=1)
    assert found.sum() <= 1.01 * best.sum()


def test_codes_are_those_of_quantize_with_the_scale_found() -> None:
    w = torch.randn(40, 64)
    packed, scale = quantize_mse(w, 64, signed=True)
    assert (scale < 0).any() and (scale > 0).any()
    scaled = w * (1 / scale)[:, None]
    codes = torch.bucketize(scaled, torch.tensor(nf4.codebook.nf4_thresholds()))
    codes = codes.view(-1).byte()
    assert torch.equal(packed, codes[0::2] << 4 | codes[1::2])
    assert (quantize_mse(w, 64, signed=False)[1] > 0).all()


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_a_power_of_two_changes_only_the_scales(power) -> None:
    w = torch.randn(40, 64)
    packed, scale = quantize_mse(w, 64, signed=True)
    again, scaled = quantize_mse(w * 2.0**power, 64, signed=True)
    assert torch.equal(again, packed) and torch.equal(scaled, scale * 2.0**power)


SPECIAL = {
    "zeros": torch.zeros(64),
    "subnormal": torch.linspace(-1, 1, 64) * 2.0**-127,
    "one_value": torch.full((64,), 3.7),
    "one_element": torch.cat([torch.tensor([-2.5]), torch.zeros(63)]),
    "two_levels": torch.tensor([1.0, -1.0]).repeat(32),
    "huge": torch.linspace(-1, 1, 64) * 3.4028235e38,
    # Exact with a scale that fp32 cannot hold: without the level 1, and -1
    "beyond": (torch.tensor(nf4.codebook.NF4_LEVELS[1:15]).double() * 4.5e38).float(),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("w", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_blocks(w, signed) -> None:
    packed, scale = quantize_mse(w, 64, signed)
    out = nf4.dequantize(nf4.NF4Tensor(packed, scale, w.shape, w.dtype))
    assert out.isfinite().all()
    if not w.abs().max() >= 2.0**-126:
        assert (out == 0).all() and scale == 0
    expected = absmax_reference.quantize(w, 64)
    absmax = nf4.dequantize(nf4.NF4Tensor(*expected, w.shape, w.dtype))
    assert (out - w).double().norm() <= 1.0001 * (absmax - w).double().norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_or_shows(bad) -> None:
    w = torch.randn(8, 64)
    w[3, 5] = bad
    with pytest.raises(ValueError, match=r"w: expected finite values, got .* at index \(3, 5\)"):
        nf4.quantize(w, scale="mse")
    out = nf4.dequantize(nf4.quantize(w, double_quant=False, scale="mse", check=False))
    assert not out[3].isfinite().any() and out.isfinite().sum() == 7 * 64


def columns_of(shape: tuple[int, ...]) -> torch.Tensor:
    """Draw what columns count, over several orders of magnitude."""
    return torch.randn(shape[-1:]).mul(3).exp()


def weighted_error(w: torch.Tensor, q: nf4.NF4Tensor, weights: torch.Tensor) -> float:
    return ((nf4.dequantize(q) - w).double().square() * weights).sum().item()


@pytest.mark.parametrize("scale", ["mse", "mse-positive"])
@pytest.mark.parametrize(("shape", "block_size"), [((256, 512), 64), ((300, 72), 32)], ids=str)
def test_weights_lower_the_error_that_they_weigh(shape, block_size, scale) -> None:
    w, weights = torch.randn(shape), columns_of(shape)
    plain, weighted = (
        nf4.quantize(w, block_size, False, scale=scale, weights=h) for h in (None, weights)
    )
    assert weighted_error(w, weighted, weights) < 0.75 * weighted_error(w, plain, weights)


@pytest.mark.parametrize(
    "weights", [torch.full((96,), 3.5), torch.zeros(96)], ids=["alike", "none"]
)
def test_columns_that_count_alike_change_nothing(weights) -> None:
    w = torch.randn(40, 96)
    plain, weighted = (nf4.quantize(w, scale="mse", weights=h) for h in (None, weights))
    assert all(map(torch.equal, plain.tensors(), weighted.tensors()))


def test_the_best_scale_for_one_column_is_exact_in_it() -> None:
    """A column that alone counts is hit, where some scale above a quarter of absmax has a level."""
    w, weights = torch.randn(512, 64), torch.zeros(64)
    weights[17] = 1.0
    q = nf4.quantize(w, double_quant=False, scale="mse", weights=weights)
    largest = w.abs().amax(dim=1)
    reached = w[:, 17].abs() > 0.1 * largest
    error = (nf4.dequantize(q) - w)[:, 17].abs()
    assert reached.sum() > 300 and (error < 1e-3 * largest)[reached].all()


@pytest.mark.parametrize("power", [-40, 40])
def test_a_power_of_two_in_the_weights_changes_nothing(power) -> None:
    w, weights = torch.randn(40, 96), columns_of((96,))
    first, second = (quantize_mse(w, 64, True, h) for h in (weights, weights * 2.0**power))
    assert all(map(torch.equal, first, second))


def test_weights_that_do_not_fit_are_refused() -> None:
    w, fits = torch.randn(8, 64), torch.ones(64)
    with pytest.raises(ValueError, match="weights: expected scale='mse' .* got scale='absmax'"):
        nf4.quantize(w, weights=fits)
    with pytest.raises(ValueError, match=r"weights: expected shape \(64,\), .* got \(8,\)"):
        nf4.quantize(w, scale="mse", weights=torch.ones(8))
    with pytest.raises(ValueError, match=r"weights: expected shape \(\), .* got \(1,\)"):
        nf4.quantize(w[0, 0], scale="mse", weights=fits[:1])
    with pytest.raises(TypeError, match="weights: expected a floating tensor, got torch.int64"):
        nf4.quantize(w, scale="mse", weights=fits.long())
    with pytest.raises(TypeError, match="weights: expected a floating tensor, got list"):
        nf4.quantize(w, scale="mse", weights=fits.tolist())
    for bad in (-1.0, torch.nan, torch.inf):
        wrong = fits.clone()
        wrong[3] = bad
        with pytest.raises(ValueError, match="weights: expected finite values of at least 0"):
            nf4.quantize(w, scale="mse", weights=wrong)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_gives_the_bits_of_the_reference(shape, block_size, signed, weighted) -> None:
    cpu = pytest.importorskip("nf4.cpu.quantize_mse")
    weights = columns_of(shape) if weighted and shape else None
    for dtype in DTYPES:
        w = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
        for ours, expected in zip(
            cpu.quantize_mse(w, block_size, signed, weights),
            quantize_mse(w, block_size, signed, weights),
            strict=True,
        ):
            assert torch.equal(ours, expected)


def test_cpu_gives_the_bits_of_the_reference_beyond_a_slab() -> None:
    cpu = pytest.importorskip("nf4.cpu.quantize_mse")
    w, weights = torch.randn(1100, 1025), columns_of((1025,))
    assert w.numel() > cpu.SLAB
    found, expected = (f(w, 64, True, weights) for f in (cpu.quantize_mse, quantize_mse))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("w", SPECIAL.values(), ids=SPECIAL.keys())
def test_cpu_gives_the_bits_of_the_reference_for_special_blocks(w) -> None:
    cpu = pytest.importorskip("nf4.cpu.quantize_mse")
    for ours, expected in zip(
        cpu.quantize_mse(w, 64, True), quantize_mse(w, 64, True), strict=True
    ):
        assert torch.equal(ours, expected)


def test_bitsandbytes_reads_signed_scales(bnb) -> None:
    from bitsandbytes.functional import QuantState

    w = torch.randn(64, 256)
    q = nf4.quantize(w, double_quant=False, scale="mse")
    assert (q.absmax < 0).any()
    state = QuantState(
        absmax=q.absmax, shape=w.shape, code=nf4.codebook.nf4_levels(w.device), blocksize=64,
        quant_type="nf4", dtype=torch.float32,
    )  # fmt: skip
    theirs = bnb.dequantize_4bit(q.packed.view(-1, 1), state)
    assert torch.equal(theirs.view_as(w), nf4.dequantize(q))


def test_double_quantized_signed_scales_survive_bitsandbytes_files() -> None:
    q = nf4.quantize(torch.randn(64, 256), scale="mse")
    layer = nf4.LinearNF4.from_weight(q)
    other = nf4.LinearNF4(256, 64, bias=False)
    other.load_state_dict(nf4.to_bitsandbytes(layer.state_dict()))
    assert torch.equal(nf4.dequantize(other.weight), nf4.dequantize(q))


def test_scale_is_an_option_of_layers_models_and_measurements(tiny_llama) -> None:
    dense = tiny_llama()
    w = dense.model.layers[0].mlp.up_proj.weight
    expected = nf4.quantize(w, scale="mse")
    linear = nf4.LinearNF4.from_linear(dense.model.layers[0].mlp.up_proj, scale="mse")
    assert torch.equal(linear.packed, expected.packed)
    embedding = nf4.EmbeddingNF4.from_embedding(nn.Embedding.from_pretrained(w), scale="mse")
    assert torch.equal(embedding.packed, expected.packed)
    rows = nf4.model_error(dense, scale="mse"), nf4.model_error(dense)
    assert all(a.error.mse < b.error.mse for a, b in zip(*rows, strict=True))
    model = nf4.quantize_model(dense, scale="mse")
    assert torch.equal(model.model.layers[0].mlp.up_proj.packed, expected.packed)
    out = nf4.quantize(torch.zeros_like(w))
    assert nf4.quantize(w, scale="mse", out=out) is out
    assert all(torch.equal(a, b) for a, b in zip(out.tensors(), expected.tensors(), strict=True))


def test_unknown_scale_is_refused() -> None:
    message = "scale: expected one of absmax, mse, mse-positive, got 'l2'"
    with pytest.raises(ValueError, match=message):
        nf4.quantize(torch.randn(64), scale="l2")
    with pytest.raises(ValueError, match=message):
        nf4.quantize_model(nn.Linear(64, 64), scale="l2")


@pytest.mark.parametrize("weights", [None, torch.rand(33)], ids=["plain", "weighted"])
@pytest.mark.parametrize("signed", [False, True])
def test_operator_passes_opcheck(signed, weights) -> None:
    args = (torch.randn(7, 33), 64, signed, weights, True)
    torch.library.opcheck(torch.ops.nf4.quantize_mse.default, args)


def check_kernel(kernel, w, block_size=64, signed=True, weights=None) -> None:
    found = kernel.quantize_mse(w, block_size, signed, weights)
    for ours, expected in zip(found, quantize_mse(w, block_size, signed, weights), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.kernel
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 512])
@pytest.mark.parametrize("shape", [(7, 33), (5,), (0, 64), (30, 72)], ids=str)
def test_quantize_mse_kernel_matches_reference(shape, block_size, signed, device) -> None:
    from nf4.kernels import quantize_mse as kernel

    for dtype in DTYPES[::2]:
        check_kernel(kernel, torch.randn(shape).to(device, dtype), block_size, signed)


@pytest.mark.kernel
@pytest.mark.parametrize("block_size", [32, 512])
@pytest.mark.parametrize("shape", [(7, 33), (5,), (30, 72)], ids=str)
def test_quantize_mse_kernel_matches_reference_weighted(shape, block_size, device) -> None:
    from nf4.kernels import quantize_mse as kernel

    weights = columns_of(shape).to(device)
    check_kernel(kernel, torch.randn(shape).to(device), block_size, True, weights)
    check_kernel(kernel, torch.randn(shape).to(device), block_size, True, weights * 0)


@pytest.mark.kernel
@pytest.mark.parametrize("w", SPECIAL.values(), ids=SPECIAL.keys())
def test_quantize_mse_kernel_special_blocks(w, device) -> None:
    from nf4.kernels import quantize_mse as kernel

    check_kernel(kernel, w.to(device))


PTX_CASES = {
    "odd": ((7, 33), 32, True, False),
    "masked": ((9, 136), 64, True, False),
    "positive": ((40, 64), 64, False, False),
    "long_blocks": ((300,), 4096, True, False),
    "weighted": ((70, 33), 64, True, True),
}


@pytest.mark.parametrize(("case", "emulate"), on_gpus(PTX_CASES), indirect=["emulate"])
def test_quantize_mse_ptx_matches_reference(case, emulate) -> None:
    from nf4.kernels import quantize_mse as kernel

    shape, block_size, signed, weighted = PTX_CASES[case]
    weights = columns_of(shape) if weighted else None
    check_kernel(kernel, torch.randn(shape).bfloat16(), block_size, signed, weights)
    assert emulate.launches == ["_quantize_mse_kernel"]


MISTAKES = {
    "sign_lost": ("v * sign[:, None]", "v"),
    "threshold_not_rounded_down": (
        "tl.floor(size * THRESHOLDS[k])",
        "tl.ceil(size * THRESHOLDS[k])",
    ),
    "tie_goes_up": ("turned > threshold", "turned >= threshold"),
    "last_candidate_left_out": ("range(signs * CANDIDATES + ", "range(signs * CANDIDATES - 1 + "),
    "not_refined": ("CANDIDATES + REFINEMENTS):", "CANDIDATES):"),
    "score_of_the_first_sum_alone": ("a * a / b", "a"),
    "not_cut": ("x * inverse[:, None]), 1.0)", "x * inverse[:, None]), 9.0)"),
    "load_mask": ("offs < left, other=0.0).to", "offs <= left, other=0.0).to"),
    "columns_shifted": ("(first * BLOCK_SIZE) % columns", "first % columns"),
    "importance_of_none": ("ROUNDS).to(tl.int32), 1)", "ROUNDS).to(tl.int32), 0)"),
    "importance_not_relative": ("h * inverse[:, None])", "tl.minimum(h, 1.0))"),
    "store_mask": ("mask=2 * byte_offs < left", "mask=2 * byte_offs < left + 2"),
}


# The case that shows a mistake soonest, where it is not the first
SHOWN_BY = {
    "tie_goes_up": "integers",
    "not_cut": "outlier",
    "columns_shifted": "weighted",
    "importance_of_none": "weighted",
    "importance_not_relative": "weighted",
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("name", MISTAKES)
def test_quantize_mse_ptx_of_a_wrong_kernel_is_noticed(name, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("quantize_mse", "quantize_mse", *MISTAKES[name], tmp_path)
    outlier = (torch.rand(4096) - 0.5) / 3  # one of 4096 is given up: x / scale is above 4
    outlier[7] = 1.0
    cases = {
        case: (torch.randn(s).bfloat16(), b, signed, columns_of(s) if weighted else None)
        for case, (s, b, signed, weighted) in PTX_CASES.items()
    }
    cases["outlier"] = (outlier, 4096, True, None)
    cases["integers"] = (torch.arange(-32, 32) / 32.0, 64, True, None)
    order = sorted(cases, key=lambda case: case != SHOWN_BY.get(name))
    assert is_noticed(check_kernel, ((wrong, *cases[case]) for case in order))
