"""The fused product: values against float64, every tile, split sums, kernels with mistakes."""

import pytest
import torch
from helpers import ProductCase, on_gpus

import nf4.tools.cost
from nf4.reference import matmul as reference

DTYPES = (torch.bfloat16, torch.float16)
CASES = {
    "one_tile": ProductCase(64, 64, 128),
    "adapter_and_bias": ProductCase(70, 80, 192, r=16, bias=True),
    "rank_1_fp16": ProductCase(
        33, 48, 128, double_quant=False, dtype=torch.float16, r=1, bias=True
    ),
    "factor": ProductCase(33, 80, 128, r=16, bias=True, scaling=0.5, factor=True),
    "rank_100": ProductCase(20, 64, 128, r=100),
    "block_32": ProductCase(17, 144, 128, block_size=32, bias=True),
    "long_blocks": ProductCase(40, 16, 1024, block_size=1024, dtype=torch.float16, r=5),
    "many_rows": ProductCase(300, 32, 64, double_quant=False, r=3),
}


def check(kernel, product) -> torch.Tensor:
    """Hold a result to the reference, and to float64."""
    return product.check(kernel.matmul, reference.matmul)


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matmul_kernel_matches_reference(case, device) -> None:
    from nf4.kernels import matmul as kernel

    product = case.make().to(device)
    y = check(kernel, product)
    assert torch.equal(y, kernel.matmul(*product.arguments()))


@pytest.mark.kernel
def test_matmul_kernel_of_no_rows(device) -> None:
    from nf4.kernels import matmul as kernel

    assert kernel.matmul(*ProductCase(0, 32, 64).make().to(device).arguments()).shape == (0, 32)


def use(monkeypatch, kernel, **choices) -> None:
    """Let the kernel cut every product in one way."""
    from nf4.kernels._configs import MatmulConfig

    config = MatmulConfig(**{"num_warps": 4, "num_stages": 3, "cycles": 0, **choices})
    monkeypatch.setattr(kernel, "matmul_config", lambda *sizes: config)


@pytest.mark.parametrize(("case", "emulate"), on_gpus(CASES), indirect=["emulate"])
def test_matmul_ptx_matches_reference(case, emulate, monkeypatch) -> None:
    from nf4.kernels import matmul as kernel

    use(monkeypatch, kernel, block_m=64, block_n=64)
    check(kernel, CASES[case].make())
    assert emulate.launches == ["_matmul_kernel"]


TILES = [(16, 64, 4, 4), (32, 64, 4, 2), (128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 4, 3)]


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_matmul_ptx_of_every_tile(tile, emulate, monkeypatch) -> None:
    from nf4.kernels import matmul as kernel

    names = ("block_m", "block_n", "num_warps", "num_stages")
    use(monkeypatch, kernel, **dict(zip(names, tile, strict=True)))
    check(kernel, ProductCase(130, 144, 192, r=16, bias=True).make())


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
def test_matmul_ptx_of_the_widest_tile(emulate, monkeypatch) -> None:
    from nf4.kernels import matmul as kernel

    use(monkeypatch, kernel, block_m=256, block_n=128, num_warps=8)
    check(kernel, ProductCase(260, 128, 256, r=16).make())


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_matmul_ptx_splits_k_in_any_number_of_parts(split_k, emulate, monkeypatch) -> None:
    from nf4.kernels import matmul as kernel
    from nf4.tools import scratch

    scratch.release_scratch()
    use(monkeypatch, kernel, block_m=32, block_n=64, split_k=split_k)
    product = ProductCase(20, 80, 512, r=16, bias=True).make()
    y = check(kernel, product)
    for rerun in range(2):  # what one launch leaves in scratch serves the next
        assert torch.equal(y, kernel.matmul(*product.arguments())), rerun
    arrived = scratch.zeros("split_k arrived", 1, torch.int32, torch.device("cpu"))
    assert not arrived.any()


MISTAKES = {
    "rows_not_masked": ("_product", "mask_m[None, :] & mask_n[:", "mask_n[:"),
    "wrong_column_of_scales": ("matmul", "step * 64 // BLOCK_SIZE", "step * 0"),
    "words_of_the_next_tile": ("matmul", "word_ptrs + step * 128", "word_ptrs + step * 128 + 4"),
    "x_of_the_next_step": ("matmul", "x_ptrs + step * 64", "x_ptrs + step * 32"),
    "last_step_left_out": (
        "matmul",
        "steps * (pid_k + 1) // SPLIT_K",
        "steps * (pid_k + 1) // SPLIT_K - 1",
    ),
    "adapter_not_scaled": ("_product", "acc *= scaling\n", "acc *= 1.0\n"),
    "factor_of_the_first_row": ("_product", "factor_ptr + offs_n", "factor_ptr + offs_n * 0"),
    "factor_before_bias": ("_product", "if HAS_BIAS:", "if HAS_BIAS and not HAS_FACTOR:"),
    "rank_not_masked": ("_product", "mask_r = offs_r < rank", "mask_r = offs_r < RANK"),
    "pairs_in_the_wrong_place": (
        "_fragments",
        "(0, 3, 1, 4, 7, 6, 2, 5)",
        "(0, 3, 1, 4, 6, 7, 2, 5)",
    ),
    "scales_of_the_wrong_rows": ("_fragments", "(0, 2, 1, 3)", "(0, 2, 1, 3)).flip(1"),
    "nibble": ("_fragments", "{4 * nibble};", "{4 * nibble + 1};"),
    "absmax2": ("_fragments", "+ column) >> 8", "+ column) >> 9"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_matmul_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path, monkeypatch) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("matmul", *mistake, tmp_path)
    use(monkeypatch, wrong, block_m=64, block_n=64)
    cases = [
        CASES["adapter_and_bias"],
        CASES["rank_100"],
        CASES["factor"],
        ProductCase(40, 16, 40960 // 2, block_size=32),
    ]
    assert is_noticed(check, ((wrong, case.make()) for case in cases))


WAITS = {
    "copy": (r"cp\.async\.wait_group\s+(\d+)", "cp.async.wait_group 9"),
    "product": (r"wgmma\.wait_group\.sync\.aligned 0;", ""),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_matmul_ptx_without_a_wait_is_noticed(wait, emulate, monkeypatch) -> None:
    import re

    from mutants import is_noticed

    from nf4.kernels import matmul as kernel

    changed = []

    def edit(ptx: str) -> str:
        found = re.sub(*wait, ptx)
        changed.append(found != ptx)
        return found

    use(monkeypatch, kernel, block_m=64, block_n=64)
    emulate.edit = edit
    assert is_noticed(check, [(kernel, ProductCase(64, 64, 512).make())])
    assert changed == [True]


def test_amd_takes_whole_sums(monkeypatch) -> None:
    from nf4.kernels import _configs

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_configs, "device_of", lambda device: nf4.tools.cost.DEVICES[-1])
    assert {c.split_k for c in _configs.ranked("matmul", 16, 4096, 4096, gpu)} == {1}
    config = _configs.lora_down_config.__wrapped__(16, 4096, 64, gpu)
    assert (config.split_k, config.num_stages) == (1, 2)
