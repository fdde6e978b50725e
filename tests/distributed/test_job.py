"""The processes of a job, as threads of one: what they tell each other, how they share files."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import quantizing
import torch
from safetensors.torch import load_file, save_file

from nf4.files.rewriting import Rewriting
from nf4.tools import job
from nf4.tools.job import Ranks, check_ranks, divide, launched
from nf4.tools.paths import try_lock, unlock
from nf4.tools.shards import Shards


@pytest.fixture(autouse=True)
def new_place(monkeypatch):
    """Say where processes meet, and let none wait for long; return what makes it another place."""

    def move() -> None:
        job._connect.cache_clear()
        monkeypatch.setenv("MASTER_PORT", str(quantizing.free_port()))

    move()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(job, "TIMEOUT", 20.0)
    monkeypatch.setattr(job, "_BEAT", 0.05)
    monkeypatch.setattr(job, "_GRACE", 0.5)
    yield move
    job._connect.cache_clear()


def together(count: int, work: Callable[[Ranks], object]) -> list[object]:
    """Do the same in each process of a job; return what came of it, or the error."""
    found: list[object] = [None] * count

    def run(rank: int) -> None:
        try:
            with Ranks(rank, count) as ranks:
                found[rank] = work(ranks)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def test_parts_are_about_equal_and_in_order() -> None:
    sizes = {"a": 3, "b": 10, "c": 4, "d": 3, "e": 0}
    assert divide(sizes, 2) == [["b", "e"], ["a", "c", "d"]]
    assert divide(sizes, 1) == [list(sizes)]
    assert divide({"a": 1}, 3) == [["a"], [], []]
    many = {str(n): n * n % 101 for n in range(60)}
    loads = [sum(many[name] for name in part) for part in divide(many, 7)]
    assert max(loads) - min(loads) <= max(many.values())
    assert sorted(name for part in divide(many, 7) for name in part) == sorted(many)


def test_the_launcher_s_words_are_read(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == check_ranks(None) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    assert launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched() == check_ranks(None) == (2, 3)
    assert check_ranks((0, 1)) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK: expected less than WORLD_SIZE, which is 2, got 2"):
        launched()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK: expected a number, got 'first'"):
        launched()
    for wrong in ([0, 1], (0,), (True, 2), ("0", "1")):
        with pytest.raises(TypeError, match=r"ranks: expected \(rank, number of processes\), got"):
            check_ranks(wrong)
    for wrong in ((1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="ranks: expected a rank below the number"):
            check_ranks(wrong)


def test_all_hear_the_first_and_the_first_hears_all() -> None:
    seen = []

    def work(ranks: Ranks) -> list:
        ranks.check()
        said = ranks.from_first("begun", lambda: ["by", ranks.rank])
        for _ in range(1 + ranks.rank):
            ranks.step()
        ranks.to_first("written", lambda: seen.append((ranks.rank, ranks.steps())))
        return [*said, ranks.from_first("total", ranks.steps)]

    for _ in range(2):  # one after another, at one place
        assert together(3, work) == [["by", 0, 6]] * 3
        assert {rank for rank, _ in seen} == {0} and seen.pop() == (0, 6)
    with Ranks() as alone:
        assert work(alone) == ["by", 0, 1]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_in_all(failing) -> None:
    class Unknown(Exception):
        pass

    for error, kind in (
        (ValueError("weight: NaN"), ValueError),
        (FileNotFoundError(2, "No such file", "a"), FileNotFoundError),
        (UnicodeError("text"), ValueError),
        (Unknown(), OSError),
    ):

        def work(ranks: Ranks, error: Exception = error) -> None:
            if ranks.rank == failing:
                raise error
            ranks.from_first("begun", lambda: None)
            ranks.to_first("written", lambda: None)
            ranks.from_first("finished", lambda: None)

        for rank, found in enumerate(together(3, work)):
            if rank == failing:
                assert found is error
            else:
                assert type(found) is kind
                assert str(found) == f"rank {failing}: {str(error) or 'Unknown'}"


def test_who_works_looks_between_steps() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank:
            raise ValueError("bad")
        while True:
            ranks.check()
            time.sleep(0.01)

    assert str(together(2, work)[0]) == "rank 1: bad"


def test_who_is_silent_is_named(monkeypatch) -> None:
    monkeypatch.setattr(job, "TIMEOUT", 2.0)

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            ranks._left.set()  # no more signs of life, as of a process that was killed
            time.sleep(5)
            return
        ranks.to_first("written", lambda: None)
        ranks.from_first("finished", lambda: None)

    words = "rank 1: expected a sign of life of all 3 processes every 2 s, it has become silent"
    first, _, third = together(3, work)
    assert type(first) is type(third) is TimeoutError
    assert str(first) == str(third) == words


def test_who_does_not_come_is_waited_for_in_vain(monkeypatch) -> None:
    monkeypatch.setattr(job, "TIMEOUT", 1.0)
    with pytest.raises(TimeoutError, match="rank 0: expected 2 processes to meet at 127.0.0.1:"):
        Ranks(0, 2).__enter__()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT"):
        Ranks(0, 2).__enter__()


def test_torchrun_s_store_waits_for_nobody_and_ranks_are_named(monkeypatch) -> None:
    """Where it is kept by another process, rank 0 finds out who does not come."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    monkeypatch.setattr(job, "TIMEOUT", 2.0)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    words = "rank 1: expected a sign of life of all 2 processes every 2 s, it did not come"
    with pytest.raises(TimeoutError, match=words), Ranks(0, 2) as first:
        first.to_first("here", lambda: None)
    monkeypatch.setattr(job, "TIMEOUT", 20.0)
    with pytest.raises(TimeoutError, match=words), Ranks(1, 2) as late:  # told of it too late
        late.from_first("begun", lambda: None)
    assert together(2, lambda ranks: ranks.from_first("begun", lambda: 3)) == [3, 3]


