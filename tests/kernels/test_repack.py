"""Rows and fragments: the same bytes in another order, both ways."""

import pytest
import torch

import nf4
from nf4.reference.repack import repack

SHAPES = [
    (32, 576, 64),
    (16, 64, 64),
    (48, 192, 64),
    (32, 64, 32),
    (16, 4096, 4096),
    (96, 640, 128),
]


def parts(n: int, k: int, block_size: int, double_quant: bool = True) -> nf4.NF4Tensor:
    return nf4.quantize(torch.randn(n, k), block_size, double_quant)


def codes(q: nf4.NF4Tensor) -> torch.Tensor:
    return torch.stack([q.packed >> 4, q.packed & 15], dim=-1).view(q.shape)


def test_repack_puts_every_code_where_the_formula_says() -> None:
    q = parts(32, 128, 64, double_quant=False)
    f = nf4.to_fragments(q)
    words = f.packed.view(-1).view(torch.int32).view(2, 2, 32, 4)
    for index in torch.cartesian_prod(*(torch.arange(s) for s in (2, 2, 8, 4, 2, 2, 2, 2, 2))):
        row_tile, column_tile, g, t, r, h, j, c, e = index.tolist()
        word = words[row_tile, column_tile, 4 * g + t, 2 * r + h].item()
        n = 16 * row_tile + 8 * r + g
        k = 64 * column_tile + 32 * h + 16 * j + 8 * c + 2 * t + e
        assert word >> 4 * (4 * j + 2 * c + e) & 15 == codes(q)[n, k]
    assert torch.equal(f.absmax.view(2, 32), q.absmax.view(32, 2).T)


def test_repack_puts_four_scales_of_a_row_beside_each_other() -> None:
    q = parts(32, 576, 64)  # nine columns of blocks: two groups, and one left over
    f = nf4.to_fragments(q)
    rows = q.absmax.view(32, 9)
    for group in (0, 1):
        own = f.absmax[128 * group : 128 * group + 128].view(32, 4)
        assert torch.equal(own, rows[:, 4 * group : 4 * group + 4])
    assert torch.equal(f.absmax[256:], rows[:, 8])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_repack_is_lossless_and_dequantizes_alike(n, k, block_size, double_quant) -> None:
    q = parts(n, k, block_size, double_quant)
    f = nf4.to_fragments(q)
    assert (f.layout, f.shape, f.nbytes) == ("fragments", q.shape, q.nbytes)
    assert not torch.equal(f.packed, q.packed)
    for part, back in zip(q.tensors(), nf4.to_rows(f).tensors(), strict=True):
        assert torch.equal(part, back)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nf4.dequantize(f, dtype), nf4.dequantize(q, dtype))
    assert nf4.to_fragments(f) is f and nf4.to_rows(q) is q


@pytest.mark.parametrize(("shape", "block_size"), [((8, 64), 64), ((16, 96), 32), ((16, 64), 128)])
def test_repack_refuses_what_has_no_whole_tiles(shape, block_size) -> None:
    q = nf4.quantize(torch.randn(shape), block_size)
    with pytest.raises(ValueError, match=r"q: expected a matrix \[N, K\] for fragments"):
        nf4.to_fragments(q)


def test_repack_passes_opcheck() -> None:
    torch.use_deterministic_algorithms(False)
    q = parts(16, 64, 64)
    torch.library.opcheck(torch.ops.nf4.repack.default, (q.packed, q.absmax, 16, 64, "fragments"))


def check_kernel(kernel, q: nf4.NF4Tensor) -> None:
    rows = q.as_weight()
    fragments = repack(rows, "fragments")
    for given, expected in ((rows, fragments), (fragments, repack(fragments, "rows"))):
        found = kernel.repack(given, expected.layout)
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.absmax, expected.absmax)
        assert found[2:] == expected[2:]


@pytest.mark.kernel
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "k", "block_size"), SHAPES)
def test_repack_kernel_matches_reference(n, k, block_size, double_quant, device) -> None:
    from nf4.kernels import repack as kernel

    check_kernel(kernel, parts(n, k, block_size, double_quant).to(device))


def test_repack_ptx_matches_reference(emulate) -> None:
    from nf4.kernels import repack as kernel

    check_kernel(kernel, parts(32, 320, 64))


MISTAKES = {
    "nibbles": ("in_fragments, (byte << 4) |", "in_fragments, byte | 0 &"),
    "row_of_the_lane": ("8 * r + g", "2 * g + r"),
    "column": ("16 * h + 4 * b + t", "16 * h + 4 * t + b"),
    "mask": ("< row_bytes", "< row_bytes - 32"),
}


@pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_repack_ptx_of_a_wrong_kernel_is_noticed(mistake, emulate, tmp_path) -> None:
    from mutants import is_noticed, mutant

    wrong = mutant("repack", "repack", *mistake, tmp_path)
    assert is_noticed(check_kernel, [(wrong, parts(32, 320, 64))])
