"""Checks of the arguments of `nf4.functional`: each names what was expected and what came."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nf4.codebook import LARGEST_ABSMAX
from nf4.codebook import SCALES as SCALES
from nf4.codebook import check_block_size as check_block_size
from nf4.codebook import check_scale as check_scale
from nf4.tensor import DTYPES, NF4Tensor, check_nf4


def check_weight(w: Tensor, name: str) -> None:
    """Raise TypeError unless w is a dense tensor that can be quantized."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(w).__name__}")
    if w.layout != torch.strided or w.is_nested:
        kind = "a nested tensor" if w.is_nested else f"layout {w.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if w.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16, got {w.dtype}")


def check_int(value: int, name: str, least: int, most: int | None = None) -> None:
    """Raise TypeError or ValueError unless value is an int within bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an int {wanted}, got {value}")


def check_number(value: float, name: str) -> None:
    """Raise TypeError or ValueError unless value is a number that fp32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not abs(value) <= LARGEST_ABSMAX:  # also for integers beyond every float
        said = f"an int of {value.bit_length()} bits" if isinstance(value, int) else value
        raise ValueError(f"{name}: expected a finite number that float32 can hold, got {said}")


def check_weights(weights: Tensor, w: Tensor, scale: str) -> Tensor:
    """Return what the columns of w count in the search for scales as float32, or raise."""
    if scale == "absmax":
        raise ValueError("weights: expected scale='mse' or 'mse-positive', got scale='absmax'")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights: expected a floating tensor, got {kind}")
    if w.ndim == 0 or weights.shape != w.shape[-1:]:
        raise ValueError(
            f"weights: expected shape {tuple(w.shape[-1:])}, one for each column of w, "
            f"got {tuple(weights.shape)}"
        )
    if weights.device != w.device:
        raise ValueError(f"weights: expected device {w.device} like w, got {weights.device}")
    weights = weights.detach().float()
    if not weights.is_meta and not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError("weights: expected finite values of at least 0, got others")
    return weights


def check_dropout(p: float, name: str) -> None:
    """Raise unless p is a number in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"{name}: expected a number in [0, 1), got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {p}")


def check_floating(tensor: Tensor, name: str, q: NF4Tensor) -> None:
    """Raise unless tensor is a floating one where a weight is."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != q.packed.device:
        raise ValueError(
            f"{name}: expected device {q.packed.device}, where the weight is, got {tensor.device}"
        )


def check_quantize_out(out: NF4Tensor, w: Tensor, block_size: int, double_quant: bool) -> None:
    """Raise unless out can take what w is quantized to."""
    check_nf4(out, "out")
    found = (tuple(out.shape), out.dtype, out.block_size, out.double_quant, out.device)
    expected = (tuple(w.shape), w.dtype, block_size, double_quant, w.device)
    if found != expected:
        names = ("shape", "dtype", "block_size", "double_quant", "device")
        pairs = zip(names, expected, found, strict=True)
        wrong = "; ".join(f"{n}: expected {e}, got {f}" for n, e, f in pairs if e != f)
        raise ValueError(f"out: expected an NF4Tensor that fits w, got {wrong}")
    if out.layout != "rows":
        raise ValueError(f"out: expected an NF4Tensor in rows, got layout {out.layout!r}")
    if not all(part.is_contiguous() for part in out.tensors()):
        raise ValueError("out: expected contiguous parts, got strided ones")
    if not torch.compiler.is_compiling() and any(part.is_neg() for part in out.tensors()):
        raise ValueError("out: expected parts of their own, got views that are to be negated")


def check_dequantize_out(out: Tensor, q: NF4Tensor, dtype: torch.dtype | None) -> None:
    """Raise unless out can take what q dequantizes to."""
    check_floating(out, "out", q)
    if dtype is not None and dtype != out.dtype:
        raise TypeError(f"dtype: expected {out.dtype} like out, got {dtype}")
    if out.shape != q.shape:
        raise ValueError(f"out: expected shape {tuple(q.shape)} like q, got {tuple(out.shape)}")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that needs no gradient, got one that does")


def check_seed(seed: Tensor, q: NF4Tensor) -> None:
    """Raise unless seed is one of dropout, where a weight is."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed: expected an int64 tensor, got {getattr(seed, 'dtype', seed)!r}")
    if seed.ndim or seed.device != q.packed.device:
        raise ValueError(
            f"seed: expected shape () on {q.packed.device}, where the weight is, "
            f"got {tuple(seed.shape)} on {seed.device}"
        )


_INPUT_DTYPES = (*DTYPES, torch.float64)


def check_linear(x: Tensor, q: NF4Tensor, bias: Tensor | None) -> None:
    """Raise unless x can be multiplied by a weight, and bias be added.

    Also of a layer: its parts are parameters, which anybody may replace or shard.
    """
    check_nf4(q)
    if len(q.shape) != 2:
        raise ValueError(f"q: expected a quantized matrix [N, K], got shape {tuple(q.shape)}")
    check_floating(x, "x", q)
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != q.shape[1]:
        raise ValueError(
            f"x: expected shape (..., {q.shape[1]}) for a weight {tuple(q.shape)}, "
            f"got {tuple(x.shape)}"
        )
    if bias is not None:
        check_floating(bias, "bias", q)
        if bias.shape != (q.shape[0],):
            raise ValueError(f"bias: expected shape ({q.shape[0]},), got {tuple(bias.shape)}")


def check_lora(
    x: Tensor, q: NF4Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> None:
    """Raise unless a low-rank term fits a weight."""
    check_floating(lora_A, "lora_A", q)
    check_floating(lora_B, "lora_B", q)
    n, k = q.shape
    if lora_A.ndim != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A: expected shape (r, {k}) with r ≥ 1, got {tuple(lora_A.shape)}")
    if lora_B.shape != (n, lora_A.shape[0]):
        raise ValueError(
            f"lora_B: expected shape ({n}, {lora_A.shape[0]}), got {tuple(lora_B.shape)}"
        )
    if not isinstance(scaling, Tensor):
        check_number(scaling, "scaling")
        return
    if scaling.ndim or scaling.is_complex() or scaling.dtype == torch.bool:
        raise ValueError(
            f"scaling: expected a number, got a tensor {tuple(scaling.shape)} of {scaling.dtype}"
        )
    if scaling.device not in (q.packed.device, torch.device("cpu")):
        raise ValueError(
            f"scaling: expected device {q.packed.device} or the CPU, got {scaling.device}"
        )


def check_no_tangent(*tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, which would take the operators for constants."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:
            raise NotImplementedError(
                "nf4: forward-mode differentiation is not implemented; use backward"
            )


def check_names(names: Iterable[str], name: str) -> tuple[str, ...]:
    """Return names as a tuple, or raise TypeError unless they are a list of strings."""
    if isinstance(names, str):
        raise TypeError(f"{name}: expected a list of names, got the string {names!r}")
    if not isinstance(names, Iterable):
        raise TypeError(f"{name}: expected a list of names, got {type(names).__name__}")
    found = tuple(names)
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"{name}: expected names, got {one!r}")
    return found


def compile_pattern(pattern: str, name: str) -> re.Pattern[str]:
    """Return a regular expression, or raise ValueError."""
    try:
        return re.compile(pattern)
    except re.error as error:
        message = f"{name}: expected a regular expression, got {pattern!r}: {error}"
        raise ValueError(message) from error
