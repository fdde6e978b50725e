import pytest
import torch

from nf4.codebook import absmax_map
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.quantize_absmax import quantize_absmax

MAP = absmax_map(torch.device("cpu"))


@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 5000])
def test_dequantize_absmax_decodes_every_code(blocks) -> None:
    codes = torch.arange(blocks).remainder(256).to(torch.uint8)
    absmax2, offset = torch.rand(-(-blocks // 256)) + 0.1, torch.tensor(0.7)
    out = dequantize_absmax(codes, absmax2, offset)
    assert out.shape == (blocks,)
    for i in range(blocks):
        assert out[i] == MAP[codes[i].item()] * absmax2[i // 256] + offset


def test_dequantize_absmax_rounds_twice() -> None:
    """One fused multiply-add would round once, and differ in about a fifth of the scales."""
    absmax = torch.rand(4096) + 0.5
    codes, absmax2, offset = quantize_absmax(absmax)
    ours = dequantize_absmax(codes, absmax2, offset)
    d = MAP[codes.int()].double() * absmax2.repeat_interleave(256).double()
    assert torch.equal(ours, d.float() + offset)
    assert not torch.equal(ours, (d + offset.double()).float())
    assert (ours - absmax).abs().max() < 0.02


def test_dequantize_absmax_matches_bitsandbytes(bnb, bnb_parts) -> None:
    """Through a weight of ones' codes, whose dequantized values are the scales themselves."""
    w = torch.randn(64, 4096)
    theirs = bnb_parts(w, double_quant=True)
    scales = dequantize_absmax(theirs.q.absmax, theirs.q.absmax2, theirs.q.offset)
    ones = theirs.q.packed.flatten() >> 4 == 15
    positions = ones.nonzero().flatten() * 2
    assert len(positions) > 1000
    assert torch.equal(theirs.dequantized.flatten()[positions], scales[positions // 64])
