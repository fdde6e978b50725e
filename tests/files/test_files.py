"""Files are written whole or not at all, by one process; what a killed one has left goes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import nf4
from nf4.tools.paths import beside, new_folder, save_tensors, write_file

linux = pytest.mark.skipif(sys.platform != "linux", reason="locks and limits are those of Linux")


@pytest.fixture
def source(tiny_llama, tmp_path):
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path, max_shard_size="100KB")
    return path


def quantize(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "nf4.commands.cli", "quantize", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def test_write_file_leaves_what_was_there_if_it_fails(tmp_path) -> None:
    path = tmp_path / "file.txt"
    write_file(path, "old")
    with pytest.raises(RuntimeError, match="stop"), beside(path) as file:
        file.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@linux
def test_what_a_killed_run_left_goes_and_what_a_live_one_holds_stays(tmp_path) -> None:
    left = [tmp_path / ".out-abcd1234", tmp_path / ".out-zzzz0000"]
    for folder in left:
        folder.mkdir()
        (folder / "half.txt").write_text("half")
    others = [tmp_path / ".out-abcd12345", tmp_path / ".other-abcd1234", tmp_path / ".out-ABCD1234"]
    for folder in others:
        folder.mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        with new_folder(tmp_path / "out") as second:  # as another process would
            assert folder.is_dir() and second != folder
            (second / "a.txt").write_text("b")
        assert folder.is_dir()
        (tmp_path / "out" / "a.txt").unlink()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "a.txt").read_text() == "a"
    assert {p.name for p in tmp_path.iterdir()} == {"out", *(p.name for p in others)}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_saved_tensors_have_the_same_bytes_again(tmp_path) -> None:
    tensors = {f"t{i}": torch.arange(i, dtype=torch.float32) for i in range(50)}
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        save_tensors(tensors, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@linux
def test_of_two_processes_with_one_target_one_says_so(source, tmp_path) -> None:
    runs = [quantize(source, tmp_path / "q") for _ in range(3)]
    done = [(run.returncode, err) for run in runs for err in [run.communicate()[1]]]
    codes = sorted(code for code, _ in done)
    assert codes == [0, 2, 2], done
    for code, err in done:
        lines = [line for line in err.splitlines() if line.startswith("nf4 quantize:")]
        assert len(lines) == (code == 2)
        assert code == 0 or "target_dir: expected" in lines[0]
    nf4.quantize_checkpoint(source, tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "q" / file.name).read_bytes()


FULL = """
import resource, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from nf4.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


@linux
def test_a_file_that_cannot_be_written_is_named_and_the_run_goes_on_later(source, tmp_path) -> None:
    arguments = ["quantize", str(source), str(tmp_path / "q")]
    command = [sys.executable, "-c", FULL, "20000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("nf4 quantize:")]
    assert "File too large" in line and ".q.part" in line and ".safetensors" in line
    assert not (tmp_path / "q").exists()
    nf4.quantize_checkpoint(source, tmp_path / "q")
    assert not (tmp_path / ".q.part").exists()


SAVE = """
import resource, signal, sys, torch, nf4
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = nf4.add_lora(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=8)
try:
    nf4.save_adapter(model, sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


@linux
def test_an_adapter_that_cannot_be_written_is_named(tmp_path) -> None:
    command = [sys.executable, "-c", SAVE, str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError [Errno 27] File too large: ")
    assert "adapter_model.safetensors" in done.stdout and not list(tmp_path.iterdir())


@linux
def test_a_list_that_was_cut_or_is_none_begins_anew(source, tmp_path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    nf4.quantize_checkpoint(source, tmp_path / "expected")
    for text in ("", "{", "[]", json.dumps({"made_as": 1, "files": 3}), "[" * 100_000):
        with pytest.raises(KeyboardInterrupt):
            nf4.quantize_checkpoint(source, tmp_path / "q", progress=stop)
        (tmp_path / ".q.part" / ".made.json").write_text(text)
        (tmp_path / ".q.part" / ".writing-x").mkdir(exist_ok=True)
        (tmp_path / ".q.part" / ".writing-x" / "half").write_text("half")
        (tmp_path / ".q.part" / ".writing-old").write_text("half")
    nf4.quantize_checkpoint(source, tmp_path / "q")
    names = {p.name for p in (tmp_path / "expected").iterdir()}
    assert {p.name for p in (tmp_path / "q").iterdir()} == names


@linux
def test_a_target_that_another_process_holds_is_refused(source, tmp_path) -> None:
    (tmp_path / ".q.part").mkdir()
    from nf4.tools.paths import try_lock, unlock

    lock = try_lock(tmp_path / ".q.part" / ".lock")
    with pytest.raises(BlockingIOError, match="target_dir: expected no other process to write"):
        nf4.quantize_checkpoint(source, tmp_path / "q")
    unlock(lock)
    nf4.quantize_checkpoint(source, tmp_path / "q")
    assert (tmp_path / "q" / "config.json").is_file()
    assert os.listdir(tmp_path / "q").count(".lock") == 0
