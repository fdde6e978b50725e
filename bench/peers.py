"""What nf4 is timed against, as far as it is installed; by its public interface only."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import DEVICE, GPU
from torch import Tensor, nn

import nf4
from nf4.reference import dequantize as dequantize_reference
from nf4.reference import quantize as quantize_reference
from nf4.reference import quantize_absmax as absmax_reference

Layer = Callable[[Tensor], Tensor]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def bitsandbytes() -> Any:
    """Return bitsandbytes, or None where it is not installed."""
    if not _has("bitsandbytes"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional
    return bitsandbytes


def torchao() -> Any:
    """Return torchao's NF4Tensor, or None where it is not installed."""
    if not _has("torchao"):
        return None
    from torchao.quantization import NF4Tensor

    return NF4Tensor


def quantizers(w: Tensor) -> dict[str, Callable[[], Any]]:
    """Return how others quantize w in blocks of 64 with double quantization."""
    found: dict[str, Callable[[], Any]] = {}
    bnb, ao = bitsandbytes(), torchao()
    if bnb:
        quantize = bnb.functional.quantize_4bit
        found["bitsandbytes"] = lambda: quantize(w, quant_type="nf4", compress_statistics=True)
    if ao:
        found["torchao"] = lambda: ao.from_tensor(w, 64, 256)
    if GPU:

        def reference(w: Tensor) -> Any:
            packed, absmax = quantize_reference.quantize(w, 64)
            return packed, absmax_reference.quantize_absmax(absmax)

        compiled = torch.compile(reference)
        found["torch.compile of the reference"] = lambda: compiled(w)
    return found


def dequantizers(w: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return how others dequantize w, quantized as by `quantizers`."""
    found: dict[str, Callable[[], Tensor]] = {}
    bnb, ao = bitsandbytes(), torchao()
    if bnb:
        packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        found["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state)
    if ao:
        tensor = ao.from_tensor(w, 64, 256)
        found["torchao"] = tensor.get_original_weight
    if GPU:
        q = nf4.quantize(w)
        parts = (*q.parts(), tuple(q.shape), q.block_size, w.dtype)
        compiled = torch.compile(dequantize_reference.dequantize)
        found["torch.compile of the reference"] = lambda: compiled(*parts)
    return found


def layers(w: Tensor, q: nf4.NF4Tensor) -> dict[str, Layer]:
    """Return how others multiply by a weight without an adapter: in 16 bits, and in 4."""
    found: dict[str, Layer] = {f"dense {str(w.dtype).removeprefix('torch.')}": lambda x: x @ w.T}
    found["dequantize, then torch.matmul"] = lambda x: x @ nf4.dequantize(q, w.dtype).T
    bnb, ao = bitsandbytes(), torchao()
    if bnb:
        packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        found["bitsandbytes"] = lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)
    if ao:
        tensor = ao.from_tensor(w, 64, 256)
        found["torchao"] = lambda x: nn.functional.linear(x, tensor)
    if GPU:
        parts = (*q.parts(), tuple(q.shape), q.block_size, w.dtype)
        compiled = torch.compile(lambda x: x @ dequantize_reference.dequantize(*parts).T)
        found["torch.compile of the reference"] = compiled
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


class _FewLaunches(torch.autograd.Function):
    """The well-known hand-written sequence of a QLoRA layer around a library product.

    By its public description: W is dequantized into a buffer by one launch in forward and again in
    backward; x @ A.T and dy @ B are computed where they are needed, backward does both anew.
    """

    @staticmethod
    def forward(ctx, x, q, lora_A, lora_B, scaling):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.q, ctx.scaling = q, scaling
        y = x @ nf4.dequantize(q, x.dtype).T
        return y.addmm_(x @ lora_A.to(x.dtype).T, lora_B.to(x.dtype).T, alpha=scaling)

    @staticmethod
    def backward(ctx, dy):  # noqa: ANN001, ANN205
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
    name = str(w.dtype).removeprefix("torch.")
    adapter = (lora_A, lora_B, scaling)
    found: dict[str, nn.Module] = {
        f"dense {name} + LoRA": Adapted(lambda x: nn.functional.linear(x, w), *adapter),
        "dequantize, torch.matmul, recomputing": FewLaunches(q, *adapter),
    }
    bnb = bitsandbytes()
    if bnb and _has("peft"):
        found["bitsandbytes + PEFT"] = _peft(bnb, w, *adapter)
    if GPU:
        parts = (*q.parts(), tuple(q.shape), q.block_size, w.dtype)

        def base(x: Tensor) -> Tensor:
            return nn.functional.linear(x, dequantize_reference.dequantize(*parts))

        found["torch.compile of the reference"] = torch.compile(Adapted(base, *adapter))
    return found


def _peft(bnb: Any, w: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> nn.Module:
    """Return PEFT's layer on bitsandbytes' with the same adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    (n, k), r = w.shape, lora_A.shape[0]
    kwargs = {"compute_dtype": w.dtype, "compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(k, n, bias=False, **kwargs)
    parameter = bnb.nn.Params4bit(
        w.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.weight = parameter
    model = nn.Sequential(layer).to(DEVICE)
    config = LoraConfig(r=r, lora_alpha=scaling * r, target_modules=["0"])
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        model[0].lora_A["default"].weight.copy_(lora_A)
        model[0].lora_B["default"].weight.copy_(lora_B)
    return model.to(DEVICE)
