"""The operators compiled for a CPU: the reference's results, however the work is cut."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

pytest.importorskip("numba", reason="nf4.cpu needs numba")

import nf4
from nf4 import reference
from nf4.codebook import BLOCK_SIZES
from nf4.cpu import _threads
from nf4.cpu import across as cpu_across
from nf4.cpu import dequantize as cpu_dequantize
from nf4.cpu import dropout_mask as cpu_dropout_mask
from nf4.cpu import linear as cpu_linear
from nf4.cpu import lora_linear as cpu_lora_linear
from nf4.cpu import plan as cpu_plan
from nf4.cpu import quantize as cpu_quantize
from nf4.cpu import quantize_absmax as cpu_quantize_absmax
from nf4.error import exact
from nf4.ops import registry
from nf4.reference import dequantize as reference_dequantize
from nf4.reference import dropout_mask as reference_dropout_mask
from nf4.reference import quantize as reference_quantize
from nf4.reference import quantize_absmax as reference_quantize_absmax
from nf4.tensor import Weight
from nf4.tools.caches import forget
from nf4.tools.terms import Dropout, LowRank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare bit for bit; a NaN is any NaN, for PyTorch itself rounds it to two of them."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    same = (ours.view(ints) == expected.view(ints)) | (ours.isnan() & expected.isnan())
    return ours.dtype == expected.dtype and bool(same.all())


def check_quantize(w: torch.Tensor, block_size: int) -> None:
    packed, absmax = cpu_quantize.quantize(w, block_size)
    expected, scales = reference_quantize.quantize(w, block_size)
    assert packed.dtype == torch.uint8 and torch.equal(packed, expected)
    assert same_bits(absmax, scales)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 64), (1,), (33,), (7, 33), (129, 130), (3, 4096)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_cpu_quantize_equals_reference(block_size, shape, dtype) -> None:
    check_quantize(torch.randn(shape).to(dtype), block_size)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_cpu_quantize_of_special_values_equals_reference(dtype) -> None:
    specials = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3e38, torch.inf, torch.nan])
    w = torch.cat([torch.randn(64).mul_(s) for s in (1e-38, 1e-42, 1e30)])
    for s in specials:  # at each place of a block, the last of an odd count too
        block = torch.randn(65)
        block[[0, 13, 64]] = s
        w = torch.cat([w, block])
        check_quantize(block.to(dtype), 64)
    check_quantize(w.to(dtype), 64)
    check_quantize(torch.zeros(130, dtype=dtype), 32)


def test_cpu_quantize_of_ties_equals_reference() -> None:
    thresholds = torch.tensor(nf4.codebook.nf4_thresholds())
    around = torch.cat(
        [thresholds, thresholds.nextafter(torch.ones(15)), thresholds.nextafter(-torch.ones(15))]
    )
    for largest in (1.0, 0.7, 3.3):
        blocks = torch.cat([around * largest, torch.full((19,), largest)])
        check_quantize(blocks, 64)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_cpu_quantize_over_slabs_threads_and_strides_equals_reference(dtype) -> None:
    n = 2 * cpu_quantize.SLAB + 12345
    w = torch.randn(n).to(dtype)
    check_quantize(w, 64)
    check_quantize(w[: 2 * 5001].view(5001, 2).T, 4096)
    out = (torch.zeros((n + 1) // 2, dtype=torch.uint8), torch.zeros(-(-n // 64)))
    returned = cpu_quantize.quantize(w, 64, out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert torch.equal(out[0], reference_quantize.quantize(w, 64)[0])


@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 70000])
@pytest.mark.parametrize("kind", ["random", "equal", "tiny", "nan", "infinite"])
def test_cpu_quantize_absmax_equals_reference(blocks, kind) -> None:
    absmax = torch.rand(blocks) + 0.5
    if kind == "equal":
        absmax.fill_(0.3)
    elif kind == "tiny":
        absmax *= 1e-39
    elif kind != "random" and blocks:
        absmax[blocks // 2] = torch.nan if kind == "nan" else torch.inf
    ours = cpu_quantize_absmax.quantize_absmax(absmax)
    expected = reference_quantize_absmax.quantize_absmax(absmax)
    assert torch.equal(ours[0], expected[0])
    assert same_bits(ours[1], expected[1]) and same_bits(ours[2], expected[2])
    out = tuple(torch.zeros_like(t) for t in expected)
    cpu_quantize_absmax.quantize_absmax(absmax, out)
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 64), (1,), (33,), (7, 33), (129, 130), (3, 4096)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_cpu_dequantize_equals_reference(block_size, shape, dtype, double_quant) -> None:
    q = nf4.quantize(torch.randn(shape), block_size, double_quant)
    args = (q.as_weight(), dtype)
    ours = cpu_dequantize.dequantize(*args)
    assert ours.shape == torch.Size(shape)
    assert ours.untyped_storage().nbytes() == ours.nbytes
    assert same_bits(ours, reference_dequantize.dequantize(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_dequantize_every_byte_and_scale(dtype) -> None:
    scales = [1.0, 0.0, -1.0, 2.0**-126, 1e-45, 3.4e38, torch.inf, torch.nan]
    absmax = torch.tensor(scales).repeat_interleave(8)
    packed = torch.arange(256, dtype=torch.uint8).repeat(8)
    args = (Weight(packed, absmax, None, None, (4096,), 64), dtype)
    assert same_bits(cpu_dequantize.dequantize(*args), reference_dequantize.dequantize(*args))


def test_cpu_dequantize_reads_strided_parts() -> None:
    q = nf4.quantize(torch.randn(64, 64), double_quant=False)
    packed = torch.stack([q.packed, q.packed + 1], dim=-1)[..., 0]
    absmax = torch.stack([q.absmax, -q.absmax], dim=-1)[..., 0]
    strided = q.as_weight()._replace(packed=packed, absmax=absmax)
    ours = cpu_dequantize.dequantize(strided, torch.float32)
    assert torch.equal(ours, reference_dequantize.dequantize(q.as_weight(), torch.float32))


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "pool"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_dequantize_is_the_same_on_any_number_of_threads(threads, openmp, monkeypatch) -> None:
    if not openmp:
        monkeypatch.setattr(_threads, "_openmp", lambda: None)
    elif _threads._openmp() is None:
        pytest.skip("PyTorch's threads are not OpenMP's here")
    monkeypatch.setattr(cpu_dequantize, "GRAIN", 64)
    monkeypatch.setattr(cpu_dequantize, "STRIP", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q = nf4.quantize(torch.randn(37, 130))
    args = (q.as_weight(), torch.bfloat16)
    assert same_bits(cpu_dequantize.dequantize(*args), reference_dequantize.dequantize(*args))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_work_is_cut_for_the_number_of_threads_that_pytorch_has(threads, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = []

    def share(what: str, begin: int, end: int, team: tuple[int, ...]) -> None:
        seen.append((what, begin, end, team[0]))

    monkeypatch.setattr(_threads, "_openmp", lambda: (1, 2, 3))
    _threads.spread(share, range(10, 100), 10, "work")
    assert seen == [("work", 10, 100, threads)]
    seen.clear()
    monkeypatch.setattr(_threads, "_openmp", lambda: None)
    _threads.spread(share, range(10, 100), 10, "work")
    parts_ = sorted(seen)
    assert len(parts_) == threads and all(team == 1 for *_, team in parts_)
    assert [part[1] for part in parts_] == [10, *(part[2] for part in parts_[:-1])]
    assert parts_[-1][2] == 100
    seen.clear()
    _threads.spread(share, range(10), 10, "little")
    assert seen == [("little", 0, 10, 1)]


FORK = """
import os, torch, nf4
from nf4.cpu import dequantize
dequantize.GRAIN, dequantize.STRIP = 64, 4
torch.get_num_threads = lambda: 2
q = nf4.quantize(torch.randn(64, 64))
expected = nf4.dequantize(q)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(nf4.dequantize(q), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_cpu_threads_survive_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


CASES = {
    "whole_blocks": (5, 96, 128, 64),
    "many_rows": (20, 96, 128, 64),
    "blocks_straddle_rows": (5, 37, 90, 64),
    "odd": (3, 37, 45, 32),
    "block_longer_than_a_slab": (3, 21, 100, 4096),
    "one_row": (1, 64, 64, 64),
    "no_rows": (0, 64, 64, 64),
    "no_columns": (3, 8, 0, 64),
}


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, 123456789012345])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 171), (33, 1001)], ids=str)
def test_cpu_dropout_mask_equals_reference(shape, seed, monkeypatch) -> None:
    monkeypatch.setattr(cpu_dropout_mask, "GRAIN", 64)
    args = (torch.tensor(seed), torch.Size(shape))
    for p in (0.0, 0.05, 0.5):
        ours = cpu_dropout_mask.dropout_mask(*args, p)
        assert torch.equal(ours, reference_dropout_mask.dropout_mask(*args, p))


