"""What a GPU computes with, put together: run on CPU tensors through the emulated kernels."""

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from helpers import error
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="nf4.gpu needs Triton")

import nf4
from nf4.error import exact
from nf4.gpu import plan as gpu_plan
from nf4.kernels import _measured
from nf4.ops import registry
from nf4.reference.dropout_mask import dropout_mask
from nf4.tools import scratch
from nf4.tools.caches import forget

pytestmark = pytest.mark.parametrize("emulate", ["sm_90"], indirect=True)


@pytest.fixture
def gpu(emulate):
    """Let operators on CPU tensors take the way of a GPU."""
    scratch.release_scratch()
    with registry.computing("cpu", "cuda"):
        yield emulate
    scratch.release_scratch()


@pytest.fixture
def always():
    """Let one kernel multiply for the rest of a test, whatever the plan would be."""
    with ExitStack() as stack:
        yield lambda kernel: stack.enter_context(gpu_plan.always(kernel))


@dataclasses.dataclass(frozen=True)
class Case:
    """x ``[m, k]``, W ``[n, k]``, an adapter, and the kernel, None for what the plan says."""

    m: int
    n: int
    k: int
    block_size: int = 64
    r: int = 8
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    layout: str = "fragments"
    kernel: str | None = None


CASES = {
    "decoding": Case(3, 96, 128),
    "middle": Case(40, 96, 128, kernel="matmul"),
    "one_row": Case(1, 96, 256),
    "merged": Case(40, 96, 128, kernel="dequantize"),
    "dropout": Case(40, 96, 128, block_size=32, dropout_p=0.3, kernel="dequantize"),
    "dropout_fused": Case(40, 96, 128, dropout_p=0.3, dtype=torch.float16, kernel="matmul"),
    "rows": Case(40, 96, 130, layout="rows"),
    "rows_dropout": Case(40, 40, 136, dropout_p=0.2, layout="rows"),
    "odd_columns_dropout": Case(9, 48, 77, r=4, dropout_p=0.3, layout="rows"),
    "rank_100": Case(40, 96, 128, r=100, dropout_p=0.2, kernel="dequantize"),
    "rank_300": Case(20, 32, 64, r=300),
    "fp32": Case(9, 48, 128, r=4, dropout_p=0.2, dtype=torch.float32),
}
LAUNCHES = {
    "decoding": "lora_down matmul_small lora_grad add_parts lora_grad add_parts merge",
    "one_row": "lora_down matmul_row lora_grad add_parts lora_grad add_parts merge",
    "middle": "lora_down matmul lora_grad add_parts lora_grad add_parts merge",
    "merged": "lora_down merge lora_grad add_parts lora_grad add_parts merge",
    "dropout": "lora_down merge lora_up lora_grad add_parts lora_grad add_parts merge lora_up",
    "dropout_fused": "lora_down matmul lora_grad add_parts lora_grad add_parts merge lora_up",
    "rows": "lora_down dequantize lora_up lora_grad add_parts lora_grad add_parts dequantize "
    "lora_up",
}


@pytest.mark.parametrize("name", CASES)
def test_gpu_lora_linear_and_its_gradients_are_right(name, gpu, always) -> None:
    if CASES[name].kernel:
        always(CASES[name].kernel)
    launches = compare(CASES[name], 0.5, torch.ones(()), gpu)
    if name in LAUNCHES:
        assert launches == LAUNCHES[name]


@pytest.mark.parametrize("name", ["decoding", "middle", "merged", "dropout", "dropout_fused"])
@pytest.mark.parametrize("scaling", [2**-7, -3.0, 64.0])
def test_gpu_lora_linear_of_outliers_is_right_at_any_scale(name, scaling, gpu, always) -> None:
    if CASES[name].kernel:
        always(CASES[name].kernel)
    k = CASES[name].k
    channels = torch.where(torch.rand(k) < 0.05, 100.0, 0.3)  # as the inputs of language models
    compare(CASES[name], scaling, channels, gpu)


