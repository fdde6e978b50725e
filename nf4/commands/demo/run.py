"""The demo from end to end. It computes; `nf4.commands.demo.report` prints."""

import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nf4.commands.demo import plots
from nf4.error.measured import LayerError, model_error, perplexity
from nf4.files.checkpoint import save_adapter
from nf4.files.loading import load_adapter
from nf4.layers.module import QuantizedModule
from nf4.models.kinds.lora import add_lora
from nf4.models.merge import merge
from nf4.models.quantize import quantize_model, quantized_layers
from nf4.tools import samples
from nf4.tools.paths import check_new, new_folder
from nf4.tools.progress import Progress, steps
from nf4.tools.sources import check_packages
from nf4.tools.training import batches, race, train

R, LORA_ALPHA, LEARNING_RATE = 8, 16, 2e-3
RACE_ROUNDS = 5
NEW_TOKENS = 60


@dataclass
class KindError:
    """Relative error over the layers of one kind."""

    kind: str
    layers: int
    mean: float
    largest: float


@dataclass
class DemoResult:
    """What the demo measured. Times in seconds, sizes in bytes, perplexities per token."""

    model: str
    seed: int
    steps: int
    parameters: int = 0
    quantized_parameters: int = 0
    layers: int = 0
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    linear_bytes_before: int = 0
    linear_bytes_after: int = 0
    bits_per_weight: float = 0.0
    quantize_seconds: float = 0.0
    error_by_kind: list[KindError] = field(default_factory=list)
    perplexity_tokens: int = 0
    perplexity_fp32: float = 0.0
    perplexity_nf4: float = 0.0
    step_seconds_fp32: float = 0.0
    step_seconds_nf4: float = 0.0
    step_ratio: float = 0.0
    trainable_parameters: int = 0
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    held_out_fp32: float = 0.0
    held_out_nf4: float = 0.0
    held_out_tuned: float = 0.0
    reloaded_logits_equal: bool = False
    merged_logits_difference: float = 0.0
    prompt: str = ""
    generated: str = ""
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and of all its scales, shared ones once."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    scales = (buffer for layer in layers for buffer in layer.buffers(recurse=False))
    return sum(tensor.nbytes for tensor in {*model.parameters(), *scales})


def run_demo(
    steps: int,
    model: str | None,
    text: str | None,
    out: str | Path,
    seed: int,
    progress: Progress,
) -> DemoResult:
    """Quantize, measure, fine-tune, save, reload and merge a real model.

    Args:
        steps: steps of fine-tuning, at least 1.
        model: a ``.gguf`` file or a transformers folder; SmolLM2-135M from its package if None.
        text: a UTF-8 text to train on; Shakespeare if None.
        out: folder to make; it appears when the demo is through.
        seed: of the adapters, the batches and the generation.
        progress: makes a context manager around a `Bar` from a title and a number of steps.

    Raises:
        FileExistsError: out exists.
        FileNotFoundError: model or text is missing.
        ModuleNotFoundError: a package of the extra demo is missing.
        ValueError: steps is below 1, or model or text cannot be used.
    """
    begin = time.perf_counter()
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    out = check_new(out, "out")
    check_packages(model)
    torch.manual_seed(seed)
    with progress("Load the model", 1) as bar:
        dense, tokenizer = samples.load_model(model)
        tokens, held_out = samples.training_tokens(tokenizer, text)
        wiki = samples.wikipedia_windows(tokenizer)
        bar.step()
    result = DemoResult(model or "SmolLM2-135M-Instruct", seed, steps)
    with new_folder(out) as folder:
        rows, quantized = _quantize(dense, result, progress)
        result.perplexity_tokens = wiki.numel()
        for name, m, windows in (
            ("perplexity_fp32", dense, wiki),
            ("perplexity_nf4", quantized, wiki),
            ("held_out_fp32", dense, held_out),
            ("held_out_nf4", quantized, held_out),
        ):
            setattr(result, name, _perplexity(name, m, windows, progress))
        _race(dense, quantized, tokens, result, progress)
        _train(quantized, batches(tokens, steps, seed), result, progress)
        result.held_out_tuned = _perplexity("held_out_tuned", quantized, held_out, progress)
        save_adapter(quantized, folder / "adapter")
        _reload_and_merge(dense, quantized, folder / "adapter", held_out[:1, :64], result)
        _generate(quantized, tokenizer, held_out, result, progress)
        plots.plot_loss(result.losses, folder / "loss.png")
        plots.plot_error(rows, folder / "error.png")
        names = ("adapter", "loss.png", "error.png", "report.json")
        result.files = {name: str(out / name) for name in names}
        result.seconds = time.perf_counter() - begin
        report = json.dumps(asdict(result), indent=2) + "\n"
        (folder / "report.json").write_text(report, encoding="utf-8")
    return result


