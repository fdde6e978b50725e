"""Launches of a training step, repeated: what the driver gets, and when they go the long way."""

import os
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="nf4's kernels need Triton")

import nf4
from nf4.bench.harness.pretended import pretended_gpu
from nf4.gpu import sequence
from nf4.gpu.lora_linear import lora_linear, lora_linear_backward
from nf4.gpu.plan import always
from nf4.kernels import _launch
from nf4.tools import scratch
from nf4.tools.terms import NO_DROPOUT, LowRank

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


def quantized(n, k, *options):
    """Return a weight in fragments, made before there is a GPU that computes nothing."""
    return nf4.to_fragments(nf4.quantize(torch.randn(n, k).bfloat16(), *options)).as_weight()


W, OTHER, SMALL, BIG = (
    quantized(*shape) for shape in ((32, 256), (32, 256), (16, 128), (512, 1024))
)
SQUARE, BLOCKS_OF_128, FP32_SCALES = (
    quantized(256, 256),
    quantized(32, 256, 128),
    quantized(32, 256, 64, False),
)


@pytest.fixture
def driver():
    nf4.release_scratch()
    with pretended_gpu() as driver, always("dequantize"), torch.no_grad():
        yield driver
    driver.kept = None


def low_rank(r=8, weight=W, scaling=0.7) -> LowRank:
    n, k = weight.shape
    return LowRank(torch.randn(r, k), torch.randn(n, r), scaling, NO_DROPOUT)


def step(weight=W, low=None, m=48, needs=(True, True, True, True), **given):
    """Compute forward and backward, and return all tensors that go in or come out, by names."""
    (n, k), low = weight.shape, low_rank(weight=weight) if low is None else low
    x = given.get("x", torch.randn(m, k).bfloat16())
    dy = given.get("dy", torch.randn(m, n).bfloat16())
    y, t = lora_linear(x, weight, low, None, needs[3])
    x_kept = x if needs[2] else None
    dx, dbias, dA, dB = lora_linear_backward(dy, x_kept, t, weight, low, needs)
    names = {"x": x, "dy": dy, "t": t, "A": low.lora_A, "B": low.lora_B, "dbias": dbias}
    names |= {"dA": dA, "dB": dB, "packed": weight.packed, "absmax": weight.absmax}
    return names, (y, dx)


def handed_on(driver, **given) -> list[list[object]]:
    """Return what a step's launches are given, with names for where its tensors lie."""
    driver.kept = []
    names, _ = step(**given)
    where = {tensor.data_ptr(): name for name, tensor in names.items() if tensor is not None}
    return [
        [*launch[:3], *(where.get(a.data_ptr() if hasattr(a, "data_ptr") else a, a) for a in rest)]
        for launch in driver.kept
        for rest in [launch[9:]]
    ]


def long_ways(monkeypatch) -> list[object]:
    """Return a list that grows with each sequence that is not repeated."""
    taken, record = [], sequence.recorded
    monkeypatch.setattr(sequence, "recorded", lambda long: taken.append(long) or record(long))
    return taken


def named(launches) -> list[list[object]]:
    """Return launches with what lies in new memory, not to be compared, named so."""
    return [["" if isinstance(a, int) and a > 2**32 else a for a in one] for one in launches]


@pytest.mark.parametrize("r", [8, 16, 48])
@pytest.mark.parametrize(
    "needs",
    [(True, False, True, True), (True, True, True, True), (True, True, False, True)]
    + [(True, False, True, False), (True, False, False, False)],
)
def test_a_repeated_step_hands_on_what_the_long_way_does(needs, r, driver, monkeypatch) -> None:
    low = low_rank(r)
    if r > 16:  # of which kernels read copies in 16 bits, new ones each time
        low = LowRank(low.lora_A.bfloat16(), low.lora_B.bfloat16(), low.scaling, NO_DROPOUT)
    step(low=low, needs=needs)  # compiles
    sequence._known.clear()
    taken = long_ways(monkeypatch)
    first = handed_on(driver, low=low, needs=needs)
    alone = needs[2] and not needs[3]  # u alone the library computes: no backward to repeat
    ways = 1 if alone else 2
    assert len(taken) == ways
    for _ in range(2):
        assert named(handed_on(driver, low=low, needs=needs)) == named(first)
    assert len(taken) == ways
    read = {name for launch in first for name in launch if isinstance(name, str)}
    wanted = {"A", "B", "packed", "absmax"} | ({"dA", "x"} if needs[2] else set())
    assert wanted <= read and ({"t", "dB"} <= read) == needs[3]


