"""Ways to round a weight to four bits, for comparing them: codebook, block size and scales.

Only NF4 is a format here; other codebooks are rounded to in plain PyTorch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, BLOCK_SIZES, SMALLEST_ABSMAX
from nf4.error.codebooks import CODEBOOKS, levels_of
from nf4.error.theory import ExpectedError, expected_error
from nf4.functional import dequantize, quantize
from nf4.ops.checks import check_weight
from nf4.reference._blocks import as_blocks
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.reference.quantize_absmax import quantize_absmax

_CHUNK = 1 << 22  # elements at a time
_SCALES = {"absmax": "", "mse": ", least squares", "mse-positive": ", least squares, positive"}


@dataclass(frozen=True)
class Scheme:
    """One way to round a weight.

    Attributes:
        codebook: a name of `nf4.error.codebooks.CODEBOOKS`.
        block_size: elements that share one scale.
        double_quant: whether scales are quantized to 8 bits.
        scale: how scales are found, see `nf4.quantize`; other than "absmax" only for nf4.
    """

    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = False
    scale: str = "absmax"

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a large weight, scales included."""
        scale = 8 + 32 / ABSMAX_BLOCK_SIZE if self.double_quant else 32
        return 4 + scale / self.block_size

    @property
    def kind(self) -> str:
        """What a reader calls it, whatever the block size."""
        double = ", double quantization" if self.double_quant else ""
        return f"{self.codebook.upper()}{_SCALES[self.scale]}{double}"

    @property
    def label(self) -> str:
        """What a reader calls it."""
        name, comma, rest = self.kind.partition(",")
        return f"{name}, block {self.block_size}{comma}{rest}"

    def round(self, w: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what w becomes by quantizing and dequantizing it.

        Args:
            w: float32, float16 or bfloat16, any shape.
            weights: what columns count in the search for scales, see `nf4.quantize`.

        Returns:
            float32 ``w.shape``.
        """
        if self.codebook == "nf4":
            options = (self.block_size, self.double_quant)
            q = quantize(w, *options, scale=self.scale, weights=weights)
            return dequantize(q, torch.float32)
        if self.scale != "absmax":
            raise ValueError(f"scale: expected absmax for {self.codebook}, got {self.scale!r}")
        return round_to_codebook(w, self.codebook, self.block_size, self.double_quant)

    def expected(self) -> ExpectedError | None:
        """Return the error expected of N(0, 1), where there is theory for it: absmax scales."""
        if self.scale != "absmax":
            return None
        return expected_error(self.block_size, self.double_quant, self.codebook)


def round_to_codebook(
    w: Tensor, codebook: str, block_size: int = 64, double_quant: bool = False
) -> Tensor:
    """Return a weight rounded to a codebook, block by block.

    Args:
        w: float32, float16 or bfloat16, any shape.
        codebook: a name of `nf4.error.codebooks.CODEBOOKS`.
        block_size: elements that share one scale: the largest magnitude, or for the signed
            codebooks the value of largest magnitude.
        double_quant: quantize the scales to 8 bits too.

    Returns:
        float32 ``w.shape``; for "nf4" the bits of `nf4.dequantize` after `nf4.quantize`.

    Raises:
        TypeError: w is no tensor of a supported dtype, or block_size no integer.
        ValueError: there is no such codebook, or block_size is not supported.
    """
    check_weight(w, "w")
    levels, signed = levels_of(codebook, block_size)
    book = torch.tensor(levels, dtype=torch.float64, device=w.device)
    edges = ((book[1:] + book[:-1]) / 2).float()
    book = book.float()
    blocks = as_blocks(w.detach().float(), block_size)
    scale = blocks.abs().amax(dim=1)
    if signed and len(blocks):
        largest = blocks.abs().argmax(dim=1, keepdim=True)
        scale = blocks.gather(1, largest).squeeze(1)
    scale = torch.where(scale.abs() < SMALLEST_ABSMAX, 0.0, scale)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    if double_quant:
        scale = dequantize_absmax(*quantize_absmax(scale))
    out = torch.empty_like(blocks)
    step = max(_CHUNK // block_size, 1)
    for i in range(0, len(blocks), step):
        scaled = blocks[i : i + step] * inverse[i : i + step, None]
        codes = torch.bucketize(scaled, edges, out_int32=True)
        out[i : i + step] = book[codes] * scale[i : i + step, None]
    return out.view(-1)[: w.numel()].view(w.shape)


def compared(codebooks: Iterable[str] = CODEBOOKS) -> list[Scheme]:
    """Return the schemes to compare: codebooks and NF4's kinds of scale at every block size."""
    found = [Scheme(codebook, b) for codebook in codebooks for b in BLOCK_SIZES]
    for scale, double_quant in (("absmax", True), ("mse", False), ("mse", True)):
        found += [Scheme("nf4", b, double_quant, scale) for b in BLOCK_SIZES]
    return found


@dataclass(frozen=True)
class CodebookError:
    """Mean squared error of a scheme on N(0, 1).

    Attributes:
        scheme: which.
        expected: by theory; None where there is none.
        measured: on random values.
        standard_error: of measured.
    """

    scheme: Scheme
    expected: float | None
    measured: float
    standard_error: float


def codebook_errors(
    numel: int = 1 << 22,
    seed: int = 0,
    schemes: Iterable[Scheme] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[CodebookError]:
    """Return the error of each scheme on values from N(0, 1), by theory and measured.

    Args:
        numel: how many values, in whole blocks of 4096.
        seed: of the values.
        schemes: `compared()` by default.
        progress: called with (schemes done, schemes in all).

    Raises:
        ValueError: numel holds no two blocks of 4096.
    """
    if numel < 2 * BLOCK_SIZES[-1]:
        raise ValueError(f"numel: expected at least {2 * BLOCK_SIZES[-1]}, got {numel}")
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(numel // BLOCK_SIZES[-1], BLOCK_SIZES[-1], generator=generator)
    rows = []
    schemes = compared() if schemes is None else list(schemes)
    for done, scheme in enumerate(schemes, start=1):
        blocks = (scheme.round(w) - w).double().square().mean(dim=1)
        expected = scheme.expected()
        deviation = (blocks.std() / len(blocks) ** 0.5).item()
        mse = None if expected is None else expected.mse
        rows.append(CodebookError(scheme, mse, blocks.mean().item(), deviation))
        if progress is not None:
            progress(done, len(schemes))
    return rows
