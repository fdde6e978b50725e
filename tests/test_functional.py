"""Every wrong argument of the public functions gets an error that names it."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import nf4
from nf4 import registry

W = torch.randn(8, 64)
Q = nf4.quantize(W)
X = torch.randn(3, 64)
A, B = torch.randn(2, 64), torch.randn(8, 2)

BAD_CALLS = {
    "w_list": (lambda: nf4.quantize([1.0]), TypeError, "w: expected a torch.Tensor, got list"),
    "w_int": (
        lambda: nf4.quantize(torch.zeros(4, dtype=torch.int32)),
        TypeError,
        "w: expected dtype float32, float16 or bfloat16, got torch.int32",
    ),
    "w_float64": (lambda: nf4.quantize(W.double()), TypeError, "got torch.float64"),
    "w_sparse": (lambda: nf4.quantize(W.to_sparse()), TypeError, "dense tensor, got layout"),
    "block_size_48": (
        lambda: nf4.quantize(W, 48),
        ValueError,
        "block_size: expected a power of two from 32 to 4096, got 48",
    ),
    "block_size_16": (lambda: nf4.quantize(W, 16), ValueError, "got 16"),
    "block_size_8192": (lambda: nf4.quantize(W, 8192), ValueError, "got 8192"),
    "block_size_float": (lambda: nf4.quantize(W, 64.0), TypeError, "expected an int, got float"),
    "block_size_bool": (lambda: nf4.quantize(W, True), TypeError, "expected an int, got bool"),
    "dequantize_tensor": (lambda: nf4.dequantize(W), TypeError, "q: expected an NF4Tensor"),
    "dequantize_int8": (
        lambda: nf4.dequantize(Q, torch.int8),
        TypeError,
        "dtype: expected a floating torch.dtype, got torch.int8",
    ),
    "dequantize_text": (lambda: nf4.dequantize(Q, "half"), TypeError, "dtype: expected"),
    "check_int": (lambda: nf4.quantize(W, check=1), TypeError, "check: expected a bool, got int"),
    "quantize_out_shape": (
        lambda: nf4.quantize(W[:4], out=Q),
        ValueError,
        r"out: expected an NF4Tensor that fits w, got shape: expected \(4, 64\), got \(8, 64\)",
    ),
    "quantize_out_block_size": (
        lambda: nf4.quantize(W, 32, out=Q),
        ValueError,
        "block_size: expected 32, got 64",
    ),
    "quantize_out_tensor": (
        lambda: nf4.quantize(W, out=W),
        TypeError,
        "out: expected an NF4Tensor, got Tensor",
    ),
    "dequantize_out_shape": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 63)),
        ValueError,
        r"out: expected shape \(8, 64\) like q, got \(8, 63\)",
    ),
    "dequantize_out_dtype": (
        lambda: nf4.dequantize(Q, torch.half, out=torch.empty(8, 64)),
        TypeError,
        "dtype: expected torch.float32 like out, got torch.float16",
    ),
    "dequantize_out_int": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, dtype=torch.int32)),
        TypeError,
        "out: expected a floating dtype, got torch.int32",
    ),
    "dequantize_out_device": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, device="meta")),
        ValueError,
        "out: expected device cpu, where the weight is, got meta",
    ),
    "dequantize_out_grad": (
        lambda: nf4.dequantize(Q, out=torch.empty(8, 64, requires_grad=True)),
        ValueError,
        "out: expected a tensor that needs no gradient",
    ),
    "linear_q": (lambda: nf4.linear(X, W), TypeError, "q: expected an NF4Tensor, got Tensor"),
    "linear_q_1d": (
        lambda: nf4.linear(X, nf4.quantize(W.flatten())),
        ValueError,
        r"q: expected a quantized matrix \[N, K\], got shape \(512,\)",
    ),
    "linear_x_int": (lambda: nf4.linear(X.int(), Q), TypeError, "x: expected a floating dtype"),
    "linear_x_shape": (
        lambda: nf4.linear(X[:, :63], Q),
        ValueError,
        r"x: expected shape \(..., 64\) for a weight \(8, 64\), got \(3, 63\)",
    ),
    "linear_x_0d": (lambda: nf4.linear(torch.ones(()), Q), ValueError, "x: expected shape"),
    "linear_x_device": (
        lambda: nf4.linear(X.to("meta"), Q),
        ValueError,
        "x: expected device cpu, where the weight is, got meta",
    ),
    "linear_x_none": (lambda: nf4.linear(None, Q), TypeError, "x: expected a torch.Tensor"),
    "linear_bias_shape": (
        lambda: nf4.linear(X, Q, torch.zeros(7)),
        ValueError,
        r"bias: expected shape \(8,\), got \(7,\)",
    ),
    "linear_bias_int": (
        lambda: nf4.linear(X, Q, torch.zeros(8, dtype=torch.int64)),
        TypeError,
        "bias: expected a floating dtype",
    ),
    "lora_A_shape": (
        lambda: nf4.lora_linear(X, Q, A[:, :5], B),
        ValueError,
        r"lora_A: expected shape \(r, 64\) with r ≥ 1, got \(2, 5\)",
    ),
    "lora_A_rank_0": (lambda: nf4.lora_linear(X, Q, A[:0], B[:, :0]), ValueError, "r ≥ 1"),
    "lora_B_shape": (
        lambda: nf4.lora_linear(X, Q, A, B.T),
        ValueError,
        r"lora_B: expected shape \(8, 2\), got \(2, 8\)",
    ),
    "lora_scaling": (
        lambda: nf4.lora_linear(X, Q, A, B, "2"),
        TypeError,
        "scaling: expected a number, got str",
    ),
    "lora_dropout_1": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=1.0),
        ValueError,
        r"dropout_p: expected a number in \[0, 1\), got 1.0",
    ),
    "lora_dropout_negative": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=-0.1),
        ValueError,
        "got -0.1",
    ),
    "lora_dropout_nan": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=float("nan")),
        ValueError,
        "got nan",
    ),
    "lora_dropout_text": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p="0.1"),
        TypeError,
        "dropout_p: expected a number",
    ),
    "lora_seed": (
        lambda: nf4.lora_linear(X, Q, A, B, dropout_p=0.1, seed=3),
        TypeError,
        r"seed: expected an int64 tensor, got 3",
    ),
    "lora_seed_device": (
        lambda: nf4.lora_linear(
            X, Q, A, B, dropout_p=0.1, seed=torch.zeros((), dtype=torch.int64, device="meta")
        ),
        ValueError,
        r"seed: expected shape \(\) on cpu, where the weight is, got \(\) on meta",
    ),
    "lora_scaling_nan": (
        lambda: nf4.lora_linear(X, Q, A, B, float("nan")),
        ValueError,
        "scaling: expected a finite number, got nan",
    ),
    "linear_x_float8": (
        lambda: nf4.linear(X.to(torch.float8_e4m3fn), Q),
        TypeError,
        "x: expected float32, float16, bfloat16 or float64, got torch.float8_e4m3fn",
    ),
    "double_quant_text": (
        lambda: nf4.quantize(W, double_quant="no"),
        TypeError,
        "double_quant: expected a bool, got str",
    ),
    "nf4_block_size": (
        lambda: nf4.dequantize(dataclasses.replace(Q, block_size=48)),
        ValueError,
        "q.block_size: expected one of .*, got 48",
    ),
    "nf4_to_dtype": (lambda: Q.to(torch.bfloat16), TypeError, "device"),
    "error_device": (
        lambda: nf4.quantization_error(W.to("meta"), Q),
        ValueError,
        "w: expected device cpu like q, got meta",
    ),
    "error_nan": (
        lambda: nf4.quantization_error(W * float("nan"), Q),
        ValueError,
        "w: expected finite values",
    ),
    "error_shape": (
        lambda: nf4.quantization_error(W.T, Q),
        ValueError,
        r"w: expected shape \(8, 64\) like q, got \(64, 8\)",
    ),
    "nf4_half_double": (
        lambda: nf4.dequantize(dataclasses.replace(Q, offset=None)),
        ValueError,
        "absmax2 and offset belong together",
    ),
    "nf4_packed_dtype": (
        lambda: nf4.dequantize(dataclasses.replace(Q, packed=Q.packed.float())),
        TypeError,
        "q.packed: expected torch.uint8, got torch.float32",
    ),
    "nf4_absmax_count": (
        lambda: nf4.dequantize(dataclasses.replace(Q, absmax=Q.absmax[:-1])),
        ValueError,
        r"q.absmax: expected shape \(8,\) for \(8, 64\) at block size 64, got \(7,\)",
    ),
    "nf4_scale_device": (
        lambda: nf4.dequantize(dataclasses.replace(Q, offset=Q.offset.to("meta"))),
        ValueError,
        "q.offset: expected device cpu like packed, got meta",
    ),
    "torch_function": (
        lambda: torch.nn.functional.linear(X, Q),
        TypeError,
        "linear: expected a torch.Tensor, got an NF4Tensor; multiply by it with nf4.linear",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_argument_is_named(case) -> None:
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind, match=message):
        call()


def test_nf4tensor_tells_its_size() -> None:
    q = nf4.quantize(torch.randn(4096, 1024))
    assert q.bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert q.nbytes == 4096 * 512 + 65536 + 4 * 256 + 4
    single = nf4.quantize(torch.randn(64, 64), double_quant=False)
    assert single.bits_per_weight == 4.5
    assert (q.ndim, q.numel(), q.absmax_block_size, q.double_quant) == (2, 4096 * 1024, 256, True)
    assert "4.127 bits per weight" in repr(q) and "tensor(" not in repr(q)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4tensor_moves_between_devices(double_quant) -> None:
    q = nf4.quantize(torch.randn(8, 64), double_quant=double_quant)
    assert {t.device.type for t in q.to("meta").tensors()} == {"meta"}
    assert torch.equal(nf4.dequantize(q.to("cpu")), nf4.dequantize(q))


def test_operators_run_on_the_device_of_their_tensors(monkeypatch) -> None:
    """Kernels are launched on the current device: it must be that of the tensors."""
    entered, computed = [], []

    @contextmanager
    def enter(device):
        entered.append(device)
        yield
        entered.append(None)

    module = SimpleNamespace(current_device=lambda: 0, device=enter)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(
        registry, "implementation", lambda *key: lambda x: computed.append((key, list(entered)))
    )
    first, second = (SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1))
    registry.run("dequantize", first, first)
    registry.run("dequantize", second, second)
    key = ("dequantize", "cuda")
    assert computed == [(key, []), (key, [second.device])]
    assert entered == [second.device, None]