@pytest.mark.parametrize("kernel", ["matmul_small", "matmul", "dequantize"])
def test_gpu_fp16_overflows_no_earlier_than_torch_s(kernel, gpu, always) -> None:
    always(kernel)
    w = torch.full((32, 128), 100.0)
    w[:, 64:] = -100.0
    q = nf4.quantize(w.half())
    x = torch.full((4, 128), 600.0, dtype=torch.float16)  # partial sums of 3.8e6 that cancel
    a, b = torch.full((4, 128), 0.5), torch.full((32, 4), 0.01)
    y = nf4.lora_linear(x, nf4.to_fragments(q), a, b, 2.0)
    unfused = x @ nf4.dequantize(q).T + 2.0 * (x @ a.half().T @ b.half().T)
    assert torch.isfinite(unfused).all() and torch.isfinite(y).all()


def test_gpu_gradients_have_the_strides_that_fake_tensors_promise(gpu) -> None:
    q = nf4.to_fragments(nf4.quantize(torch.randn(32, 128)))
    x, dy = torch.randn(20, 128).bfloat16(), torch.randn(20, 32).bfloat16()
    a, b, t = torch.randn(4, 128), torch.randn(32, 4), torch.randn(20, 4).bfloat16()
    args = (dy, x, t, *q.parts(), a, b, 2.0, 0.0, None, 64, [True] * 4, "fragments")
    backward = torch.ops.nf4.lora_linear_backward
    real = backward(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = backward(*args)
    assert [g.stride() for g in real] == [g.stride() for g in fake]


def test_gpu_reads_strided_bias_and_weight(gpu) -> None:
    q = nf4.quantize(torch.randn(32, 128))
    wide = torch.stack([q.packed, q.packed + 1], dim=-1)
    strided = q.with_parts((wide[..., 0], *q.parts()[1:]))
    x, bias = torch.randn(40, 128).bfloat16(), torch.randn(1).expand(32)
    a, b = torch.randn(4, 128), torch.randn(32, 4)
    for held in (nf4.to_fragments(q), q):
        expected = nf4.lora_linear(x, held, a, b, 1.0, bias.contiguous())
        assert torch.equal(nf4.lora_linear(x, held, a, b, 1.0, bias), expected)
    assert torch.equal(nf4.linear(x, strided, bias), nf4.linear(x, q, bias))
    assert torch.equal(nf4.dequantize(strided), nf4.dequantize(q))


@pytest.mark.parametrize("scaling", [0.0, 1e-40, 1e-30, 1e30])
def test_gpu_scaling_of_any_size(scaling, gpu) -> None:
    q = nf4.to_fragments(nf4.quantize(torch.randn(32, 128)))
    x, a, b = torch.randn(3, 128).bfloat16(), torch.randn(4, 128), torch.randn(32, 4)
    y = nf4.lora_linear(x, q, a, b, scaling).double()
    exact = x.double() @ nf4.dequantize(q, torch.float64).T
    exact += scaling * x.double() @ a.double().T @ b.double().T
    assert error(y, exact) < 2**-7


def compare(case, scaling: float, channels: torch.Tensor, gpu) -> str:
    """Hold y and every gradient to float64; return which kernels ran."""
    m, n, k, r, p = case.m, case.n, case.k, case.r, case.dropout_p
    q = nf4.quantize(torch.randn(n, k) / k**0.5, case.block_size)
    x = (channels * torch.randn(m, k)).to(case.dtype)
    a, b = torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
    bias, dy, seed = (
        torch.randn(n),
        torch.randn(m, n).to(case.dtype),
        torch.tensor(77) if p else None,
    )
    keep = dropout_mask(seed, x.shape, p) if p else None
    right = exact.LoraLinear(x, q, a, b, scaling, bias, dy, keep, p)
    leaves = [t.clone().requires_grad_() for t in (x, bias, a, b)]
    held = nf4.to_fragments(q) if case.layout == "fragments" else q
    gpu.launches.clear()
    y = nf4.lora_linear(leaves[0], held, leaves[2], leaves[3], scaling, leaves[1], p, seed)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    launches = " ".join(name.strip("_").removesuffix("_kernel") for name in gpu.launches)
    for name, one in zip(("y", "dx", "dbias", "dA", "dB"), found, strict=True):
        assert getattr(right, name).share(one) <= 1, name
    return launches


@pytest.mark.parametrize("kernel", [None, "dequantize"])
def test_gpu_linear_and_its_gradient(kernel, gpu, always) -> None:
    if kernel:
        always(kernel)
    q = nf4.quantize(torch.randn(48, 128) / 11)
    x = torch.randn(2, 20, 128, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(48)
    y = nf4.linear(x, nf4.to_fragments(q), bias)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    none = (torch.empty(0, 128), torch.empty(48, 0))
    rows, dy_rows = x.detach().view(40, 128), dy.view(40, 48)
    right = exact.LoraLinear(rows, q, *none, 1.0, bias, dy_rows)
    assert right.y.share(y.view(40, 48)) <= 1 and right.dx.share(dx.view(40, 128)) <= 1


@pytest.mark.parametrize("wanted", ["x", "a", "b", "bias"])
def test_gpu_lora_linear_computes_only_the_gradients_asked_for(wanted, gpu, always) -> None:
    always("dequantize")
    q = nf4.to_fragments(nf4.quantize(torch.randn(48, 64)))
    made = {
        "x": torch.randn(20, 64, dtype=torch.bfloat16),
        "a": torch.randn(4, 64),
        "b": torch.randn(48, 4),
        "bias": torch.randn(48),
    }
    made[wanted].requires_grad_()
    y = nf4.lora_linear(made["x"], q, made["a"], made["b"], 2.0, made["bias"])
    gpu.launches.clear()
    y.sum().backward()
    assert [name for name, v in made.items() if v.grad is not None] == [wanted]
    expected = {
        "x": ["merge_kernel"],
        "a": ["_lora_grad_kernel", "_add_parts_kernel"],
        "b": ["_lora_grad_kernel", "_add_parts_kernel"],
        "bias": [],
    }
    assert gpu.launches == expected[wanted]


def test_gpu_inference_with_an_adapter_is_one_launch_and_a_product(gpu, always) -> None:
    always("dequantize")
    q = nf4.to_fragments(nf4.quantize(torch.randn(48, 64)))
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    gpu.launches.clear()
    with torch.no_grad():
        nf4.lora_linear(x, q, torch.randn(4, 64), torch.randn(48, 4))
    assert gpu.launches == ["merge_kernel"]


def test_gpu_gradients_accumulate_in_place(gpu) -> None:
    q = nf4.to_fragments(nf4.quantize(torch.randn(48, 64)))
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    pointers = []
    for _ in range(3):
        x = torch.randn(20, 64, dtype=torch.bfloat16)
        nf4.lora_linear(x, q, a, b).sum().backward()
        pointers.append((a.grad.data_ptr(), b.grad.data_ptr()))
    assert len(set(pointers)) == 1


def test_gpu_no_dense_weight_outlives_the_call(gpu, always) -> None:
    always("dequantize")
    q = nf4.to_fragments(nf4.quantize(torch.randn(64, 64)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
        nf4.lora_linear(x, q, torch.randn(4, 64, requires_grad=True), torch.randn(64, 4)).sum()
    assert not [t for t in kept if t.is_floating_point() and t.shape == (64, 64)]
    (buffer,) = scratch._buffers.values()
    nf4.linear(torch.randn(20, 64, dtype=torch.bfloat16), q)
    assert [b.data_ptr() for b in scratch._buffers.values()] == [buffer.data_ptr()]
    nf4.release_scratch()
    assert not scratch._buffers


def test_gpu_scratch_grows_and_keeps_zeros(emulate) -> None:
    cpu = torch.device("cpu")
    scratch.release_scratch()
    first = scratch.zeros("test", 10, torch.int32, cpu)
    assert not first.any() and scratch.zeros("test", 4096, torch.int32, cpu) is first
    larger = scratch.zeros("test", 5000, torch.int32, cpu)
    assert larger.numel() >= 5000 and not larger.any() and larger is not first
    other = []
    import threading

    thread = threading.Thread(
        target=lambda: other.append(scratch.scratch("test", 10, torch.int32, cpu))
    )
    thread.start()
    thread.join()
    assert other[0].data_ptr() != larger.data_ptr()
    scratch.release_scratch()


def test_gpu_scratch_keeps_few_views_of_a_buffer(emulate) -> None:
    cpu = torch.device("cpu")
    scratch.release_scratch()
    made = [scratch.matrix("test", (m, 4), torch.float32, cpu) for m in range(1, 200)]
    assert [view.shape[0] for view in made] == list(range(1, 200))
    assert len({view.data_ptr() for view in made}) == 1
    (views,) = scratch._views.values()
    assert len(views) <= scratch._MOST_VIEWS < 199
    scratch.release_scratch()
    assert not scratch._views


def test_gpu_plan_follows_its_table(emulate, monkeypatch, tmp_path) -> None:
    cpu = torch.device("cpu")

    def kernel(
        m,
        n=4096,
        k=4096,
        dtype=torch.bfloat16,
        layout="fragments",
        block_size=64,
        double_quant=True,
    ):
        form = (layout, block_size, double_quant, cpu)
        return gpu_plan.chosen(gpu_plan.Asked("linear", m, (n, k), dtype, *form)).how

    found = [kernel(m) for m in (1, 3, 16, 64, 128, 129)]
    assert found == ["matmul_row"] + ["matmul_small"] * 3 + ["matmul", "dequantize"]
    assert kernel(128, 14336) == "matmul_small"
    assert kernel(256, 4096, 14336) == "matmul"
    assert kernel(1, block_size=32) == "matmul"
    assert kernel(1, double_quant=False) == "matmul_small"
    assert kernel(1, layout="rows") == kernel(1, dtype=torch.float32) == "dequantize"
    assert gpu_plan.fused_limit(4000, 14000, 64, cpu) == (256, "measured on W 4096×14336")
    monkeypatch.setattr(_measured, "FOLDER", tmp_path)
    forget()
    limits = [gpu_plan.fused_limit(n, 4096, 64, cpu) for n in (1024, 4096, 14336)]
    forget()
    assert all(16 <= limit <= 512 and source == "modelled" for limit, source in limits)


def test_gpu_explain_says_what_runs(gpu) -> None:
    f = nf4.to_fragments(nf4.quantize(torch.randn(64, 128).bfloat16()))
    told = nf4.explain((5, 128), f)
    assert told.kernel == "matmul_small" and 0 < told.modelled_seconds < 1e-4
    assert str(told).startswith("matmul_small: 5 rows are at most 64; modelled: ")
    assert nf4.explain((5, 128), f, torch.float32).reason == "x is torch.float32, not 16 bits wide"


WAYS = {
    "kernel": ({"r": 8}, "matmul_small"),
    "merged": ({"m": 300, "r": 8}, "dequantize_merge"),
    "added": ({"m": 300, "r": 8, "dropout_p": 0.1}, "dequantize"),
    "gradient": ({"r": 8, "backward": True}, "dequantize_merge"),
    "gradient_dropout": ({"r": 8, "dropout_p": 0.1, "backward": True}, "dequantize"),
    "gradient_alone": ({"backward": True}, "dequantize"),
    "large_rank": ({"r": 300}, "unfused"),
    "fp32": ({"r": 8, "dtype": torch.float32}, "unfused"),
}


@pytest.mark.parametrize(("asked", "how"), WAYS.values(), ids=WAYS.keys())
def test_gpu_explain_tells_of_adapters_and_gradients(asked, how, gpu) -> None:
    f = nf4.to_fragments(nf4.quantize(torch.randn(64, 128).bfloat16()))
    told = nf4.explain((asked.pop("m", 5), 128), f, asked.pop("dtype", None), **asked)
    assert told.how == how
    assert (told.seconds is None) == (how == "unfused") and told.reason


def test_gpu_goes_the_way_that_explain_tells(gpu, monkeypatch) -> None:
    asked = []
    chosen = gpu_plan.chosen
    monkeypatch.setattr(gpu_plan, "chosen", lambda one: asked.append(chosen(one)) or asked[-1])
    q = nf4.quantize(torch.randn(64, 128).bfloat16())
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(64, 4)
    for held, p in ((q, 0.0), (nf4.to_fragments(q), 0.0), (nf4.to_fragments(q), 0.25)):
        for m in (3, 300):
            x = torch.randn(m, 128).bfloat16()
            nf4.linear(x, held)
            nf4.lora_linear(x, held, a, b, dropout_p=p).sum().backward()
            ran, asked[:] = list(asked), []
            told = [
                nf4.explain(x.shape, held),
                nf4.explain(x.shape, held, r=4, dropout_p=p),
                nf4.explain(x.shape, held, r=4, dropout_p=p, backward=True),
            ]
            assert all(one is other for one, other in zip(ran, told, strict=True))
            asked.clear()


@pytest.mark.parametrize("kernel", ["matmul_row", "matmul_small", "matmul", "dequantize"])
def test_gpu_scales_outputs_in_the_product_s_own_launch(kernel, gpu, always) -> None:
    """In evaluation; in training the product is kept unscaled, for the factor's gradient."""
    always(kernel)
    rows = {"matmul_row": 2, "matmul_small": 7}.get(kernel, 40)
    q = nf4.to_fragments(nf4.quantize(torch.randn(96, 256)))
    x, bias, factor = torch.randn(rows, 256).bfloat16(), torch.randn(96), torch.randn(2, 96).T[:, 0]
    gpu.launches.clear()
    y = nf4.linear(x, q, bias, output_factor=factor)
    assert len(gpu.launches) == 1
    right = exact.linear(x, q, bias, factor, rounded_before=kernel == "dequantize")
    assert right.share(y) <= 1
    trained = factor.clone().requires_grad_()
    z = nf4.linear(x, q, bias, output_factor=trained)
    kept = exact.linear(x, q, bias, factor, rounded_before=True)
    assert kept.share(z) <= 1
    z.sum().backward()
    assert error(trained.grad, exact.linear(x, q, bias).value.sum(dim=0)) < 0.02


def test_gpu_multiplies_by_a_weight_without_columns(gpu) -> None:
    q = nf4.quantize(torch.randn(8, 0))
    a, b = torch.randn(4, 0), torch.randn(8, 4)
    for x in (torch.randn(3, 0), torch.randn(2, 3, 0).bfloat16()):
        assert torch.equal(nf4.linear(x, q), x.new_zeros(*x.shape[:-1], 8))
        assert torch.equal(nf4.lora_linear(x, q, a, b), x.new_zeros(*x.shape[:-1], 8))


@pytest.mark.parametrize("part", ["packed", "absmax"])
@pytest.mark.parametrize("m", [1, 7, 40])
def test_gpu_reads_a_weight_that_begins_in_the_middle_of_a_word(part, m, gpu) -> None:
    q = nf4.to_fragments(nf4.quantize(torch.randn(32, 256)))
    old = getattr(q, part)
    flat = torch.empty(old.numel() + 1, dtype=old.dtype)
    moved = dataclasses.replace(q, **{part: flat[1:].view(old.shape).copy_(old)})
    x = torch.randn(m, 256).bfloat16()
    assert torch.equal(nf4.linear(x, moved), nf4.linear(x, q))
    assert torch.equal(nf4.dequantize(moved), nf4.dequantize(q))