@pytest.mark.parametrize("r", [1, 8, 13, 64])
@pytest.mark.parametrize(("m", "n"), [(1, 32), (7, 96), (300, 1056)])
def test_cpu_across_sums_outer_products_in_fp32(m, n, r, monkeypatch) -> None:
    monkeypatch.setattr(cpu_across, "GRAIN", 1)
    a, b = torch.randn(m, r).bfloat16(), torch.randn(m, n).bfloat16()
    assert cpu_across.fits(a, b) and not cpu_across.fits(a, b[:, 1:])
    check(cpu_across.across(a, b), exact.product(a.T, b, *[torch.float32] * 2), torch.float32)


@pytest.fixture(params=["bf16", "fp32"])
def units(request, monkeypatch) -> None:
    """Products of bf16 with the CPU's instructions for it, and as on a CPU without them."""
    if request.param == "fp32":
        monkeypatch.setattr(cpu_plan, "multiplies_bf16", lambda: False)
    elif not cpu_plan.multiplies_bf16():
        pytest.skip("this CPU does not multiply bf16")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, monkeypatch):
    """A weight in slabs of about 1000 bytes, with x and dy: M, N, K, block size."""
    monkeypatch.setattr(cpu_linear, "SLAB", 1000)
    monkeypatch.setattr(cpu_linear, "ARENA", 2500)
    nf4.release_scratch()
    m, n, k, block_size = request.param
    q = nf4.quantize(torch.randn(n, k), block_size)
    return torch.randn(m, k), torch.randn(m, n), q, torch.randn(n)


