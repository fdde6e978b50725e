"""Load models and texts that installed packages carry, or files: never the network."""

import bz2
import html
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from nf4.tools.sources import WIKIPEDIA, WINDOW, check_text, model_path
from nf4.tools.sources import packaged_file as packaged_file

WINDOWS = 8
HELD_OUT_WINDOWS = 4


def load_model(source: str | None) -> tuple[nn.Module, Any]:
    """Load a causal language model in fp32, and its tokenizer.

    Args:
        source: a ``.gguf`` file, a transformers folder, or a name of `nf4.tools.sources.MODELS`;
            SmolLM2-135M from its package if None.

    Raises:
        FileNotFoundError: source is not there.
        ValueError: source is no model that transformers can load.
    """
    path = model_path("smollm2" if source is None else source)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _no_bars():
            if path.is_dir():
                tokenizer = AutoTokenizer.from_pretrained(path)
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            else:
                folder, name = str(path.parent), path.name
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
                config = GgufConfig(dequantize=True)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, gguf_file=name, dtype=torch.float32, quantization_config=config
                )
    except Exception as error:  # transformers raises many kinds for files it cannot read
        reason = " ".join(str(error).split())
        raise ValueError(f"model: expected a causal language model, {path}: {reason}") from error
    return model.eval(), tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep tqdm's bars off the screen, which has others; tqdm reads its environment too early."""
    from tqdm import tqdm

    init = tqdm.__init__
    tqdm.__init__ = partialmethod(init, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = init


def wikipedia_windows(tokenizer: Any, count: int = WINDOWS) -> Tensor:
    """Return the beginnings of Wikipedia articles from gensim's test data.

    Articles shorter than a window are left out; of the others these are the fifth and the next.

    Args:
        tokenizer: of the model.
        count: how many windows, at most; there are some fifty.

    Returns:
        int64 ``[count, 512]``, a window an article.
    """
    articles = _articles(packaged_file(*WIKIPEDIA))
    windows = (tokenizer(text[: 8 * WINDOW]).input_ids[:WINDOW] for text in articles)
    whole = (tokens for tokens in windows if len(tokens) == WINDOW)
    return torch.tensor(list(islice(whole, 4, 4 + count)))


def text_windows(tokenizer: Any, source: str | Path, count: int) -> Tensor:
    """Return the beginning of a text in windows.

    Args:
        tokenizer: of the model.
        source: a UTF-8 file.
        count: how many windows, at most.

    Returns:
        int64 ``[count, 512]``; fewer if the text is shorter.

    Raises:
        FileNotFoundError: source is not there.
        ValueError: source is no UTF-8 text, or shorter than a window.
    """
    text = _read_text(source)
    tokens = torch.tensor(tokenizer(text[: 16 * WINDOW * count], verbose=False).input_ids)
    if len(tokens) < WINDOW:
        raise ValueError(f"text: expected at least {WINDOW} tokens, got {len(tokens)} in {source}")
    whole = min(len(tokens) // WINDOW, count) * WINDOW
    return tokens[:whole].view(-1, WINDOW)


def _read_text(source: str | Path) -> str:
    path = check_text(source)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected a UTF-8 text file, {path}: {error}") from error


def training_tokens(tokenizer: Any, source: str | None) -> tuple[Tensor, Tensor]:
    """Return the tokens to train on, and windows of a text that is held out.

    Args:
        tokenizer: of the model.
        source: a UTF-8 text file, whose last tenth is held out; if None, Shakespeare in the
            spelling of the First Folio (1623): Othello to train on, Macbeth held out.

    Returns:
        int64 ``[n]`` and int64 ``[windows, 512]``.

    Raises:
        FileNotFoundError: source is not there.
        ValueError: source is no UTF-8 text, or too short.
    """
    if source is None:
        play = files("nf4.commands.demo").joinpath
        texts = [play(f"{name}.txt").read_text(encoding="utf-8") for name in ("othello", "macbeth")]
    else:
        text = _read_text(source)
        cut = len(text) * 9 // 10
        texts = [text[:cut], text[cut:]]
    train, held_out = (torch.tensor(tokenizer(t, verbose=False).input_ids) for t in texts)
    if len(train) < 2 * WINDOW or len(held_out) < WINDOW:
        raise ValueError(
            f"text: expected at least {2 * WINDOW} tokens to train on and {WINDOW} to hold out, "
            f"got {len(train)} and {len(held_out)}"
        )
    whole = min(len(held_out) // WINDOW, HELD_OUT_WINDOWS) * WINDOW
    return train, held_out[:whole].view(-1, WINDOW)


def _articles(dump: Path) -> Iterator[str]:
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}text"):
                text = element.text or ""
                if not text.lower().startswith("#redirect"):
                    yield plain_text(text)
                element.clear()


def plain_text(wiki: str) -> str:
    """Return the prose of a page of wiki markup, without headings, lists and tables."""
    text = re.sub(r"<!--.*?-->", "", wiki, flags=re.S)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>", "", text, flags=re.S)
    text = _innermost(r"\{\{[^{}]*\}\}", text)
    text = _innermost(r"\{\|[^{}]*?\|\}", text)
    text = _innermost(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+\s?([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"'{2,}|<[^>]+>", "", text))
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line and line[0] not in "=*#:;|!")


def _innermost(pattern: str, text: str) -> str:
    """Remove what matches until nothing does: nested markup goes from the inside out."""
    found = 1
    while found:
        text, found = re.subn(pattern, "", text, flags=re.S)
    return text