def test_layers_of_one_shape_share_what_is_known(driver, monkeypatch) -> None:
    taken = long_ways(monkeypatch)
    step()
    names = handed_on(driver, weight=OTHER)
    assert len(taken) == 2
    assert any("packed" in launch for launch in names)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rows", {"m": 49}),
        ("rank", {"low": low_rank(4)}),
        ("scaling", {"low": low_rank(scaling=0.3)}),
        ("lora_A", {"low": low_rank()._replace(lora_A=torch.randn(8, 256).bfloat16())}),
        ("lora_B", {"low": low_rank()._replace(lora_B=torch.randn(32, 8).bfloat16())}),
        ("dtype", {"x": torch.randn(48, 256).half(), "dy": torch.randn(48, 32).half()}),
        ("shape", {"weight": SMALL}),
        ("needs", {"needs": (True, False, False, False)}),
        ("block_size", {"weight": BLOCKS_OF_128}),
        ("double_quant", {"weight": FP32_SCALES}),
    ],
)
def test_another_form_is_not_taken_for_a_known_one(name, given, driver, monkeypatch) -> None:
    step()
    taken = long_ways(monkeypatch)
    step(**given)
    assert len(taken) == 2
    step(**given)
    step()
    assert len(taken) == 2


def test_what_is_unusual_goes_the_long_way(driver, monkeypatch) -> None:
    step()
    taken = long_ways(monkeypatch)
    shifted = torch.randn(48 * 256 + 1).bfloat16()[1:].view(48, 256)
    before = driver.launches
    step(x=shifted)  # not at a multiple of 16 bytes
    assert driver.launches - before == 7 and not taken
    with monkeypatch.context() as patch:
        patch.setattr(sequence.streams, "current_stream", lambda device: 7)
        held = len(sequence._known)
        step(m=50)  # on a stream whose scratch memory is not shared
        assert len(sequence._known) == held and not taken
        patch.setattr(_launch._HOOKS, "launch_enter_hook", lambda metadata: None)
        step()
    with monkeypatch.context() as patch:
        patch.setattr(_launch._HOOKS, "launch_enter_hook", lambda metadata: None)
        before = driver.launches
        step()
        assert driver.launches - before == 7
    assert not taken

    @torch.no_grad()
    def beside():
        with always("dequantize"):
            step()

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert len(taken) == 2  # scratch memory of its own


def test_operands_that_lie_at_one_place_are_not_kept(driver, monkeypatch) -> None:
    step(weight=SQUARE)
    sequence._known.clear()
    taken, x = long_ways(monkeypatch), torch.randn(48, 256).bfloat16()
    for _ in range(2):
        step(weight=SQUARE, x=x, dy=x)
    assert len(taken) == 3  # the backward twice, the forward once
    for _ in range(2):
        step(weight=SQUARE)
    assert len(taken) == 4


def test_no_rows_are_no_launches_to_repeat(driver) -> None:
    for _ in range(2):
        names, (y, dx) = step(m=0, needs=(True, True, True, True))
        assert y.shape == (0, 32) and dx.shape == (0, 256)
        for gradient in ("dA", "dB", "dbias"):
            assert not names[gradient].any()


def test_ranks_of_several_passes_are_computed_each_time(driver, monkeypatch) -> None:
    step(low=low_rank(80))
    sequence._known.clear()
    taken = long_ways(monkeypatch)
    for _ in range(2):
        names, _ = step(low=low_rank(80))
        assert names["dA"].shape == (80, 256) and names["dB"].shape == (32, 80)
    assert len(taken) == 1  # forward once; a backward of several passes is not asked for


def test_scratch_memory_is_held_no_longer_than_it_is_used(driver) -> None:
    step()
    step()
    held = [weakref.ref(buffer) for buffer in scratch._buffers.values()]
    assert held and sequence._known
    nf4.release_scratch()
    assert not sequence._known and [buffer() for buffer in held] == [None] * len(held)
    step()
    small = [weakref.ref(buffer) for buffer in scratch._buffers.values()]
    step(weight=BIG)
    sequence._known.clear()  # that of this very step, whose memory grew within it
    assert None in [buffer() for buffer in small]


def test_few_sequences_are_kept_of_ever_new_lengths(driver, monkeypatch) -> None:
    monkeypatch.setattr(sequence, "MOST", 4)
    for m in range(1, 12):
        step(m=m)
    assert 0 < len(sequence._known) <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("r", [8, 16, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_repeated_steps_compute_what_the_long_way_does(bias, r, monkeypatch) -> None:
    q = nf4.quantize(torch.randn(96, 512, device="cuda").bfloat16())
    layer = nf4.QLoRALinear.from_weight(q, torch.randn(96, device="cuda") if bias else None, r=r)
    torch.nn.init.normal_(layer.lora_B)
    xs = [torch.randn(700, 512, device="cuda").bfloat16() for _ in range(3)]
    dys = [torch.randn(700, 96, device="cuda").bfloat16() for _ in range(3)]

    def steps():
        found = []
        for x, dy in zip(xs, dys, strict=True):
            leaves = [x.detach().requires_grad_(), layer.lora_A, layer.lora_B]
            y = layer(leaves[0])
            found += [y, *torch.autograd.grad(y, leaves, dy)]
        return found

    with always("dequantize"):
        steps()
        repeated = steps()
        monkeypatch.setattr(sequence, "recorded", lambda long: (long(), None))
        sequence._known.clear()
        for ours, right in zip(repeated, steps(), strict=True):
            assert torch.equal(ours, right)
