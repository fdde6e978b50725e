"""`nf4 plan`: sizes as published, formulas that are what is computed, verdicts and mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import nf4
from nf4 import codebook
from nf4.commands.cli import main
from nf4.commands.planning import job as jobs
from nf4.commands.planning.formulas import evaluate
from nf4.commands.planning.job import Job, parse_bandwidth, parse_bytes
from nf4.commands.planning.plan import as_json, largest_batch, make_plan, proposals
from nf4.commands.planning.report import text_of
from nf4.commands.planning.sizes import ALIASES, MODELS, sizes_of

COMMANDS = Path(nf4.__file__).parent / "commands"
# Parameters as counted in the models' published files, embeddings that are tied once
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
JOBS = {
    "one": Job(MODELS["llama-3-8b"], 1, 24e9, checkpointing=True),
    "ddp": Job(MODELS["qwen2.5-7b"], 4, 80e9, "ddp", 2, optimizer="sgd"),
    "fsdp": Job(MODELS["llama-3-70b"], 8, 80e9),
    "fsdp, 405b": Job(MODELS["llama-3.1-405b"], 64, 80e9, checkpointing=True, rank=20),
    "fsdp, fp32 scales": Job(MODELS["smollm2-135m"], 3, 8e9, double_quant=False, dtype="fp32"),
    "tp": Job(MODELS["llama-3-70b"], 8, 80e9, "tp", 4, optimizer="adamw8bit"),
    "tp, eager": Job(MODELS["qwen3-4b"], 2, 80e9, "tp", attention="eager", checkpointing=True),
}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_give_the_published_number_of_parameters(name) -> None:
    assert MODELS[name].parameters == PUBLISHED[name]


def test_every_model_is_a_published_one() -> None:
    assert {sizes.parameters for sizes in MODELS.values()} == set(PUBLISHED.values())
    assert sizes_of("Llama-3-405B") == MODELS["llama-3.1-405b"]
    assert set(ALIASES.values()) <= MODELS.keys()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_sizes_of_a_config_are_those_of_its_model(kind, tmp_path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 50, "head_dim": 32}
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=kind == "qwen3")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert sizes_of(str(tmp_path)).parameters == parameters
    assert sizes_of(str(tmp_path / "config.json")).parameters == parameters


@pytest.mark.parametrize("name", JOBS)
def test_every_figure_is_what_its_printed_formula_gives(name) -> None:
    data = as_json(make_plan(JOBS[name]))
    values: dict[str, float] = {}
    for term in data["terms"]:
        if term["formula"]:
            assert evaluate(term["formula"], values) == term["value"], term
        values[term["name"]] = term["value"]
    printed = text_of(make_plan(JOBS[name]), name)
    for part in ("memory", "traffic"):
        for row in data[part]:
            assert evaluate(row["formula"], values) == row["bytes"], row
            assert row["formula"] in printed
    for row in data["modelled_seconds"]:
        assert evaluate(row["formula"], values) == row["seconds"], row
        assert row["formula"] in printed and "modelled" in printed
    assert data["memory_bytes"] == sum(r["bytes"] for r in data["memory"] if r["counted"])
    assert data["traffic_bytes"] == sum(r["bytes"] for r in data["traffic"])


def test_constants_are_those_of_the_format() -> None:
    assert jobs.BLOCK_SIZES == codebook.BLOCK_SIZES
    assert jobs.ABSMAX_BLOCK_SIZE == codebook.ABSMAX_BLOCK_SIZE


def rows(job: Job) -> dict[str, float]:
    return {row.name: row.bytes for row in make_plan(job).memory if row.counted}


def test_weights_of_each_method_are_counted_by_hand() -> None:
    layer = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28672
    tables = 2 * (2 * 128256 * 8192 + 8192)  # bytes of embeddings, output layer and last norm
    norms = 2 * 80 * 2 * 8192
    whole = 80 * layer / 2
    job = Job(MODELS["llama-3-70b"], 8, 80e9, "ddp")
    ddp, fsdp, tp = (rows(replace(job, method=m)) for m in ("ddp", "fsdp", "tp"))
    assert ddp["weights in 4 bits"] == whole
    assert fsdp["weights in 4 bits"] == tp["weights in 4 bits"] == whole / 8
    assert ddp["dense weights"] == tp["dense weights"] == tables + norms
    assert fsdp["dense weights"] == (tables + norms) / 8
    assert ddp["scales"] == pytest.approx(2 * whole / 64 * (1 + 4 / 256))
    assert fsdp["scales"] == pytest.approx(2 * whole / 64 * (1 / 8 + 4 / 256))
    plain = rows(replace(job, method="fsdp", double_quant=False))
    assert plain["scales"] == 2 * whole / 64 * 4 / 8
    # Columns of o and down, whose blocks do not lie one after another, have their scales in fp32
    wide = 80 * (8192 * 8192 + 8192 * 28672)
    small = 4 * (2 * whole + (2 * whole - wide) / 8) / (256 * 64)
    assert tp["scales"] == pytest.approx((2 * whole + 4 * wide) / 8 / 64 + small)
    adapters = 80 * 16 * (4 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert ddp["adapters"] == 4 * adapters
    assert fsdp["adapters"] == 4 * adapters / 8
    # lora_A of q, k, v, gate, up and lora_B of o, down are copied
    copied = 80 * 16 * 7 * 8192
    assert tp["adapters"] == 4 * (copied + (adapters - copied) / 8)
    assert ddp["optimizer"] == 2 * ddp["gradients"] == 2 * ddp["adapters"]


def test_shares_of_few_rows_are_rounded_up() -> None:
    """64 GPUs hold the 16 rows of lora_A: 16 of them one each, the others none."""
    job = Job(MODELS["llama-3.1-405b"], 64, 80e9)
    terms = {term.name: term.value for term in make_plan(job).terms}
    inputs = 5 * 16384 + 16384 + 53248
    outputs = 16384 + 2 * 1024 + 16384 + 2 * 53248 + 16384
    assert terms["A_own"] == inputs + 16 * outputs / 64


def test_traffic_and_modelled_time_of_each_method() -> None:
    job = Job(MODELS["llama-3-8b"], 4, 80e9, "ddp", 2, 1024)
    elements = 32 * 16 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    ddp = make_plan(job)
    assert ddp.sent == 2 * 3 / 4 * 4 * elements
    tp = make_plan(replace(job, method="tp"))
    sums = 4 * 32 * 2 * 3 / 4 * 2 * 2048 * 4096
    assert tp.sent == pytest.approx(sums, rel=0.06) and tp.sent > sums
    assert make_plan(replace(job, gpus=1)).sent == 0
    slow = make_plan(replace(job, bandwidth=1e6))
    assert slow.step_seconds == ddp.sent / 1e6
    # Products alone, by parameters: 4 flops for each parameter and token
    least = 4 * 2048 * (job.sizes.parameters - 128256 * 4096) / job.device.flops
    assert least < ddp.step_seconds < 2 * least
    assert ddp.job.tokens == 4 * tp.job.tokens == 4 * 2048
    checkpointed = make_plan(replace(job, checkpointing=True))
    assert 1.2 < checkpointed.step_seconds / ddp.step_seconds < 1.6


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    job = Job(MODELS["llama-3-8b"], 4, 80e9, checkpointing=True)
    batch = largest_batch(job)
    assert batch > 2
    assert make_plan(replace(job, batch=batch)).fits
    assert not make_plan(replace(job, batch=batch + 1)).fits
    assert largest_batch(replace(job, memory=3e9)) == 0


def test_what_would_fit_fits_and_is_asked_for_by_its_options() -> None:
    job = Job(MODELS["llama-3-70b"], 8, 80e9, "ddp", 4)
    assert not make_plan(job).fits
    found = proposals(job)
    assert all(one.plan.fits for one in found)
    assert "--checkpointing" in [one.change for one in found]
    long = Job(MODELS["llama-3-8b"], 2, 24e9, batch=8)
    plain, checkpointed = (one.plan.job for one in proposals(long)[:2])
    assert not plain.checkpointing and checkpointed.checkpointing
    assert plain.batch < checkpointed.batch < 8
    tight = Job(MODELS["llama-3-70b"], 2, 40e9, "ddp", 16)
    several = proposals(tight)
    assert all(one.plan.fits for one in several)
    assert several[0].change.startswith("--method fsdp --checkpointing --batch ")
    assert not any("ddp" in one.change for one in several)  # no number of GPUs helps
    assert proposals(replace(tight, memory=3e9)) == []


def test_plans_of_the_guide_fit_as_it_says(capsys) -> None:
    page = Path(__file__).resolve().parents[2] / "notebooks/guides/several_gpus.md"
    told = re.findall(
        r"^nf4 plan (.*?) +# fits: ([0-9.]+) GB each$", page.read_text("utf-8"), flags=re.M
    )
    assert len(told) == 2
    for arguments, needed in told:
        status, out, _ = run(capsys, *arguments.split())
        assert status == 0 and "modelled and not measured" in out
        found = re.search(r"^Fits: ([0-9.]+) GB of 80.00 GB", out, flags=re.M)
        assert found and abs(float(found[1]) - float(needed)) <= 0.051


def test_json_says_what_the_text_says(capsys) -> None:
    asked = ("--model", "llama-3-8b", "--gpus", "2", "--memory", "12GB", "--method", "ddp")
    status, out, _ = run(capsys, *asked)
    assert status == 1 and "Does not fit: " in out
    status, printed, _ = run(capsys, *asked, "--json")
    data = json.loads(printed)
    assert status == 1 and not data["fits"] and data["model"] == "llama-3-8b"
    assert data["would_fit"]
    for one in data["would_fit"]:
        assert one["change"] in out and one["memory_bytes"] <= 12e9
    assert data["job"]["parameters"] == PUBLISHED["llama-3-8b"]


def test_what_nothing_fits_is_said(capsys) -> None:
    status, out, _ = run(capsys, "--model", "llama-3-70b", "--memory", "1GB", "--reserve", "1MB")
    assert status == 1 and "nothing up to 1,024 GPUs" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "llama-9"], "model: expected one of llama-3-8b, "),
        (["--gpus", "0"], "gpus: expected a whole number from 1, got 0"),
        (["--batch", "-1"], "batch: expected a whole number from 1, got -1"),
        (["--method", "zero"], "method: expected one of ddp, fsdp, tp, got 'zero'"),
        (["--optimizer", "lion"], "optimizer: expected one of adamw, adamw8bit, sgd, got 'lion'"),
        (["--dtype", "fp8"], "dtype: expected one of bf16, fp16, fp32, got 'fp8'"),
        (["--block-size", "48"], "block_size: expected one of 32, 64, "),
        (["--memory", "much"], "memory: expected a size such as 80GB or 79.6GiB, got 'much'"),
        (["--bandwidth", "-3"], "bandwidth: expected one such as 300GB/s or 400Gbit/s, got '-3'"),
        (["--device", "H7"], "device: expected one of H200, "),
        (["--method", "tp", "--gpus", "3"], "gpus: expected a number that divides the model's 8"),
        (
            ["--method", "tp", "--gpus", "8", "--block-size", "4096"],
            "gpus: expected whole blocks of 4096 weights on each GPU under tp, got 8 parts of the "
            "4096 inputs of o",
        ),
    ],
)
def test_mistakes_are_named(arguments, said, capsys) -> None:
    given = arguments if "--model" in arguments else ["--model", "llama-3-8b", *arguments]
    status, out, err = run(capsys, *(a.replace(" ", "") for a in given))
    assert (status, out) == (2, "")
    assert err.startswith(f"nf4 plan: {said}"), err


@pytest.mark.parametrize(
    "config, said",
    [
        ({"model_type": "gpt2"}, "model: expected a model_type of llama, "),
        ({"model_type": "llama"}, "for hidden_size in "),
        ({"hidden_size": True}, "got True"),
        ({"num_key_value_heads": 3}, "expected a number of attention heads that "),
        ([], "expected an object in "),
        ("{", "expected JSON in "),
    ],
)
def test_configs_that_cannot_be_planned_are_refused(config, said, tmp_path) -> None:
    usual = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 9}
    usual |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    if isinstance(config, dict) and config.keys() != {"model_type"}:
        config = usual | config
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="^model: ") as caught:
        sizes_of(str(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text, count",
    [("80GB", 80e9), ("80", 80e9), ("79.5 GiB", 79.5 * 2**30), ("500mb", 5e8), (".5TB", 5e11)],
)
def test_sizes_are_read_with_their_units(text, count) -> None:
    assert parse_bytes(text, "memory") == count


@pytest.mark.parametrize(
    "text, count", [("300GB/s", 3e11), ("40", 4e10), ("400Gbit/s", 5e10), ("400Gbps", 5e10)]
)
def test_bandwidths_are_read_with_their_units(text, count) -> None:
    assert parse_bandwidth(text) == count


@pytest.mark.parametrize("formula", ["a + b", "a ** 2", "a.real", "len(a)", "a if a else 1", "'a'"])
def test_formulas_are_arithmetic_of_known_names(formula) -> None:
    with pytest.raises(ValueError, match="formula: expected names, numbers"):
        evaluate(formula, {"a": 2})


def test_planning_imports_no_torch() -> None:
    """It is arithmetic: of the package it needs what needs nothing, which starts at once."""
    code = f"""
import sys, types
sys.modules["torch"] = None  # whose import fails
package = types.ModuleType("nf4")
package.__path__ = [{str(COMMANDS.parent)!r}]
sys.modules["nf4"] = package
import argparse
from nf4.commands.plan import add_plan
parser = argparse.ArgumentParser()
add_plan(parser.add_subparsers())
options = parser.parse_args(["plan", "--model", "llama-3-8b"])
sys.exit(options.run(options))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Fits: " in done.stdout
