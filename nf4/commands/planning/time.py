"""A modelled step: bytes between GPUs, and seconds by bandwidths and throughput. Never measured."""

from dataclasses import dataclass

from nf4.commands.planning.formulas import Sheet
from nf4.commands.planning.job import Job
from nf4.commands.planning.memory import Row

# Without tensor cores, which do not take fp32: an H100's 67 TFLOP/s by its 989, an A100's 19.5 by
# its 312
_FP32_SHARE = 1 / 16
_STATES = {"adamw": 8, "adamw8bit": 2, "sgd": 0}


@dataclass(frozen=True)
class Seconds:
    """A modelled time.

    Attributes:
        name: what it is of.
        seconds: how many, in a step.
        formula: what they are computed by.
        note: what there is to know of it.
    """

    name: str
    seconds: float
    formula: str
    note: str = ""


def traffic_rows(job: Job, sheet: Sheet) -> list[Row]:
    """Return the bytes that a GPU sends to others in a step, by rings, where it receives as many.

    A ring gathers or scatters the parts of T GPUs by sending T - 1 of them, and sums by both.
    """
    if job.gpus == 1:
        return []
    if job.method == "ddp":
        return [_sent(sheet, "sum of gradients", "2 * (T - 1) / T * 4 * L * A")]
    if job.method == "fsdp":
        return [
            _sent(sheet, "layers", "2 * (T - 1) * L * shard", "forward, and again backward"),
            _sent(sheet, "outside of layers", "(T - 1) * e * E_own", "once"),
            _sent(sheet, "gradients", "(T - 1) * 4 * L * A_own"),
        ]
    # A layer computed again stops before down is summed: nothing after that is saved
    sums = 5 if job.checkpointing else 4
    note = "after o and down, and the gradients of what q, k, v and gate, up read"
    note += "; after o again" * job.checkpointing
    return [
        _sent(sheet, "sums of outputs", f"{sums} * L * 2 * (T - 1) / T * e * M * h", note),
        _sent(sheet, "copied adapters", "2 * (T - 1) / T * 4 * L * A_copy", "their gradients"),
    ]


def _sent(sheet: Sheet, name: str, formula: str, note: str = "") -> Row:
    return Row(name, sheet.value(formula), formula, note=note)


def time_rows(job: Job, sheet: Sheet, sent: float) -> list[Seconds]:
    """Return the modelled seconds of a step, its sum last.

    Args:
        job: what is planned.
        sheet: of its names, those of memory too.
        sent: bytes that a GPU sends.
    """
    fp32 = job.dtype == "fp32"
    flops = job.device.flops * (_FP32_SHARE if fp32 else 1)
    name = job.device.name
    sheet.give("F", flops, f"modelled flop/s of products in {job.dtype} on a {name}")
    sheet.give("Q", job.device.bandwidth, f"modelled bytes/s of the memory of a {name}")
    sheet.give("X", job.link, "bytes/s that a GPU sends to others: assumed")
    sheet.give("sent", sent, "bytes that a GPU sends in a step")
    sheet.give("state", _STATES[job.optimizer], "bytes of an optimizer's state for an element")
    passes = 3 if job.checkpointing else 2  # forward, backward, forward again
    half = 1 if job.attention == "sdpa" else 2  # flops of scores: those to come are left out
    rows = [
        _time(sheet, "products", f"2 * M * (2 * V * h + {passes} * L * W_use) / F"),
        _time(sheet, "attention", f"{(passes + 1) * half} * 2 * M * S * q * L / F"),
        _time(sheet, "adapters", f"{passes + 1} * 2 * M * L * A_use / F"),
        _time(sheet, "weights made dense", f"{passes} * L * W_use * (0.5 + 1 / c + e) / Q"),
        _time(
            sheet,
            "activations",
            f"{passes * 2} * L * layer / Q",
            "what is saved, written and read once each way",
        ),
        _time(sheet, "loss", "2 * (e + 12) * M * V / Q"),
        _time(sheet, "optimizer", "2 * (8 + state) * L * A_own / Q"),
    ]
    sheet.give("busy", sum(row.seconds for row in rows), "modelled seconds of a GPU's own work")
    rows.append(_time(sheet, "between GPUs", "sent / X"))
    if job.method == "tp":
        return [*rows, _time(sheet, "step", "busy + sent / X", "nothing overlaps")]
    return [*rows, _time(sheet, "step", "max(busy, sent / X)", "all that is sent overlaps")]


def _time(sheet: Sheet, name: str, formula: str, note: str = "") -> Seconds:
    return Seconds(name, sheet.value(formula), formula, note)