def _quantize(
    dense: nn.Module, result: DemoResult, progress: Progress
) -> tuple[list[LayerError], nn.Module]:
    with progress("Measure the error of each layer", 1) as bar:
        rows = model_error(dense)
        bar.step()
    for kind in dict.fromkeys(row.kind for row in rows):
        errors = [row.error.relative for row in rows if row.kind == kind]
        result.error_by_kind.append(
            KindError(kind, len(errors), sum(errors) / len(errors), max(errors))
        )
    result.parameters = sum(p.numel() for p in dense.parameters())
    result.model_bytes_before = model_bytes(dense)
    quantized = copy.deepcopy(dense)
    with steps(progress, "Quantize", len(rows)) as step:
        begin = time.perf_counter()
        quantize_model(quantized, progress=lambda done, total: step())
        result.quantize_seconds = time.perf_counter() - begin
    weights = [layer.weight for layer in quantized_layers(quantized).values()]
    result.layers = len(weights)
    result.quantized_parameters = sum(w.numel() for w in weights)
    result.linear_bytes_before = 4 * result.quantized_parameters
    result.linear_bytes_after = sum(w.nbytes for w in weights)
    result.bits_per_weight = 8 * result.linear_bytes_after / result.quantized_parameters
    result.model_bytes_after = model_bytes(quantized)
    return rows, quantized


def _perplexity(name: str, model: nn.Module, windows: torch.Tensor, progress: Progress) -> float:
    text, kind = name.rsplit("_", 1)
    title = f"Perplexity, {'Wikipedia' if text == 'perplexity' else 'held-out text'}, {kind}"
    with steps(progress, title, len(windows)) as step:
        return perplexity(model, windows, lambda done, total: step())


def _race(
    dense: nn.Module,
    quantized: nn.Module,
    tokens: torch.Tensor,
    result: DemoResult,
    progress: Progress,
) -> None:
    """Add the adapter, and time a step against PEFT's LoRA on the dense model."""
    with _quiet():
        from peft import LoraConfig, get_peft_model

    add_lora(quantized, r=R, lora_alpha=LORA_ALPHA)
    targets = list(quantized_layers(quantized))
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules=targets)
    with _quiet():
        lora = get_peft_model(dense, config)
    with steps(progress, "Race a step: fp32 + LoRA, NF4 + LoRA", 2 * (RACE_ROUNDS + 1)) as step:
        batch = batches(tokens, 1, 0)[0]
        seconds = race((quantized, lora), batch, RACE_ROUNDS, step)
    result.step_seconds_nf4, result.step_seconds_fp32 = seconds
    result.step_ratio = result.step_seconds_nf4 / result.step_seconds_fp32
    lora.unload()
    result.trainable_parameters = sum(p.numel() for p in quantized.parameters() if p.requires_grad)


def _train(
    quantized: nn.Module, steps: torch.Tensor, result: DemoResult, progress: Progress
) -> None:
    with progress(f"Fine-tune, QLoRA r = {R}", len(steps)) as bar:
        result.losses, result.tokens_per_second = train(
            quantized,
            steps,
            LEARNING_RATE,
            lambda loss, speed: bar.step(f"loss {loss:.3f}, {speed:.0f} tokens/s"),
        )


@torch.no_grad()
def _reload_and_merge(
    dense: nn.Module,
    quantized: nn.Module,
    adapter: Path,
    tokens: torch.Tensor,
    result: DemoResult,
) -> None:
    """Reload the adapter on a fresh quantized model; merge the tuned one, in place."""
    logits = quantized(tokens).logits
    fresh = quantize_model(dense)
    load_adapter(fresh, adapter)
    result.reloaded_logits_equal = torch.equal(fresh(tokens).logits, logits)
    merge(quantized)
    result.merged_logits_difference = (quantized(tokens).logits - logits).abs().max().item()


@torch.no_grad()
def _generate(
    merged: nn.Module,
    tokenizer: Any,
    held_out: torch.Tensor,
    result: DemoResult,
    progress: Progress,
) -> None:
    """Continue the beginning of the held-out text with the merged model, by sampling."""
    torch.manual_seed(result.seed)
    prompt = held_out[:1, :48]
    result.prompt = tokenizer.decode(prompt[0])
    with progress("Generate", 1) as bar:
        tokens = merged.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        bar.step()
    result.generated = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what peers warn of at import, about themselves, off the user's screen."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
