"""A quantized tensor as plain tensors and their meaning: NF4Tensor, and beneath it Weight."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, BLOCK_SIZES
from nf4.tools.caches import forgettable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PARTS = ("packed", "absmax", "absmax2", "offset")
PLAIN = {Tensor, torch.nn.Parameter}  # others may lie nowhere


def mark() -> Tensor:
    """Return what stands in files in the place of a dense weight that is in four bits there.

    A tensor without elements, which fits no dense layer: who reads the files without nf4 is refused
    by its size, where parts by names that mean nothing would leave the layer with random values.
    """
    return torch.empty(0, dtype=torch.uint8, device="cpu")


def is_mark(tensor: Any) -> bool:
    """Return whether a tensor of a file is a `mark`, and no weight."""
    return isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 and tensor.shape == (0,)


def is_finite(tensor: Tensor) -> bool:
    """Return whether scales are finite numbers, as far as a tensor has values to look at."""
    if type(tensor) not in PLAIN or tensor.is_meta or not tensor.is_floating_point():
        return True
    return bool(tensor.isfinite().all())


def packed_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the packed bytes: rows stay rows where the last size is even."""
    if len(shape) and shape[-1] % 2 == 0:
        return torch.Size((*shape[:-1], shape[-1] // 2))
    return torch.Size(((shape.numel() + 1) // 2,))


class Weight(NamedTuple):
    """A quantized tensor as references, kernels and a CPU's functions take it, unchecked.

    Attributes:
        packed: uint8, ``ceil(n / 2)`` bytes for n elements; a matrix ``[N, K / 2]`` in fragments.
        absmax: float32 ``[ceil(n / block_size)]``, or its uint8 codes if double-quantized.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``; None without double quantization.
        shape: sizes of the tensor, n elements in all; of a matrix N and K.
        block_size: elements that share one absmax.
        layout: order of packed and absmax, "rows" or "fragments", see nf4/reference/repack.py.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    shape: Sequence[int]
    block_size: int
    layout: str = "rows"

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.absmax2 is not None

    @property
    def device(self) -> torch.device:
        """Device of the packed bytes."""
        return self.packed.device

    def contiguous(self) -> "Weight":
        """Return the weight as kernels read it, itself if its parts are contiguous."""
        packed, absmax, absmax2 = self[:3]
        codes = packed.is_contiguous() and absmax.is_contiguous()
        if codes and (absmax2 is None or absmax2.is_contiguous()):
            return self
        absmax2 = None if absmax2 is None else absmax2.contiguous()
        return Weight(packed.contiguous(), absmax.contiguous(), absmax2, *self[3:])


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A tensor quantized to 4-bit NormalFloat. Made by `nf4.quantize`.

    Attributes:
        packed: uint8 ``[*shape[:-1], shape[-1] / 2]``, two codes a byte, the even element in the
            high nibble; flat ``[ceil(n / 2)]`` where the last size is odd. Viewed flat it is byte
            for byte bitsandbytes' ``weight``.
        absmax: float32 ``[blocks]``, the largest magnitude of each block; with double quantization
            its uint8 codes.
        shape: sizes of the tensor that was quantized.
        dtype: dtype of the tensor that was quantized, and of `nf4.dequantize`'s result.
        block_size: elements that share one absmax.
        absmax2: float32 ``[ceil(blocks / 256)]``; None without double quantization.
        offset: float32 ``[]``, the mean of absmax; None without double quantization.
        layout: "rows", or "fragments" for bytes and absmax in the order tensor cores read, which
            `nf4.to_fragments` makes: an order for memory, never for files.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    absmax2: Tensor | None = None
    offset: Tensor | None = None
    layout: str = "rows"

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.absmax2 is not None

    @property
    def absmax_block_size(self) -> int:
        """Scales that share one entry of absmax2."""
        return ABSMAX_BLOCK_SIZE

    @property
    def device(self) -> torch.device:
        """Device of the packed bytes."""
        return self.packed.device

    @property
    def ndim(self) -> int:
        """Number of dimensions of the tensor that was quantized."""
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        """False: a 4-bit weight is frozen."""
        return False

    @overload
    def size(self) -> torch.Size: ...

    @overload
    def size(self, dim: int) -> int: ...

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the sizes of the tensor that was quantized, or that of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions of the tensor that was quantized."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements of the tensor that was quantized."""
        return math.prod(self.shape)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return packed, absmax, absmax2 and offset, the last two None if not double-quantized."""
        return self.packed, self.absmax, self.absmax2, self.offset

    def as_weight(self) -> Weight:
        """Return what references and kernels take."""
        return Weight(*self.parts(), self.shape, self.block_size, self.layout)

    def with_parts(self, parts: Iterable[Tensor | None], **changes: Any) -> "NF4Tensor":
        """Return a tensor of the same form with other `parts`, and other fields if given."""
        named: dict[str, Any] = dict(zip(PARTS, parts, strict=True))
        return replace(self, **named, **changes)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what is held: packed, absmax and, with double quantization, absmax2, offset."""
        return tuple(t for t in self.parts() if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and all scales."""
        return sum(t.nbytes for t in self.tensors())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included: 4.127 at block size 64 with double quantization."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def to(self, device: torch.device | str | int) -> "NF4Tensor":
        """Return the same tensor on another device; bytes and scales have no other dtype."""
        device = torch.device(device)
        return self.with_parts(None if t is None else t.to(device) for t in self.parts())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse torch's functions, which would read the bytes as numbers."""
        given = [*args, *(kwargs or {}).values()]
        weight = next((a for a in given if isinstance(a, NF4Tensor)), None)
        raise TypeError(
            f"{getattr(func, '__name__', func)}: expected a torch.Tensor, got "
            f"{'an NF4Tensor' if weight is None else weight._said()}"
        )

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what only a dense tensor has, in words that say what to do instead."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"NF4Tensor has no attribute {name!r}")
        raise AttributeError(f"{name}: expected a dense weight, got {self._said()}")

    def __getitem__(self, index: Any) -> NoReturn:
        """Refuse indexing, which only a dense tensor knows."""
        raise TypeError(f"[{index!r}]: expected a dense weight, got {self._said()}")

    def _refuse_operator(self, *others: Any) -> NoReturn:
        """Refuse arithmetic, which only a dense tensor knows."""
        raise TypeError(f"expected a dense weight in arithmetic, got {self._said()}")

    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse_operator
    __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __neg__ = _refuse_operator

    def _said(self) -> str:
        """Return what this is, of which layer, and what to do about it."""
        layer = getattr(self.absmax, "nf4_layer", None)
        remedy = "multiply by it with nf4.linear, or make it dense with nf4.dequantize"
        if layer is None:
            return f"an NF4Tensor; {remedy}"
        return (
            f"the 4-bit weight of {layer}; leave the layer dense by skip_modules=['+{layer}'], "
            f"resize embeddings before they are quantized, or {remedy}"
        )

    def __repr__(self) -> str:
        """Describe the tensor without printing its bytes."""
        return (
            f"NF4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, "
            f"layout='{self.layout}', device='{self.device}', "
            f"{self.bits_per_weight:.3f} bits per weight)"
        )


def fits_fragments(shape: torch.Size, block_size: int) -> bool:
    """Return whether a tensor can be held in fragments: a matrix of whole tiles and blocks."""
    if len(shape) != 2 or not shape[0] or not shape[1]:
        return False
    return shape[0] % 16 == 0 and shape[1] % 64 == 0 and shape[1] % block_size == 0


def check_fragments(shape: torch.Size, block_size: int, name: str) -> None:
    """Raise ValueError unless a tensor can be held in fragments."""
    if not fits_fragments(shape, block_size):
        raise ValueError(
            f"{name}: expected a matrix [N, K] for fragments, N a multiple of 16, K of 64 and of "
            f"the block size {block_size}, got shape {tuple(shape)}"
        )


def check_nf4(q: NF4Tensor, name: str = "q") -> None:
    """Raise unless the parts of q fit together.

    Raises:
        TypeError: q is no NF4Tensor, or a part has another dtype than the format's.
        ValueError: a part has another shape or device than q.shape and q.block_size ask for, or
            wants a gradient where gradients are kept.
    """
    if not isinstance(q, NF4Tensor):
        raise TypeError(f"{name}: expected an NF4Tensor, got {type(q).__name__}")
    if torch.compiler.is_compiling() or not _is_good(q):
        _check_parts(q, name)


def part_forms(
    shape: torch.Size, block_size: int, double_quant: bool
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return dtype and shape of each part that a quantized tensor has, by its name.

    Args:
        shape: of the tensor.
        block_size: elements that share one absmax.
        double_quant: whether the scales are quantized too.
    """
    blocks = -(-shape.numel() // block_size)
    absmax, packed = torch.Size((blocks,)), (torch.uint8, packed_shape(shape))
    if not double_quant:
        return {"packed": packed, "absmax": (torch.float32, absmax)}
    return {
        "packed": packed,
        "absmax": (torch.uint8, absmax),
        "absmax2": (torch.float32, torch.Size((-(-blocks // ABSMAX_BLOCK_SIZE),))),
        "offset": (torch.float32, torch.Size(())),
    }


@forgettable
@lru_cache(maxsize=4096)
def _shapes(shape: torch.Size, block_size: int, layout: str) -> tuple[Any, ...]:
    """Return the shapes of packed, absmax and absmax2; nothing for what there cannot be."""
    if block_size not in BLOCK_SIZES or layout not in ("rows", "fragments"):
        return (None, None, None)
    if layout == "fragments" and not fits_fragments(shape, block_size):
        return (None, None, None)
    blocks = -(-shape.numel() // block_size)
    return packed_shape(shape), (blocks,), (-(-blocks // ABSMAX_BLOCK_SIZE),)


def _is_good(q: NF4Tensor) -> bool:
    """Return whether all is well, without saying what is not: every call asks."""
    packed, absmax, absmax2, offset = q.packed, q.absmax, q.absmax2, q.offset
    if type(q.shape) is not torch.Size:
        return False
    try:
        shapes = _shapes(q.shape, q.block_size, q.layout)
    except TypeError:  # sizes that are symbols, or no numbers at all
        return False
    device, grad = packed.device, torch.is_grad_enabled()
    if packed.shape != shapes[0] or absmax.shape != shapes[1] or packed.dtype != torch.uint8:
        return False
    if absmax2 is None or offset is None:
        good = absmax.dtype == torch.float32 and absmax2 is offset and absmax.device == device
        return good and not (grad and absmax.requires_grad)
    if absmax.dtype != torch.uint8 or absmax2.shape != shapes[2] or offset.ndim:
        return False
    if absmax2.dtype != torch.float32 or offset.dtype != torch.float32:
        return False
    if grad and (absmax2.requires_grad or offset.requires_grad):
        return False
    return absmax.device == device and absmax2.device == device and offset.device == device


def _check_parts(q: NF4Tensor, name: str) -> None:
    """Raise as `check_nf4` does."""
    if q.block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}.block_size: expected one of {BLOCK_SIZES}, got {q.block_size}")
    if q.layout != "rows":
        check_fragments(q.shape, q.block_size, f"{name}.layout")
        if q.layout != "fragments":
            raise ValueError(f"{name}.layout: expected 'rows' or 'fragments', got {q.layout!r}")
    if (q.absmax2 is None) != (q.offset is None):
        raise ValueError(f"{name}: absmax2 and offset belong together, got only one of them")
    forms = part_forms(torch.Size(q.shape), q.block_size, q.double_quant)
    for tensor, (part, (dtype, shape)) in zip(q.tensors(), forms.items(), strict=True):
        if tensor.dtype != dtype:
            is_cast = tensor.dtype in (torch.float16, torch.bfloat16)
            hint = "; fully_shard casts it: use double_quant=True, or autocast for its param_dtype"
            raise TypeError(f"{name}.{part}: expected {dtype}, got {tensor.dtype}{hint * is_cast}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name}.{part}: expected shape {tuple(shape)} for {tuple(q.shape)} at block size "
                f"{q.block_size}, got {tuple(tensor.shape)}"
            )
        if tensor.device != q.packed.device:
            raise ValueError(
                f"{name}.{part}: expected device {q.packed.device} like packed, got {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}.{part}: expected a tensor that needs no gradient, for none flows to a "
                "4-bit weight, got one that does; train adapters, or call requires_grad_(False)"
            )
