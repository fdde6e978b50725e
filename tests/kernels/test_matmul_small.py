"""The product of few rows: values against float64, both decodes, split sums, mistakes."""

import pytest
import torch
from helpers import ProductCase, on_gpus

from nf4.kernels._configs import MATMUL_SMALL, MatmulConfig
from nf4.reference import matmul_small as reference

CASES = {
    "one_row": ProductCase(1, 144, 192, double_quant=False),
    "adapter_and_bias": ProductCase(7, 128, 512, r=16, bias=True),
    "sixteen_rows_fp16": ProductCase(16, 80, 1024, dtype=torch.float16, r=3, bias=True),
    "long_blocks": ProductCase(2, 64, 1024, block_size=1024, bias=True),
    "factor": ProductCase(7, 80, 512, dtype=torch.float16, bias=True, scaling=1.0, factor=True),
    "rank_100": ProductCase(3, 32, 128, block_size=128, dtype=torch.float16, r=100),
    "many_rows": ProductCase(100, 80, 768, r=16, bias=True),
}


def check(kernel, product) -> torch.Tensor:
    """Hold a result to the reference, and to float64."""
    return product.check(kernel.matmul_small, reference.matmul_small)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matmul_small_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import matmul_small as kernel

    product = case.make().to(device)
    y = check(kernel, product)
    assert torch.equal(y, kernel.matmul_small(*product.arguments()))


def use(monkeypatch, kernel, config: MatmulConfig) -> None:
    monkeypatch.setattr(kernel, "matmul_small_config", lambda *sizes: config)


def tile(m: int) -> MatmulConfig:
    return next(config for config in MATMUL_SMALL if m <= config.block_m)


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_matmul_small_ptx_matches_reference(case, emulate, monkeypatch) -> None:
    from nf4.kernels import matmul_small as kernel

    use(monkeypatch, kernel, tile(CASES[case].m))
    check(kernel, CASES[case].make())
    assert emulate.launches == ["_matmul_small_kernel"]


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("config", MATMUL_SMALL, ids=lambda c: f"{c.block_m}")
@pytest.mark.parametrize("split_k", [2, 3])
def test_matmul_small_ptx_of_every_tile_in_parts(config, split_k, emulate, monkeypatch) -> None:
    from nf4.kernels import matmul_small as kernel

    cut = MatmulConfig(**{**vars(config), "split_k": split_k})
    use(monkeypatch, kernel, cut)
    product = ProductCase(5, 144, 768, r=16, bias=True).make()
    assert torch.equal(check(kernel, product), kernel.matmul_small(*product.arguments()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matmul_small_ptx_decodes_every_byte(dtype, emulate, monkeypatch) -> None:
    """Columns of the identity are the levels of the codes: each byte value, in every place."""
    import nf4
    from nf4.codebook import NF4_LEVELS
    from nf4.kernels import matmul_small as kernel

    use(monkeypatch, kernel, MATMUL_SMALL[0])
    packed = torch.arange(64 * 32).remainder(256).to(torch.uint8).view(64, 32)
    q = nf4.NF4Tensor(packed, torch.ones(64), torch.Size([64, 64]), dtype)
    f = nf4.to_fragments(q)
    levels = torch.tensor(NF4_LEVELS)[torch.stack([packed >> 4, packed & 15], -1).int()]
    for first in range(0, 64, 16):
        x = torch.eye(64, dtype=dtype)[first : first + 16]
        y = kernel.matmul_small(x, f.as_weight())
        assert torch.equal(y.T, levels.view(64, 64).to(dtype)[:, first : first + 16])


MISTAKES = {
    "nibble_by_shuffle": ("_levels16", "8 * pair + 4 * e", "8 * pair + 4 * (1 - e)"),
    "nibble_by_prmt": ("_levels16", "0x5140", "0x1504"),
    "upper_levels": ("_levels16", "0x44444444, 0x32103210", "0x44444444, 0x76543210"),
    "scale_of_another_block": ("matmul_small", "tile * 64 // BLOCK_SIZE, K", "tile * 0, K"),
    "scale_of_another_group": ("matmul_small", "step + 1 + AHEAD, last", "step, last"),
    "scale_of_a_group_s_first": ("_fragments", "codes >> (8 * i)", "codes >> (8 * 0)"),
    "x_of_another_tile": ("matmul_small", "x_ptrs + step * 256 + u * 64", "x_ptrs + u * 64"),
    "rows_beyond_m": ("matmul_small", "(tl.arange(0, BLOCK_M) < M)", "(tl.arange(0, 16) < M - 1)"),
    "not_summed": ("matmul_small", "acc.shape), acc)", "acc.shape), 0)"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_matmul_small_ptx_of_a_wrong_kernel_is_noticed(
    mistake, emulate, tmp_path, monkeypatch
) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("matmul_small", *mistake, tmp_path)
    use(monkeypatch, wrong, MatmulConfig(**{**vars(MATMUL_SMALL[0]), "split_k": 2}))
    cases = [
        ProductCase(7, 128, 1536, r=16, bias=True),
        ProductCase(7, 64, 384),
    ]
    assert is_noticed(check, ((wrong, case.make()) for case in cases))
