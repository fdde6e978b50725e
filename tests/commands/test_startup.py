"""Help and mistakes are told before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What takes time to import
HEAVY = ("torch", "numpy", "scipy", "triton", "transformers", "peft", "safetensors", "rich")
RUN = """
import json, sys
from nf4.commands.cli import main
try:
    status = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    status = stop.code
heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
sys.stderr.write("\\n" + json.dumps([status, heavy]))
"""


def run(arguments: list[str], cwd: Path) -> tuple[int, str, str, list[str]]:
    """Run a command in an interpreter of its own: status, output, errors, what was imported."""
    command = [sys.executable, "-c", RUN, json.dumps(arguments), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    *lines, last = done.stderr.split("\n")
    status, heavy = json.loads(last)
    return status, done.stdout, "\n".join(lines).strip(), heavy


COMMANDS = ("demo", "quantize", "export", "merge", "error", "bench", "compare", "verify")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_that_takes_time(arguments, tmp_path) -> None:
    status, printed, errors, heavy = run(arguments, tmp_path)
    assert (status, errors, heavy) == (0, "", []) and "nf4" in printed


BAD = {
    "no_command": ([], "the following arguments are required: COMMAND"),
    "command": (["train"], "invalid choice: 'train'"),
    "option": (["verify", "--fast"], "unrecognized arguments: --fast"),
    "int": (["demo", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    "missing": (["export", "a", "--format", "x"], "the following arguments are required: target"),
    "no target": (["quantize", "a"], "target: expected a folder to make, got none; or --dry-run"),
    "both_forms": (["error", "a", "--json", "--csv"], "not allowed with argument --json"),
    "demo_steps": (["demo", "--steps", "0"], "steps: expected at least 1, got 0"),
    "demo_out": (["demo", "--out", "."], "out: expected a folder that does not exist yet"),
    "demo_model": (["demo", "--model", "none"], "model: expected a folder, a file or one of"),
    "demo_text": (["demo", "--model", ".", "--text", "none"], "text: expected a UTF-8 text file"),
    "quantize_block": (["quantize", "a", "b", "--block-size", "7"], "block_size: expected a power"),
    "quantize_scale": (["quantize", "a", "b", "--scale", "x"], "scale: expected one of absmax"),
    "quantize_source": (["quantize", "a", "b"], "source_dir: expected a folder with config.json"),
    "quantize_target": (["quantize", "a", "."], "target_dir: expected a folder that does not"),
    "export_format": (["export", "a", "b", "--format", "x"], "format: expected one of bitsandb"),
    "export_source": (["export", "a", "b", "--format", "bitsandbytes"], "source_dir: expected a"),
    "merge_dtype": (["merge", "a", "b", "c", "--dtype", "x"], "dtype: expected one of bf16, fp16"),
    "merge_base": (["merge", "a", "b", "c"], "base: expected a folder with config.json, got a"),
    "merge_target": (["merge", "a", "b", "."], "target_dir: expected a folder that does not"),
    "error_model": (["error", "none"], "model: expected a folder, a file or one of smollm2"),
    "error_nothing": (["error"], "model: expected a model or --codebooks, one of them"),
    "error_codebooks": (["error", "--codebooks", "--csv"], "codebooks: expected --json or neither"),
    "error_out": (["error", "smollm2", "--out", "."], "out: expected a folder that does not"),
    "error_block": (["error", ".", "--block-size", "48"], "block_size: expected a power of two"),
    "error_scale": (["error", ".", "--scale", "x"], "scale: expected one of absmax"),
    "error_tokens": (["error", ".", "--tokens", "3"], "tokens: expected at least 512, got 3"),
    "error_text": (["error", ".", "--perplexity", "x"], "perplexity: expected a UTF-8 text file"),
    "verify_seed": (["verify", "--seed", "-1"], "seed: expected an int of at least 0, got -1"),
    "verify_device": (["verify", "--device", "GPU 1"], "device: expected one that is here, got"),
    "bench_op": (["bench", "multiply"], "op: expected one of dequantize"),
    "bench_shapes": (["bench", "--shapes", "64"], "shapes: expected NxK or MxNxK"),
    "bench_model": (["bench", "--model", "x"], "model: expected one of llama-3-8b"),
    "bench_dtype": (["bench", "--dtypes", "int8"], "dtypes: expected one of bf16, fp16, fp32"),
    "bench_rows": (["bench", "--rows", "0"], "rows: expected at least 1, got 0"),
    "bench_device": (["bench", "--device", "tpu"], "device: expected cuda, cuda:1, … or cpu"),
    "bench_target": (["bench", "--compile", "--target", "sm_1"], "target: expected one of sm_80"),
    "bench_tune": (["bench", "--tune", "--shapes", "64"], "shapes: expected NxK such as"),
    "bench_file": (["bench", "--compare", "a", "b"], "a: expected a JSON file, got"),
    "bench_modes": (["bench", "--render", "matmul"], "ops: expected nothing of the kind"),
    "compare_method": (["compare", "--methods", "x"], "methods: expected some of base, lora"),
    "compare_steps": (["compare", "--steps", "1"], "steps: expected at least 2"),
    "compare_dtype": (["compare", "--dtype", "int8"], "dtype: expected one of float32, bfloat16"),
    "compare_device": (["compare", "--device", "tpu"], "device: expected cuda, cuda:1, … or cpu"),
    "compare_rate": (["compare", "--lr", "lora"], "lr: expected METHOD=VALUE"),
    "compare_model": (["compare", "none"], "model: expected a folder, a file or one of"),
    "compare_out": (["compare", ".", "--out", "."], "out: expected a folder that does not exist"),
    "compare_results": (["compare", ".", "--results", "."], "results: expected a file, . is a"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistake_is_told_before_anything_that_takes_time_is_imported(case, tmp_path) -> None:
    arguments, message = BAD[case]
    status, printed, errors, heavy = run(arguments, tmp_path)
    assert (status, printed, heavy) == (2, "", [])
    assert errors.startswith("nf4") and message in errors and "\n" not in errors
    assert list(tmp_path.iterdir()) == []
