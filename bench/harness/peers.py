"""What nf4 is timed against, as far as it is installed; by its public interface only.

A peer that cannot be made stands in the list all the same, and raises why when it is called.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import nf4
from nf4.reference import dequantize as dequantize_reference
from nf4.reference import quantize as quantize_reference
from nf4.reference import quantize_absmax as absmax_reference
from nf4.tensor import Weight

Layer = Callable[[Tensor], Tensor]
BLOCK_SIZE, SCALER_BLOCK_SIZE = 64, 256
COMPILED = "torch.compile of the reference"


class Broken(nn.Module):
    """Stands for a peer that could not be made."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, *args: Any) -> Any:
        """Raise what was raised when the peer was made."""
        raise self.error


def has(package: str) -> bool:
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def bitsandbytes() -> Any:
    """Return bitsandbytes, or None where it is not installed."""
    if not has("bitsandbytes"):
        return None
    with _silence():
        import bitsandbytes.functional
    return bitsandbytes


def torchao() -> Any:
    """Return torchao's NF4Tensor, or None where it is not installed."""
    if not has("torchao"):
        return None
    with _silence():
        from torchao.quantization import NF4Tensor

    return NF4Tensor


def quantizers(w: Tensor) -> dict[str, Callable[[], Any]]:
    """Return how others quantize w in blocks of 64 with double quantization."""
    found: dict[str, Callable[[], Any]] = {}
    if has("bitsandbytes"):
        found["bitsandbytes"] = _made(lambda: partial(_bitsandbytes_quantize(), w))
    if has("torchao"):
        found["torchao"] = _made(lambda: partial(_torchao_quantize(), w))
    if w.is_cuda:

        def reference(w: Tensor) -> Any:
            packed, absmax = quantize_reference.quantize(w, BLOCK_SIZE)
            return packed, absmax_reference.quantize_absmax(absmax)

        compiled = Compiled(reference)
        found[COMPILED] = lambda: compiled(w)
    return found