def test_a_store_that_is_gone_is_said() -> None:
    def gone(store: object) -> None:
        raise RuntimeError("Broken pipe\nand where")

    words = r"rank 1: expected the job's store to answer, got: Broken pipe; rank 0, or what has"
    with pytest.raises(ConnectionError, match=words):
        Ranks(1, 2)._ask(gone)
    told = Ranks(1, 2)
    told._failure = json.dumps(["ValueError", "rank 0: bad"])  # by an earlier sign of life
    with pytest.raises(ValueError, match="rank 0: bad"):
        told._ask(gone)


@pytest.fixture
def shards(tmp_path) -> Shards:
    """Write six files, of which one is larger than the others together."""
    (tmp_path / "source").mkdir()
    for n in range(6):
        tensors = {f"{n}": torch.full((1000 if n == 3 else 100,), n)}
        save_file(tensors, tmp_path / "source" / f"{n}.safetensors")
    return Shards.read(tmp_path / "source")


CONFIG = {"quantization_config": {"quant_method": "nf4", "block_size": 64, "double_quant": True}}


def rewrite(shards: Shards, target: Path, made: list, stop: tuple = (), made_as: int = 1):
    """Return what makes a folder of shards, each of twice its values; a process may stop."""

    def work(ranks: Ranks) -> int:
        def make(file: str) -> dict:
            if ranks.rank in stop and any(rank == ranks.rank for rank, _ in made):
                raise OSError("stopped")
            made.append((ranks.rank, file))
            return {name: 2 * shards.tensor(name) for name in shards.names_in(file)}

        with Rewriting(shards, target, made_as, ranks) as writing:
            total = writing.write_all(make)
            writing.finish(CONFIG)
        return total

    return work


def test_files_are_shared_by_bytes_and_made_once(shards, tmp_path) -> None:
    made: list = []
    assert together(3, rewrite(shards, tmp_path / "q", made)) == [1500 * 8] * 3
    assert sorted(file for _, file in made) == shards.files
    whole = [rank for rank, file in made if file == "3.safetensors"]
    assert [rank for rank, _ in made].count(whole[0]) == 1  # it has no other
    assert load_file(tmp_path / "q" / "4.safetensors")["4"].tolist() == [8] * 100
    assert not list((tmp_path / "q").glob(".*"))
    names = {*shards.files, "config.json", "README.md", "model.safetensors.index.json"}
    assert {p.name for p in (tmp_path / "q").iterdir()} == names


@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_number_of_processes_goes_on(count, new_place, shards, tmp_path) -> None:
    before: list = []
    found = together(3, rewrite(shards, tmp_path / "q", before, stop=(0, 1, 2)))
    assert all(isinstance(one, OSError) for one in found)
    assert not (tmp_path / "q").exists()
    (tmp_path / ".q.part" / ".made-7.json").write_text("{")  # of no use
    made: list = []
    new_place()
    assert together(count, rewrite(shards, tmp_path / "q", made)) == [1500 * 8] * count
    done = {file for _, file in before}
    assert done and done | {file for _, file in made} == {*shards.files}
    assert not done & {file for _, file in made}
    assert not list((tmp_path / "q").glob(".*"))


def test_a_process_that_another_job_left_is_waited_out(shards, tmp_path) -> None:
    (tmp_path / ".q.part").mkdir()
    lock = try_lock(tmp_path / ".q.part" / ".lock-2")
    for one in together(2, rewrite(shards, tmp_path / "q", [])):
        assert isinstance(one, BlockingIOError)
        assert "target_dir: expected no other process to write" in str(one)
    unlock(lock)
    assert together(2, rewrite(shards, tmp_path / "q", [])) == [1500 * 8] * 2


@pytest.mark.parametrize("there", [False, True])
def test_processes_that_share_no_folder_are_refused(there, shards, tmp_path) -> None:
    def work(ranks: Ranks) -> object:
        return rewrite(shards, tmp_path / str(ranks.rank) / "q", [])(ranks)

    if there:  # of an earlier run
        (tmp_path / "1" / ".q.part").mkdir(parents=True)
        (tmp_path / "1" / ".q.part" / ".job").write_text("another")
    first, second = together(2, work)
    assert isinstance(second, FileNotFoundError)
    assert "target_dir: expected a place that all processes share" in str(second)
    assert str(first) == f"rank 1: {second}"


def test_processes_with_other_arguments_are_refused(shards, tmp_path) -> None:
    def work(ranks: Ranks) -> object:
        return rewrite(shards, tmp_path / "q", [], made_as=ranks.rank)(ranks)

    first, second = together(2, work)
    words = "source_dir: expected the source and the arguments of rank 0 in every process"
    assert isinstance(second, ValueError) and str(second).startswith(words)
    assert str(first) == f"rank 1: {second}"
