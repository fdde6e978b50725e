"""The command ``nf4 plan``: parses arguments and prints, decides nothing."""

import argparse
import json
import sys
from typing import Any

DESCRIPTION = """\
Calculate, without a GPU and without the model's files, what QLoRA training takes on several GPUs:
memory of each, bytes between them, and a step time that is modelled, not measured. Every figure is
printed with the formula that it was computed by. Exit status 1 if it does not fit.

  nf4 plan --model llama-3-70b --gpus 8 --memory 80GB
  nf4 plan --model llama-3.1-405b --gpus 64 --memory 80GB --method fsdp --checkpointing
  nf4 plan --model MODEL --gpus 4 --memory 24GB --method tp     a transformers folder or its config
"""


def add_plan(commands: Any) -> None:
    """Add the command to the subcommands of a parser."""
    plan = commands.add_parser(
        "plan",
        help="calculate memory, traffic and a modelled step time on several GPUs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "--model",
        required=True,
        help="llama-3-70b, qwen2.5-7b, …; a transformers folder, or its config.json",
    )
    plan.add_argument("--gpus", type=int, default=1, help="how many (default: 1)")
    plan.add_argument(
        "--memory", default="80GB", help="of each GPU, such as 80GB or 79.6GiB (default: 80GB)"
    )
    plan.add_argument("--method", default="fsdp", help="fsdp, tp or ddp (default: fsdp)")
    plan.add_argument(
        "--batch",
        type=int,
        default=1,
        help="sequences in a step, of each GPU; under tp of all together (default: 1)",
    )
    plan.add_argument("--length", type=int, default=2048, help="tokens each (default: 2048)")
    plan.add_argument("--rank", type=int, default=16, help="r of the adapters (default: 16)")
    plan.add_argument(
        "--optimizer", default="adamw", help="adamw, adamw8bit or sgd (default: adamw)"
    )
    plan.add_argument(
        "--checkpointing", action="store_true", help="compute layers again in the backward pass"
    )
    plan.add_argument("--block-size", type=int, default=64, help="32 to 4096 (default: 64)")
    plan.add_argument("--no-double-quant", action="store_true", help="keep scales in fp32")
    plan.add_argument(
        "--dtype", default="bf16", help="bf16, fp16 or fp32, of products (default: bf16)"
    )
    plan.add_argument("--attention", default="sdpa", help="sdpa or eager (default: sdpa)")
    plan.add_argument(
        "--bandwidth",
        help="that a GPU sends with, such as 300GB/s or 400Gbit/s (default: 300GB/s for up to 8 "
        "GPUs, NVLink's; 40GB/s beyond, a network's)",
    )
    plan.add_argument("--device", default="H100", help="whose time is modelled (default: H100)")
    plan.add_argument(
        "--reserve", default="2GB", help="of each GPU for CUDA, NCCL and gaps (default: 2GB)"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from nf4.commands.planning.job import Job, device_named, parse_bandwidth, parse_bytes
    from nf4.commands.planning.plan import as_json, make_plan
    from nf4.commands.planning.report import text_of
    from nf4.commands.planning.sizes import sizes_of

    names = ("gpus", "method", "batch", "length", "rank", "optimizer", "checkpointing")
    given = {name: getattr(options, name) for name in (*names, "block_size", "dtype", "attention")}
    job = Job(
        sizes_of(options.model),
        memory=parse_bytes(options.memory, "memory"),
        double_quant=not options.no_double_quant,
        reserve=parse_bytes(options.reserve, "reserve"),
        bandwidth=None if options.bandwidth is None else parse_bandwidth(options.bandwidth),
        device=device_named(options.device),
        **given,
    )
    plan = make_plan(job)
    if options.json:
        sys.stdout.write(json.dumps({"model": options.model, **as_json(plan)}) + "\n")
    else:
        sys.stdout.write(text_of(plan, options.model))
    return 0 if plan.fits else 1