def dequantizers(w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return how others dequantize w, quantized as by `quantizers`."""
    found: dict[str, Callable[[], Tensor]] = {}
    if has("bitsandbytes"):

        def with_bitsandbytes() -> Callable[[], Tensor]:
            packed, state = _bitsandbytes_quantize()(w)
            dequantize = bitsandbytes().functional.dequantize_4bit
            return lambda: dequantize(packed, state)

        found["bitsandbytes"] = _made(with_bitsandbytes)
    if has("torchao"):
        found["torchao"] = _made(lambda: _torchao_quantize()(w).get_original_weight)
    if w.is_cuda:
        weight = nf4.quantize(w).as_weight()
        compiled = Compiled(
            lambda packed: dequantize_reference.dequantize(Weight(packed, *weight[1:]), w.dtype)
        )
        found[COMPILED] = lambda: compiled(weight.packed)
    return found


def layers(w: Tensor, q: nf4.NF4Tensor) -> dict[str, Layer]:
    """Return how others multiply by a weight without an adapter: in 16 bits, and in 4."""
    found: dict[str, Layer] = {f"dense {_name(w.dtype)}": lambda x: x @ w.T}
    found["dequantize, then torch.matmul"] = lambda x: x @ nf4.dequantize(q, w.dtype).T
    if has("bitsandbytes"):

        def with_bitsandbytes() -> Layer:
            packed, state = _bitsandbytes_quantize()(w)
            multiply, transposed = bitsandbytes().matmul_4bit, packed.t()
            return lambda x: multiply(x, transposed, quant_state=state)

        found["bitsandbytes"] = _made(with_bitsandbytes)
    if has("torchao"):

        def with_torchao() -> Layer:
            weight = _torchao_quantize()(w)
            return lambda x: nn.functional.linear(x, weight)

        found["torchao"] = _made(with_torchao)
    if has("gemlite") and w.is_cuda:
        found["gemlite, uniform 4 bits"] = _made(lambda: _gemlite(w))
    if w.is_cuda:
        weight = q.as_weight()
        found[COMPILED] = Compiled(lambda x: x @ dequantize_reference.dequantize(weight, q.dtype).T)
    return found


class Adapted(nn.Module):
    """A dense layer with LoRA, term by term as PEFT has it."""

    def __init__(self, base: Layer, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.lora_A = nn.Parameter(lora_A.clone())
        self.lora_B = nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        linear = nn.functional.linear
        update = linear(linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + update * self.scaling


class Compiled(nn.Module):
    """torch.compile of a function or a module, anew for each kind of input.

    So no input meets code for sizes that vary, nor the eager code that comes after many of them.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.made: tuple[Any, Callable[..., Any]] | None = None

    def forward(self, x: Tensor) -> Any:
        """Return what the function returns."""
        kind = (x.shape, x.dtype, x.requires_grad, torch.is_grad_enabled())
        if self.made is None or self.made[0] != kind:
            torch.compiler.reset()
            self.made = kind, torch.compile(self.function, dynamic=False)
        return self.made[1](x)


class _FewLaunches(torch.autograd.Function):
    """The well-known hand-written sequence of a QLoRA layer around a library product.

    W is dequantized, multiplied, and the adapter's product added in place, in forward and in
    backward; x @ A.T and dy @ B are computed where they are needed, backward does both anew.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: nf4.NF4Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.q, ctx.scaling = q, scaling
        y = x @ nf4.dequantize(q, x.dtype).T
        return y.addmm_(x @ lora_A.to(x.dtype).T, lora_B.to(x.dtype).T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B = ctx.saved_tensors
        a, b, s = lora_A.to(x.dtype), lora_B.to(x.dtype), ctx.scaling
        d_a = s * ((dy @ b).T @ x)
        d_b = s * (dy.T @ (x @ a.T))
        dx = (dy @ nf4.dequantize(ctx.q, x.dtype)).addmm_(dy @ b, a, alpha=s)
        return dx, None, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), None


class FewLaunches(nn.Module):
    """A layer of `_FewLaunches`."""

    def __init__(self, q: nf4.NF4Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.q, self.scaling = q, scaling
        self.lora_A = nn.Parameter(lora_A.clone())
        self.lora_B = nn.Parameter(lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        y: Tensor = _FewLaunches.apply(x, self.q, self.lora_A, self.lora_B, self.scaling)
        return y


def qlora_layers(
    w: Tensor, q: nf4.NF4Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> dict[str, nn.Module]:
    """Return how others run a frozen weight ``[N, K]`` with a trained adapter."""
    adapter = (lora_A, lora_B, scaling)
    found: dict[str, nn.Module] = {
        f"dense {_name(w.dtype)} + LoRA": Adapted(lambda x: nn.functional.linear(x, w), *adapter),
        "dequantize, torch.matmul, recomputing": FewLaunches(q, *adapter),
    }
    if has("bitsandbytes") and has("peft"):
        found["bitsandbytes + PEFT"] = _made(lambda: _peft(w, *adapter))
    if w.is_cuda:
        weight = q.as_weight()

        def base(x: Tensor) -> Tensor:
            return nn.functional.linear(x, dequantize_reference.dequantize(weight, q.dtype))

        found[COMPILED] = Compiled(Adapted(base, *adapter))
    return found


def _peft(w: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> nn.Module:
    """Return PEFT's layer on bitsandbytes' with the same adapter."""
    bnb = bitsandbytes().nn
    with _silence():
        from peft import LoraConfig, inject_adapter_in_model

    (n, k), r = w.shape, lora_A.shape[0]
    kind = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.Linear4bit(k, n, bias=False, compute_dtype=w.dtype, **kind)
    layer.weight = bnb.Params4bit(w.cpu(), requires_grad=False, **kind)
    model = nn.Sequential(layer).to(w.device)
    config = LoraConfig(r=r, lora_alpha=scaling * r, target_modules=["0"])
    inject_adapter_in_model(config, model)
    adapted: Any = model[0]
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(lora_A)
        adapted.lora_B["default"].weight.copy_(lora_B)
    return model.to(w.device)


def _gemlite(w: Tensor) -> Layer:
    """Return gemlite's layer: sixteen levels a block at equal distances, as it has no codebook.

    Its documentation gives ``(W_q - zeros) * scales`` for W: https://github.com/dropbox/gemlite
    """
    from gemlite import DType, GemLiteLinear

    kinds = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}
    if w.dtype not in kinds:
        raise ValueError(f"expected 16 bits, got {_name(w.dtype)}")
    n, k = w.shape
    blocks = w.float().view(-1, BLOCK_SIZE)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scales = ((high - low) / 15).clamp_min(torch.finfo(torch.float16).tiny)
    zeros = -low / scales
    codes = (blocks / scales + zeros).round().clamp(0, 15).to(torch.uint8)
    layer = GemLiteLinear(
        4,
        group_size=BLOCK_SIZE,
        in_features=k,
        out_features=n,
        input_dtype=kinds[w.dtype],
        output_dtype=kinds[w.dtype],
        scaled_activations=False,
    )
    layer.pack(codes.view(n, k), scales.to(w.dtype), zeros.to(w.dtype), None)
    made: Layer = layer
    return made


def _bitsandbytes_quantize() -> Callable[[Tensor], tuple[Tensor, Any]]:
    quantize = bitsandbytes().functional.quantize_4bit
    return partial(quantize, quant_type="nf4", compress_statistics=True)


def _torchao_quantize() -> Callable[[Tensor], Any]:
    sizes = {"block_size": BLOCK_SIZE, "scaler_block_size": SCALER_BLOCK_SIZE}
    return partial(torchao().from_tensor, **sizes)


def _made(make: Callable[[], Any]) -> Any:
    """Return what a function makes, or what stands for it if that fails."""
    try:
        return make()
    except Exception as error:  # another package may raise anything
        return Broken(error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep a package from warning and logging while it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
