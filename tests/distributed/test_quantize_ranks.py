"""Folders quantized by several processes: the bytes of one, resumable, no process left alone."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import quantizing
import torch
import worker
from ranks import clean_environment, torchrun
from safetensors.torch import load_file, save_file

import nf4

WORKER = quantizing.__file__


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a Llama in several files, and quantize it by one process."""
    root = tmp_path_factory.mktemp("folders")
    worker.dense_model().save_pretrained(root / "dense", max_shard_size="60KB")
    (root / "dense" / "tokenizer.txt").write_text("words")
    assert len(list((root / "dense").glob("*.safetensors"))) >= 5
    nf4.quantize_checkpoint(root / "dense", root / "whole")
    return root


@pytest.fixture
def bad(folders, tmp_path):
    """Copy the dense folder, with a NaN in its third file; return it with file and tensor."""
    for file in (folders / "dense").iterdir():
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    quantized = (folders / "whole").glob("*.safetensors")
    held = {f: [n for n in load_file(f) if n.endswith(".packed")] for f in sorted(quantized)}
    file, names = [(f, names) for f, names in held.items() if names][1]
    name = names[0].replace(".packed", ".weight")
    tensors = load_file(tmp_path / "bad" / file.name)
    tensors[name][2, 3] = torch.nan
    save_file(tensors, tmp_path / "bad" / file.name, metadata={"format": "pt"})
    return tmp_path / "bad", file.name, name


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def forked(folder: Path, *jobs: dict) -> list[list[dict]]:
    """Return what came of each process of each job."""
    arguments = ["fork", str(folder), json.dumps(jobs, default=str)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", WORKER, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_torchrun_makes_the_folder_of_one_process(count, folders, tmp_path) -> None:
    arguments = ["quantize", folders / "dense", tmp_path / "q", "--json"]
    done = torchrun(count, "-m", "nf4.commands.cli", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "q") == contents(folders / "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert json.loads(done.stdout)["layers"] == 14  # one process prints
    assert done.stderr.count("Quantize files") == 1


def test_torchrun_goes_on_after_a_kill_with_another_number(folders, tmp_path) -> None:
    target, part = tmp_path / "q", tmp_path / ".q.part"
    killed = torchrun(3, WORKER, "kill", 2, 45, folders / "dense", target)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not target.exists() and not (part / "config.json").exists()
    lists = [json.loads(file.read_text())["files"] for file in part.glob(".made*.json")]
    made = {name: (part / name).stat().st_ino for files in lists for name, _ in files}
    assert made
    done = torchrun(2, "-m", "nf4.commands.cli", "quantize", folders / "dense", target)
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(target) == contents(folders / "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert made == {name: (target / name).stat().st_ino for name in made}  # not made again


def test_torchrun_starts_killed_processes_again(folders, tmp_path) -> None:
    arguments = (WORKER, "kill", 1, 45, folders / "dense", tmp_path / "q")
    done = torchrun(2, *arguments, restarts=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "q") == contents(folders / "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_torchrun_ends_where_a_weight_is_bad(bad, tmp_path) -> None:
    source, file, name = bad
    done = torchrun(2, "-m", "nf4.commands.cli", "quantize", source, tmp_path / "q")
    assert done.returncode != 0 and not (tmp_path / "q").exists()
    assert re.search(rf"nf4 quantize: .*{file}: {name}: .*(NaN|finite)", done.stderr)


def test_a_rank_that_is_killed_leaves_nothing_half_written(folders, tmp_path) -> None:
    """Each rank at four of its steps on files; other numbers of processes go on after it."""
    whole, scratch = contents(folders / "whole"), tmp_path / "scratch"
    scratch.mkdir()
    job = {"source": folders / "dense", "target": tmp_path / "0" / "q", "count": 3}
    (ranks,) = forked(scratch, job)
    assert contents(tmp_path / "0" / "q") == whole
    assert ranks[1]["progress"] == ranks[2]["progress"] == []
    files = len(list((folders / "dense").glob("*.safetensors")))
    assert ranks[0]["progress"] == [[n + 1, files] for n in range(files)]
    assert ranks[0]["made"] == ranks[1]["made"] == ranks[2]["made"]
    kills = [(rank, 1 + ranks[rank]["steps"] * n // 4) for rank in range(3) for n in range(4)]
    targets = [tmp_path / str(n) / "q" for n in range(1, len(kills) + 1)]
    begun = [
        job | {"target": target, "kill": kill} for target, kill in zip(targets, kills, strict=True)
    ]
    for found, (rank, _) in zip(forked(scratch, *begun), kills, strict=True):
        assert found[rank]["signal"] == signal.SIGKILL
    opened = [target for target in targets if target.exists()]
    assert all(contents(target) == whole for target in opened)
    going_on = [
        job | {"target": target, "count": 1 + n % 4}
        for n, target in enumerate(targets)
        if target not in opened
    ]
    assert len(going_on) > len(kills) / 2
    for found in forked(scratch, *going_on):
        assert all("made" in one for one in found), found
    for target in targets:
        assert contents(target) == whole, target
        assert [p.name for p in target.parent.iterdir()] == ["q"]


def test_a_rank_that_fails_ends_the_others_with_its_reason(bad, folders, tmp_path) -> None:
    source, file, name = bad
    jobs = [
        {"source": source, "target": tmp_path / "nan", "count": 3},
        {"source": folders / "dense", "target": tmp_path / "full", "count": 3, "full_disk": 1},
    ]
    nan, full = forked(tmp_path, *jobs)
    reason = f"{source / file}: {name}: "
    (failed,) = (n for n, one in enumerate(nan) if one["error"].startswith(f"ValueError: {reason}"))
    for rank, one in enumerate(nan):
        told = f"rank {failed}: " if rank != failed else ""
        assert one["error"].startswith(f"ValueError: {told}{reason}")
    for rank, one in enumerate(full):
        assert ("rank 1: " in one["error"]) == (rank != 1), one["error"]
        assert "File too large" in one["error"] and ".safetensors" in one["error"]
    assert not (tmp_path / "nan").exists() and not (tmp_path / "full").exists()
    (again,) = forked(tmp_path, jobs[1] | {"full_disk": None, "count": 2})
    assert all("made" in one for one in again)
    assert contents(tmp_path / "full") == contents(folders / "whole")


def test_without_a_launcher_a_process_that_is_gone_is_named(folders, tmp_path) -> None:
    job = {"source": folders / "dense", "count": 3, "timeout": 6.0, "end_others": False}
    gone, first, absent = forked(
        tmp_path,
        job | {"target": tmp_path / "a", "kill": (2, 40)},
        job | {"target": tmp_path / "b", "kill": (0, 80)},
        job | {"target": tmp_path / "c", "absent": [1]},
    )
    for one in gone[:2]:
        assert one["error"] == (
            "TimeoutError: rank 2: expected a sign of life of all 3 processes every 6 s, it has "
            "become silent"
        )
    for one in first[1:]:
        assert "rank 0" in one["error"]
    assert "TimeoutError: rank 0: expected 3 processes to meet" in absent[0]["error"]
    assert "Error: rank 0: expected" in absent[2]["error"] or "job's store" in absent[2]["error"]
    assert not any((tmp_path / name).exists() for name in "abc")


def test_arguments_are_checked_in_the_same_words(folders, tmp_path) -> None:
    job = {"source": folders / "dense", "target": tmp_path / "q", "count": 2}
    (tmp_path / "there").mkdir()
    block, source, target, others = forked(
        tmp_path,
        job | {"options": {"block_size": 48}},
        job | {"source": tmp_path / "no"},
        job | {"target": tmp_path / "there"},
        job | {"own": {"1": {"block_size": 128}}},
    )
    for one in block:
        assert "ValueError: block_size: expected a power of two" in one["error"]
    for one in source:
        assert "FileNotFoundError: source_dir: expected a folder with config.json" in one["error"]
    for one in target:
        assert "FileExistsError: target_dir: expected a folder that does not ex" in one["error"]
    words = "ValueError: source_dir: expected the source and the arguments of rank 0"
    assert others[1]["error"].startswith(words)
    assert others[0]["error"].startswith(words.replace(": ", ": rank 1: ", 1))
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_other_models_are_the_same_for_several(kind, tiny_llama, tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=320, num_local_experts=3,
    )  # fmt: skip
    tied = kind == "tied"
    model = tiny_llama(tie_word_embeddings=True) if tied else MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    job = {"source": tmp_path / "dense", "target": tmp_path / "one", "count": 1}
    one, three = forked(tmp_path, job, job | {"target": tmp_path / "three", "count": 3})
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert three[0]["made"] == one[0]["made"]
    given = [found["warnings"] for found in three]
    assert given == [one[0]["warnings"], [], []] and bool(given[0]) != tied
