"""Tuning: the file that it writes, and that later choices follow it."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="nf4's kernels need Triton")

from nf4.commands.cli import main  # noqa: E402
from nf4.gpu import plan, tune  # noqa: E402
from nf4.kernels import _configs, _measured  # noqa: E402
from nf4.tools.caches import forget  # noqa: E402

CPU = torch.device("cpu")  # stands for an H200
SHAPE = (1024, 512)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keep figures in an empty folder."""
    monkeypatch.setattr(_measured, "FOLDER", tmp_path / "measured")
    forget()
    yield tmp_path / "measured"
    forget()


def slow_beyond(limit: int, favourite: int):
    """Return a clock on which the fused kernel wins up to a number of rows, with one split best."""

    def clock(function) -> float:
        if not hasattr(function, "args"):
            return 1.0  # the library
        config, x = function.args[1:3]
        seconds = 0.5 if x.shape[0] <= limit else 2.0
        return seconds if config.split_k == favourite else 1.1 * seconds

    return clock


def kernel_for(rows: int, shape: tuple[int, int]):
    form = (torch.bfloat16, "fragments", 64, True, CPU)
    return plan.chosen(plan.Asked("linear", rows, shape, *form))


def test_tune_writes_what_later_choices_follow(folder) -> None:
    n, k = SHAPE
    before = _configs.matmul_config(64, n, k, CPU), plan.fused_limit(n, k, 64, CPU)
    assert before[1][1] == "modelled"
    favourite = _configs.ranked("matmul", 64, n, k, CPU)[1].split_k
    path = tune.tune([SHAPE], CPU, clock=slow_beyond(64, favourite))
    assert path == folder / "H200.json"
    assert not [p for p in folder.iterdir() if p != path]
    found = json.loads(path.read_text())
    assert found["fused_limits"] == [[n, k, 64]]
    assert {row[0] for row in found["tiles"]} == {"matmul", "matmul_small"}
    assert plan.fused_limit(n, k, 64, CPU) == (64, f"measured on W {n}×{k}")
    assert kernel_for(64, SHAPE).how == "matmul_small"
    assert kernel_for(65, SHAPE).how == "dequantize"
    chosen = _configs.matmul_config(50, n, k, CPU)
    assert chosen.split_k == favourite
    assert chosen == next(
        c for c in _configs.ranked("matmul", 64, n, k, CPU) if c.split_k == favourite
    )
    # Other weights keep the model's tiles, and take the nearest limit.
    assert (
        _configs.matmul_config(64, n, 2 * k, CPU) == _configs.ranked("matmul", 64, n, 2 * k, CPU)[0]
    )


def test_plan_takes_the_limit_of_the_nearest_weight(folder) -> None:
    folder.mkdir()
    limits = [[4096, 4096, 300], [28672, 8192, 900]]
    (folder / "H200.json").write_text(json.dumps({"fused_limits": limits, "tiles": []}))
    chosen = [kernel_for(m, (5000, 4096)) for m in (300, 301)]
    assert [c.how for c in chosen] == ["matmul", "dequantize"]
    assert chosen[1].reason == "301 rows are more than 300, measured on W 4096×4096"


def test_tune_again_keeps_other_weights(folder) -> None:
    tune.tune([SHAPE, (64, 128)], CPU, clock=slow_beyond(32, 1))
    path = tune.tune([SHAPE], CPU, clock=slow_beyond(128, 1))
    assert json.loads(path.read_text())["fused_limits"] == [[64, 128, 32], [*SHAPE, 128]]


def test_tune_calls_what_it_times(folder, monkeypatch, emulate) -> None:
    monkeypatch.setattr(tune, "ROWS", (16, 32))

    def clock(function) -> float:
        assert function().shape[-1] == 64
        return 1.0

    tune.tune([(64, 64)], CPU, clock=clock)
    assert {"_matmul_small_kernel", "_matmul_kernel"} <= set(emulate.launches)


BAD = {
    "no_gpu": ([], "expected a GPU to measure on, found none"),
    "text": (["--shapes", "4096"], "shapes: expected NxK such as 4096x4096, got 4096"),
    "shape": (["--shapes", "24x64"], "shapes: expected N a multiple of 16 and K of 64, got 24x64"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_tune_refuses(arguments, message, folder, capsys) -> None:
    assert main(["bench", "--tune", *arguments]) == 2
    assert capsys.readouterr().err == f"nf4 bench: {message}\n"
    assert not folder.exists()


def test_tune_reports_and_prints_the_file(folder, monkeypatch, capsys) -> None:
    made = tune.tune
    monkeypatch.setattr(tune, "find_gpu", lambda: CPU)
    monkeypatch.setattr(tune, "tune", lambda *args: made(*args, slow_beyond(32, 1)))
    assert main(["bench", "--tune", "--shapes", "64x128", "128x128"]) == 0
    assert capsys.readouterr().out == f"{folder / 'H200.json'}\n"
    assert main(["bench", "--tune", "--shapes", "64x128", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["fused_limits"]) == 2
