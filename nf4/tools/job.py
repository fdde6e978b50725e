"""The processes of one job, as torchrun starts them: what the first says, who failed or is gone.

They speak through the key-value store of the job, which torchrun keeps, or rank 0 where another
launcher has set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. No process group is made, and one
that the program has is left alone.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeVar

from nf4.tools.caches import forgettable

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Seconds: that a process may be silent for, between its signs of life, between two looks at the
# store, and for which rank 0 keeps the store after its end
TIMEOUT = 300.0
_BEAT, _POLL, _GRACE = 1.0, 0.05, 5.0
# What an error is raised as in the other processes: the first that it is one of
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        FileExistsError,
        FileNotFoundError,
        BlockingIOError,
        TimeoutError,
        TypeError,
        ValueError,
        ImportError,
        OSError,
    )
}
_OF_A_RANK = re.compile(r"rank \d+: ")  # which a reason may name that another process found
# What a store raises that has ended; IndexError when it was about to answer
_GONE = (RuntimeError, IndexError)
_T = TypeVar("_T")


def launched() -> tuple[int, int]:
    """Return this process's rank and how many there are, as RANK and WORLD_SIZE say: torchrun's.

    Without them it is ``(0, 1)``, one process that works alone.

    Raises:
        ValueError: they are no numbers, or do not fit each other.
    """
    names = ("RANK", "WORLD_SIZE")
    said = [os.environ.get(name) for name in names]
    if None in said:
        return 0, 1
    for name, value in zip(names, said, strict=True):
        if not str(value).isdecimal():
            raise ValueError(f"{name}: expected a number, got {value!r}")
    rank, count = (int(str(value)) for value in said)
    if rank >= count:
        raise ValueError(f"RANK: expected less than WORLD_SIZE, which is {count}, got {rank}")
    return rank, count


def check_ranks(ranks: Any) -> tuple[int, int]:
    """Return (rank, number of processes), by default what the launcher says.

    Raises:
        TypeError: ranks is no pair of integers.
        ValueError: the rank is not below their number.
    """
    if ranks is None:
        return launched()
    pair = isinstance(ranks, tuple) and len(ranks) == 2
    if not pair or any(isinstance(n, bool) or not isinstance(n, int) for n in ranks):
        raise TypeError(f"ranks: expected (rank, number of processes), got {ranks!r}")
    rank, count = ranks
    if not 0 <= rank < count:
        raise ValueError(f"ranks: expected a rank below the number of processes, got {ranks}")
    return rank, count


def divide(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divide names into parts of about equal size: from the largest on, each to the least part.

    Args:
        sizes: of each name.
        parts: how many.

    Returns:
        The names of each part, in the order of sizes.
    """
    loads, where = [0] * parts, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        where[name] = loads.index(min(loads))
        loads[where[name]] += sizes[name]
    return [[name for name in sizes if where[name] == part] for part in range(parts)]


