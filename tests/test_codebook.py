import hashlib
import struct

import pytest
import torch

from nf4 import codebook

CPU = torch.device("cpu")
LEVEL_BITS = [
    "bf800000",
    "bf3239b1",
    "bf066b30",
    "beca32a0",
    "be91a24d",
    "be3d353f",
    "bdba7871",
    "00000000",
    "3da2faff",
    "3e24cae3",
    "3e7c04dd",
    "3ead033a",
    "3ee1a4b8",
    "3f1007ab",
    "3f3913b3",
    "3f800000",
]


def test_levels_have_the_published_bits() -> None:
    bits = [struct.pack(">f", level).hex() for level in codebook.NF4_LEVELS]
    assert bits == LEVEL_BITS


def test_levels_follow_from_the_normal_distribution_bit_for_bit() -> None:
    assert torch.equal(codebook.derive_nf4_levels(), codebook.nf4_levels(CPU))


def test_thresholds_are_fp32_midpoints_in_order() -> None:
    levels, thresholds = codebook.nf4_levels(CPU), torch.tensor(codebook.nf4_thresholds())
    assert torch.equal(thresholds, (levels[:-1] + levels[1:]) / 2)
    assert (thresholds > levels[:-1]).all() and (thresholds < levels[1:]).all()


def test_byte_levels_hold_the_high_nibble_first() -> None:
    table = codebook.nf4_byte_levels(CPU)
    for byte in range(256):
        expected = [codebook.NF4_LEVELS[byte // 16], codebook.NF4_LEVELS[byte % 16]]
        assert table[byte].tolist() == expected


def test_absmax_map_has_the_published_bytes() -> None:
    table = codebook.absmax_map(CPU)
    digest = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert table[codebook.ABSMAX_ZERO_CODE] == 0
    assert table[0].item() == pytest.approx(-0.992968738079071, abs=0)


def test_tables_do_not_depend_on_torch_s_defaults() -> None:
    codebook.absmax_map.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            table = codebook.absmax_map(CPU)
            derived = codebook.derive_nf4_levels()
    finally:
        torch.set_default_dtype(torch.float32)
        codebook.absmax_map.cache_clear()
    assert table.dtype == derived.dtype == torch.float32
    assert torch.equal(table, codebook.absmax_map(CPU))


def test_absmax_map_equals_bitsandbytes(bnb) -> None:
    assert torch.equal(codebook.absmax_map(CPU), bnb.create_dynamic_map())


def test_absmax_thresholds_order_every_neighbouring_float() -> None:
    levels, thresholds = codebook.absmax_map(CPU), codebook.absmax_thresholds(CPU)
    for step in (-torch.inf, 0.0, torch.inf):
        x = torch.nextafter(thresholds, thresholds + step)
        below, above = x.double() - levels[:-1].double(), levels[1:].double() - x.double()
        assert torch.equal(x > thresholds, below > above)
