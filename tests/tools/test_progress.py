"""Bars on terminals of several widths: one line each, none wider than the terminal."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from nf4.tools import progress

LONG = "Perplexity, NF4, block 4096, least squares, double quantization, weighted by activations"
UP_TWICE = "\x1b[1A\x1b[2K\x1b[1A"  # to draw more than one line again
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def terminal(monkeypatch):
    """Let bars draw on a terminal of a width, and return what is drawn."""

    def make(width: int) -> io.StringIO:
        drawn = io.StringIO()
        monkeypatch.setattr(
            progress,
            "Console",
            lambda stderr: Console(file=drawn, force_terminal=True, width=width, color_system=None),
        )
        return drawn

    return make


def frames(drawn: io.StringIO) -> list[str]:
    """Return the lines that were drawn, without colours; one that is drawn again is one more."""
    return [line for line in re.split(r"[\r\n]", ESCAPE.sub("", drawn.getvalue())) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize(
    ("title", "total", "remark"),
    [
        ("Quantize", 7, ""),
        ("Measure layers", 210, "model.layers.29.self_attn.q_proj"),
        (LONG, 12345, "loss 3.123, 1234 tokens/s, and what else there is to say of a step"),
    ],
    ids=["short", "layers", "long"],
)
def test_a_bar_fits_the_terminal_in_one_line(width, title, total, remark, terminal) -> None:
    drawn = terminal(width)
    with progress.progress_bar(title, total) as bar:
        for _ in range(total):
            bar.step(remark)
    lines = frames(drawn)
    assert max(map(cell_len, lines)) <= width
    assert UP_TWICE not in drawn.getvalue()
    last = lines[-1]
    assert f"{total}/{total}" in last and re.search(r"\d:\d\d:\d\d", last) and "━━━━" in last
    assert last.startswith(title[: width // 4]) and remark[:8] in last


@pytest.mark.parametrize("width", [60, 80])
def test_a_spinner_fits_the_terminal_in_one_line(width, terminal) -> None:
    drawn = terminal(width)
    with progress.progress_bar(LONG, 1) as bar:
        bar.step()
    lines = frames(drawn)
    assert LONG[:40] in lines[0] and max(map(cell_len, lines)) <= width
    assert UP_TWICE not in drawn.getvalue()


def test_a_title_is_shown_as_it_is(terminal) -> None:
    drawn = terminal(80)
    with progress.progress_bar("a [bold]{x}", 2) as bar:
        bar.step("[red]{y}")
        bar.step("[red]{y}")
    assert "a [bold]{x}" in frames(drawn)[-1] and "[red]{y}" in frames(drawn)[-1]
