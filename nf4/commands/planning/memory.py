"""Bytes of each GPU: what is held, and what a step needs beside it.

What layers save for the backward pass is told per operation of transformers' Llama on nf4's layers,
as autograd saves it (tests/distributed/test_planned.py counts it):

- A norm saves its input in fp32 and a reciprocal root: 4 h + 4 bytes a token. The first one of a
  model saves nothing, as embeddings are frozen; the one after the last layer does.
- An adapted product saves its input and x A^T, r elements; q, k and v share an input, gate and up
  too. The 4-bit weight, as every parameter, is no new memory.
- Rotation saves its tables of cosines and sines, once for all layers.
- sdpa saves queries, keys, values, and 4 bytes a head for the sum of each softmax; its output is
  the input of o. eager saves keys and values repeated for each head of queries, and the scores in
  fp32, and again where they are rounded to a shorter dtype.
- SiLU and its product save gate, SiLU(gate) and up; their product is the input of down.
- The loss saves the logarithms of softmax in fp32.
"""

from dataclasses import dataclass

from nf4.commands.planning.formulas import Sheet
from nf4.commands.planning.job import ABSMAX_BLOCK_SIZE, Job

# Bytes of an optimizer's state for each trained element; bitsandbytes' has two 8-bit moments with
# a scale for 256 each, and tensors below 4096 elements, which it keeps in fp32, are not told apart
_STATES = {"adamw": "8", "adamw8bit": "(2 + 2 * 4 / 256)", "sgd": "0"}


@dataclass(frozen=True)
class Row:
    """A figure of a plan in bytes.

    Attributes:
        name: what it is of.
        bytes: how many, of one GPU.
        formula: what they are computed by.
        counted: whether they are part of the sum; not what there is at another moment only.
        note: what there is to know of it.
    """

    name: str
    bytes: float
    formula: str
    counted: bool = True
    note: str = ""


def memory_rows(job: Job, sheet: Sheet) -> list[Row]:
    """Return what a GPU holds at the moment of a step when it holds most."""
    return [*_held(job, sheet), *_moved(job, sheet), *_activations(job, sheet), *_rest(job, sheet)]


def _held(job: Job, sheet: Sheet) -> list[Row]:
    """Return what is there all the time."""
    note = ""
    if job.double_quant and job.method != "ddp" and job.gpus > 1:
        note = "those of scales are copied to every GPU"
        if job.method == "tp":
            note += ", and parts that share them have scales in fp32 too"
    return [
        _row(sheet, "weights in 4 bits", "L * W_own / 2"),
        _row(sheet, "scales", f"L * {_scales(job)}", note=note),
        _row(sheet, "dense weights", "e * (L * D_own + E_own)"),
        _row(sheet, "adapters", "4 * L * A_own", note="fp32"),
        _row(sheet, "gradients", "4 * L * A_own", note="fp32, of adapters"),
        _row(sheet, "optimizer", f"{_STATES[job.optimizer]} * L * A_own", note=job.optimizer),
    ]


def _scales(job: Job) -> str:
    if not job.double_quant:
        return "4 * W_own / c"
    if job.method == "tp" and job.gpus > 1:
        kept = f"4 * (W + W_own - W_wide) / ({ABSMAX_BLOCK_SIZE} * c)"
        return f"((W_own + 4 * W_wide) / c + {kept})"
    copied = "W" if job.method == "fsdp" else "W_own"
    return f"(W_own / c + 4 * {copied} / ({ABSMAX_BLOCK_SIZE} * c))"


def layer_shard(job: Job) -> str:
    """Return the formula of a GPU's share of a layer, of what fsdp gathers."""
    scales = "W_own / c" if job.double_quant else "4 * W_own / c"
    return f"(W_own / 2 + {scales} + 4 * A_own + e * D_own)"


def _moved(job: Job, sheet: Sheet) -> list[Row]:
    """Return the buffers of what GPUs tell each other."""
    if job.gpus == 1:
        return []
    if job.method == "ddp":
        note = "DistributedDataParallel's buckets, without gradient_as_bucket_view"
        return [_row(sheet, "buckets of gradients", "4 * L * A", note=note)]
    if job.method == "tp":
        return []
    sheet.define("shard", layer_shard(job), "bytes of a layer's share that fsdp gathers")
    return [
        _row(
            sheet,
            "gathered layers",
            "T * (e * E_own + 2 * shard)",
            note="what is outside of layers, a layer, and the next one ahead",
        ),
        _row(
            sheet,
            "gradients to scatter",
            "2 * 4 * T * A_own",
            note="of a layer whole, and flat",
        ),
    ]


def _activations(job: Job, sheet: Sheet) -> list[Row]:
    """Return what is saved for the backward pass, and what that needs beside it."""
    _define_saved(job, sheet)
    # The pass through a layer holds most as it enters the second half, gradients of two products
    # there, or, where scores are held, in the softmax: its gradient and that of its input
    sheet.define("back", "M * e * (2 * i + h)", "bytes of gradients in a layer's second half")
    beside = "back"
    if job.attention == "eager":
        beside = "max(back, B * H * S * S * (8 - p) - mlp)"
    # A caller that keeps the model's output keeps logits until the end
    again = "layer + " if job.checkpointing else ""
    moments = (
        ("loss", "(e + 12) * M * V", "logits, their softmax, two gradients"),
        ("a layer's backward", f"e * M * V + {again}{beside}", "logits, and what is computed"),
    )
    larger = max(moments, key=lambda moment: sheet.value(moment[1]))
    rows = [
        _row(
            sheet, "activations", "L * layer + tables", not job.checkpointing, "all that is saved"
        ),
        _row(
            sheet,
            "activations",
            "L * M * e * h + norm + tables",
            job.checkpointing,
            "with checkpointing: inputs of layers",
        ),
    ]
    for moment in moments:
        name, formula, note = moment
        counted = moment is larger
        note = note if counted else "not at the moment of the larger one"
        rows.append(_row(sheet, name, formula, counted, note))
    return rows


def _define_saved(job: Job, sheet: Sheet) -> None:
    """Define the bytes that a layer saves."""
    define = sheet.define
    define("norm", "M * (4 * h + 4)", "bytes that a norm saves")
    define("tables", "2 * S * d * e", "bytes of the tables of rotation")
    inner = "M * (e * (h + 2 * q + 2 * k + 4 * r) + 4 * H)"
    if job.attention == "eager":
        sheet.give("p", 0 if job.dtype == "fp32" else sheet.value("e"), "bytes of a rounded score")
        define("scores", "B * H * S * S * (4 + p)", "bytes of scores that attention saves")
        inner = "M * e * (h + 4 * q + 4 * r) + scores"
    heads = "M * (4 * (q + k) + 4 * (H + G)) + " if job.sizes.qk_norm else ""
    define("attention", f"norm + {heads}{inner}", "bytes that a layer's first half saves")
    define("mlp", "norm + M * e * (h + 4 * i + 3 * r)", "bytes that a layer's second half saves")
    define("layer", "attention + mlp", "bytes that a layer saves")


def _rest(job: Job, sheet: Sheet) -> list[Row]:
    sheet.give("reserve", job.reserve, "bytes left to CUDA, NCCL and gaps: assumed")
    return [
        _row(sheet, "scratch", "e * W_max", note="the largest matrix written out dense"),
        _row(sheet, "reserve", "reserve", note="CUDA, NCCL, gaps: assumed, not computed"),
    ]


def _row(sheet: Sheet, name: str, formula: str, counted: bool = True, note: str = "") -> Row:
    return Row(name, sheet.value(formula), formula, counted, note)
