"""The names that formulas of a plan are of: sizes, and what each GPU has of them."""

from nf4.commands.planning.formulas import Sheet
from nf4.commands.planning.job import ABSMAX_BLOCK_SIZE, DTYPES, Job

ROW_WISE = ("o", "down")  # under tp split by inputs; the others by outputs


def sheet_of(job: Job) -> Sheet:
    """Return the names of a job's formulas, with their values."""
    sheet, s = Sheet(), job.sizes
    parts = job.gpus if job.method == "tp" else 1
    part = f" on one GPU, 1/{parts} of the model's" if parts > 1 else ""
    for name, value, meaning in (
        ("T", job.gpus, "GPUs"),
        ("L", s.layers, "layers"),
        ("B", job.batch, "sequences of a step that a GPU computes"),
        ("S", job.length, "tokens of a sequence"),
        ("h", s.hidden, "hidden size"),
        ("i", s.intermediate / parts, f"intermediate size{part}"),
        ("q", s.heads * s.head_dim / parts, f"size of a token's queries{part}"),
        ("k", s.kv_heads * s.head_dim / parts, f"size of a token's keys{part}"),
        ("H", s.heads / parts, f"heads of queries{part}"),
        ("G", s.kv_heads / parts, f"heads of keys{part}"),
        ("d", s.head_dim, "size of a head"),
        ("V", s.vocabulary, "tokens of the vocabulary"),
        ("r", job.rank, "rank of the adapters"),
        ("e", DTYPES[job.dtype], f"bytes of an element in {job.dtype}"),
        ("c", job.block_size, "weights that share a scale"),
    ):
        sheet.give(name, value, meaning)
    sheet.define("M", "B * S", "tokens of a step that a GPU computes")
    _give_weights(sheet, job, parts)
    _give_adapters(sheet, job, parts)
    _give_dense(sheet, job)
    return sheet


def _shards(job: Job) -> int:
    return job.gpus if job.method == "fsdp" else 1


def _give_weights(sheet: Sheet, job: Job, parts: int) -> None:
    shapes, shards = job.sizes.linears.values(), _shards(job)
    sheet.give("W", sum(n * k for n, k in shapes), "weights in 4 bits of a layer")
    used = sheet.value("W") / parts
    held = sum(-(-n // shards) * k for n, k in shapes) if shards > 1 else used
    up = "; rows rounded up" if shards > 1 else ""
    sheet.give("W_own", held, f"of W what a GPU holds{up}")
    sheet.give("W_use", used, "of W what a GPU multiplies by")
    if parts > 1 and job.double_quant:
        wide = (n * k for name, (n, k) in job.sizes.linears.items() if _is_wide(job, name))
        sheet.give("W_wide", sum(wide) / parts, "of W_own what has its scales in fp32 too")
    largest = max(n * k for n, k in shapes) / parts
    sheet.give("W_max", largest, "of the largest matrix what a GPU multiplies by")


def _is_wide(job: Job, name: str) -> bool:
    """Return whether a part of a weight shares scales of scales with other parts."""
    n, k = job.sizes.linears[name]
    blocks = -(-n // job.gpus) * (k // job.block_size)
    return name in ROW_WISE or blocks % ABSMAX_BLOCK_SIZE != 0


def _give_adapters(sheet: Sheet, job: Job, parts: int) -> None:
    shapes, shards, r = job.sizes.linears, _shards(job), job.rank
    whole = sum(r * (n + k) for n, k in shapes.values())
    # Of a column-wise layer tp copies lora_A and splits lora_B, of a row-wise one the other way
    copied = sum(r * (n if name in ROW_WISE else k) for name, (n, k) in shapes.items())
    used = copied + (whole - copied) / parts
    sheet.give("A", whole, "elements of the adapters of a layer")
    sheet.give("A_use", used, "of A what a GPU computes with")
    if parts > 1:
        sheet.give("A_copy", copied, "of A what every GPU has a copy of")
    if shards > 1:
        used = sum(-(-r // shards) * k + -(-n // shards) * r for n, k in shapes.values())
    up = "; rows rounded up" if shards > 1 else ""
    sheet.give("A_own", used, f"of A what a GPU trains{up}")


def _give_dense(sheet: Sheet, job: Job) -> None:
    s, shards = job.sizes, _shards(job)
    sheet.give("D", sum(s.vectors), "dense elements of a layer: norms and biases")
    sheet.give("D_own", sum(-(-n // shards) for n in s.vectors), "of D what a GPU holds")
    outside = s.tables * s.vocabulary * s.hidden + s.hidden
    sheet.give("E", outside, "dense elements outside of layers: embeddings, output layer, norm")
    rows, width = -(-s.vocabulary // shards), -(-s.hidden // shards)
    sheet.give("E_own", s.tables * rows * s.hidden + width, "of E what a GPU holds")