def check(found: torch.Tensor, right: exact.Exact, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == right.value.shape
    # In float64 what is taken for exact is a sum of as many roundings itself
    assert right.share(found) <= (2 if dtype == torch.float64 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_linear_and_its_gradient_are_right(case, dtype, units) -> None:
    x, dy, q, bias = case
    none = (torch.empty(0, q.shape[1]), torch.empty(q.shape[0], 0))
    x, dy = x.to(dtype), dy.to(dtype)
    right = exact.LoraLinear(x, q, *none, 1.0, bias, dy)
    check(cpu_linear.linear(x, q.as_weight(), bias), right.y, dtype)
    check(cpu_linear.linear_backward(dy, q.as_weight()), right.dx, dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_lora_linear_and_its_gradients_are_right(case, dtype, dropout_p, units) -> None:
    x, dy, q, bias = case
    x, dy, a, b = x.to(dtype), dy.to(dtype), torch.randn(4, q.shape[1]), torch.randn(q.shape[0], 4)
    seed = torch.tensor(7) if dropout_p else None
    weight, low_rank = q.as_weight(), LowRank(a, b, 0.5, Dropout(dropout_p, seed))
    y, t = cpu_lora_linear.lora_linear(x, weight, low_rank, bias, True)
    grads = cpu_lora_linear.lora_linear_backward(dy, x, t, weight, low_rank, [True] * 4)
    keep = reference_dropout_mask.dropout_mask(seed, x.shape, dropout_p) if dropout_p else None
    right = exact.LoraLinear(x, q, a, b, 0.5, bias, dy, keep, dropout_p)
    check(y, right.y, dtype)
    check(t, exact.lora_down(x, a, low_rank.dropout), dtype)
    for name, found in zip(("dx", "dbias", "dA", "dB"), grads, strict=True):
        check(found, getattr(right, name), dtype if name == "dx" else torch.float32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "block_size"), [(1, 300, 4096, 64), (7, 5, 96, 32)])
def test_cpu_few_rows_are_as_exact_as_a_dense_product(
    m, n, k, block_size, dtype, double_quant
) -> None:
    q = nf4.quantize(torch.randn(n, k) / k**0.5, block_size, double_quant)
    x = torch.randn(m, k).to(dtype)
    for held in (q, nf4.to_fragments(q)) if n % 16 == 0 and k % 64 == 0 else (q,):
        check(nf4.linear(x, held), exact.linear(x, q), dtype)


def test_cpu_few_rows_never_write_the_weight(monkeypatch) -> None:
    q = nf4.quantize(torch.randn(64, 128))

    def refuse(*args: object) -> None:
        raise AssertionError("dequantized")

    monkeypatch.setattr(cpu_linear, "dequantize_blocks", refuse)
    assert nf4.linear(torch.randn(16, 128), q).shape == (16, 64)
    with pytest.raises(AssertionError, match="dequantized"):
        nf4.linear(torch.randn(17, 128), q)


PEAK = """
import json, sys, torch, nf4
from nf4.bench.harness.footprint import cpu_peak
from nf4.cpu import plan
dtype, units = getattr(torch, sys.argv[1]), sys.argv[2] == "bf16"
m, n, k = (int(size) for size in sys.argv[3:])
plan.multiplies_bf16 = lambda: units
w = torch.randn(n, k).to(dtype)
x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
q = nf4.quantize(w[:64])  # compiled before
nf4.linear(x[:32], q), nf4.linear(x[:1], q)
peaks = {"quantize": cpu_peak(lambda: nf4.quantize(w)) - n * k * 0.52}
q = nf4.quantize(w)
nf4.release_scratch()
peaks["linear"] = cpu_peak(lambda: nf4.linear(x, q)) - m * n * dtype.itemsize
backward = torch.ops.nf4.linear_backward
nf4.release_scratch()
run = lambda: backward(dy, *q.parts(), k, 64)
peaks["backward"] = cpu_peak(run) - m * k * dtype.itemsize
print(json.dumps({name: peak / 2**20 for name, peak in peaks.items()}))
"""
# A large weight, and a long input: a CPU without instructions for bf16 takes long for both at once
WAYS = [
    ("float32", "fp32", (1536, 4096, 6144)),
    ("bfloat16", "fp32", (1536, 4096, 6144)),
    ("bfloat16", "bf16", (128, 4096, 6144)),
    ("bfloat16", "bf16", (32768, 64, 1536)),
    ("bfloat16", "bf16", (1, 4096, 6144)),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of Linux")
@pytest.mark.parametrize(("dtype", "units", "sizes"), WAYS)
def test_cpu_memory_beyond_inputs_and_outputs_is_at_most_64_mib(dtype, units, sizes) -> None:
    most = {"quantize": 64, "linear": 8 if sizes[0] == 1 else 64, "backward": 64}  # W is 48 MiB
    command = [sys.executable, "-c", PEAK, dtype, units, *map(str, sizes)]
    least: dict[str, float] = {}
    for _ in range(3):  # what else a process does adds to its high-water mark, and never takes away
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks = json.loads(done.stdout)
        least = {name: min(peak, least.get(name, peak)) for name, peak in peaks.items()}
        if all(0 < least[name] <= most[name] for name in most):
            return
    pytest.fail(f"MiB beyond inputs and outputs: {least}")


OTHER_CPUS = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2"},
    "any": {"NUMBA_CPU_NAME": "generic"},
}
OTHER_CPU = """
import torch, nf4
from nf4.error import exact
from nf4.cpu import dequantize, few_rows, quantize
from nf4.reference import dequantize as reference_dequantize, quantize as reference_quantize
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    w = torch.randn(9, 4096).mul_(torch.tensor([1, 1e-7, 1e4, 1e-38, 0, 1, 1, 1, 1])[:, None])
    w = w.to(dtype)
    packed, absmax = quantize.quantize(w, 64)
    expected = reference_quantize.quantize(w, 64)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])
    q = nf4.NF4Tensor(packed.view(9, 2048), absmax, w.shape, dtype)
    dense = dequantize.dequantize(q.as_weight(), dtype)
    assert torch.equal(dense, reference_dequantize.dequantize(q.as_weight(), dtype))
    x = torch.randn(7, 4096)
    y = few_rows.product(x, q.as_weight(), None)
    assert exact.linear(x, q).share(y) <= 1
compiled = list(dequantize._loop.inspect_asm().values())
assert compiled and not any("zmm" in asm for asm in compiled)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86")
@pytest.mark.parametrize("kind", OTHER_CPUS)
def test_cpu_gives_the_same_bits_without_avx512(kind, tmp_path) -> None:
    environment = {**os.environ, **OTHER_CPUS[kind], "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_CPU], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_operators_fall_back_to_the_reference_without_numba(monkeypatch) -> None:
    assert registry.implementation("dequantize", "cpu") is cpu_dequantize.dequantize
    assert registry.implementation("dequantize", "mps") is reference_dequantize.dequantize
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    forget()
    try:
        found = registry.implementation("lora_linear_backward", "cpu")
        assert found is reference.lora_linear.lora_linear_backward
    finally:
        forget()