class Ranks:
    """This process among those of a job; to be used in a ``with`` block.

    All processes do the same calls in the same order. An error that leaves the block in one is
    raised in the others too, when they next look: as one of its kind, with the rank before it.

    Args:
        rank: number of this process.
        count: of all processes; with one, nothing is asked and nothing waited for.

    Raises:
        OSError: the job's store does not answer.
        TimeoutError: another process did not come, or has been silent for too long.
        ValueError: it is not said where the store is.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._store: Store | None = None
        self._steps = 0
        self._failure: str | None = None
        self._heard: dict[int, tuple[int, float]] = {}  # signs of life, and when the last came
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        """Meet the other processes."""
        if self.count > 1:
            from torch.distributed.distributed_c10d import PrefixStore

            place = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
            store = _connect(self.rank, self.count, place)
            # Calls are told apart by their number, which is the same in each process
            call = self._ask(lambda _: store.add(f"nf4/calls/{self.rank}", 1))
            self._store = PrefixStore(f"nf4/{call}", store)
            self._ask(lambda store: store.add(f"alive/{self.rank}", 1))
            self._beating.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Tell the others of an error, and leave them."""
        if self._store is None:
            return
        try:
            if error is not None:
                self._store.compare_set("failed", "", json.dumps(_told(self.rank, error)))
            self._left.set()
            self._beating.join()
            self._store.set(f"left/{self.rank}", "")
            self._keep_store()
        except _GONE:  # the store is gone, and with it all who could hear
            self._left.set()

    def _keep_store(self) -> None:
        """Wait until the others have left the store, if it ends with this process."""
        from torch.distributed import is_torchelastic_launched

        if self.rank or is_torchelastic_launched() or self._store is None:
            return
        last, left = time.monotonic() + _GRACE, [f"left/{n}" for n in range(self.count)]
        while not self._store.check(left) and time.monotonic() < last:
            time.sleep(_POLL)

    def _beat(self) -> None:
        """Say that this process is alive, until it leaves, and remember who has failed."""
        try:
            while self._store is not None and not self._left.wait(_BEAT):
                self._store.add(f"alive/{self.rank}", 1)
                self._look(self._store)
        except _GONE:  # the store is gone: the next who asks it is told so
            return

    def _look(self, store: "Store") -> None:
        if self._failure is None and store.check(["failed"]):
            self._failure = store.get("failed").decode()

    def _ask(self, question: Callable[["Store"], _T]) -> _T:
        """Return what the store answers."""
        try:
            return question(self._store)  # type: ignore[arg-type]
        except _GONE as error:
            self._raise_told()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConnectionError(
                f"rank {self.rank}: expected the job's store to answer, got: {reason}; rank 0, or "
                "what has started it, may have ended"
            ) from error

    def _raise_told(self) -> None:
        if self._failure is not None:
            kind, reason = json.loads(self._failure)
            raise _KINDS[kind](reason)

    def check(self) -> None:
        """Raise what another process has failed with, if one has."""
        if self._store is not None:
            self._ask(self._look)
            self._raise_told()

    def step(self) -> None:
        """Count a step of this process."""
        self._steps += 1
        if self._store is not None:
            self._ask(lambda store: store.add("steps", 1))

    def steps(self) -> int:
        """Return how many steps all processes have done."""
        if self._store is None:
            return self._steps
        return self._ask(lambda store: store.add("steps", 0))

    def from_first(self, word: str, make: Callable[[], Any]) -> Any:
        """Return what rank 0 makes, which is JSON, in every process.

        Args:
            word: what it is called, once in a block.
            make: called in rank 0 alone; the others wait for it.
        """
        if self.rank:
            return json.loads(self._hear(0, word))
        found = make()
        self._say(word, json.dumps(found))
        return found

    def to_first(self, word: str, meanwhile: Callable[[], None]) -> None:
        """Wait in rank 0 until every process is here; the others go on.

        Args:
            word: what the place is called, once in a block.
            meanwhile: called again and again while rank 0 waits, and when it has waited.
        """
        self._say(word, "")
        if not self.rank:
            for rank in range(1, self.count):
                self._hear(rank, word, meanwhile)
            meanwhile()

    def _say(self, word: str, text: str) -> None:
        if self._store is not None:
            self._ask(lambda store: store.set(f"{word}/{self.rank}", text))

    def _hear(self, rank: int, word: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        """Wait for what a process says."""
        key = f"{word}/{rank}"
        while not self._ask(lambda store: store.check([key])):
            self.check()
            self._check_alive(rank)
            meanwhile()
            time.sleep(_POLL)
        return self._ask(lambda store: store.get(key)).decode()

    def _check_alive(self, rank: int) -> None:
        signs, now = self._ask(lambda store: store.add(f"alive/{rank}", 0)), time.monotonic()
        if self._heard.get(rank, (None, now))[0] != signs:
            self._heard[rank] = (signs, now)
        elif now - self._heard[rank][1] > TIMEOUT:
            found = "it has become silent" if signs else "it did not come"
            raise TimeoutError(
                f"rank {rank}: expected a sign of life of all {self.count} processes every "
                f"{TIMEOUT:g} s, {found}"
            )


def _told(rank: int, error: BaseException) -> tuple[str, str]:
    """Return what the other processes are told of an error: its kind, and its reason."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "OSError")
    reason = str(error) or type(error).__name__
    return kind, reason if _OF_A_RANK.match(reason) else f"rank {rank}: {reason}"


@forgettable
@cache
def _connect(rank: int, count: int, place: tuple[str | None, ...]) -> "Store":
    """Return the job's store; rank 0, if it keeps it, keeps it until its process ends."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store: Store
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timedelta(seconds=TIMEOUT)))
    except _GONE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TimeoutError(
            f"rank {rank}: expected {count} processes to meet at {':'.join(map(str, place))} "
            f"within {TIMEOUT:g} s, got: {reason}"
        ) from error
    return store
