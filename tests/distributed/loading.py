"""What each process does in a test of loading: ``torchrun loading.py FOLDER SMALL OUT``."""

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils as loading
from transformers import AutoModelForCausalLM

import nf4  # noqa: F401  by which transformers opens its folders

taken: Counter[str] = Counter()  # tensors that were read, by name
opened: Counter[str] = Counter()


class Slice:
    """A tensor in a file, which counts how often it is read."""

    def __init__(self, name: str, held: Any) -> None:
        self.name, self.held = name, held

    def __getitem__(self, index: Any) -> torch.Tensor:
        taken[self.name] += 1
        return self.held[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)


class File:
    """A file of weights, which counts what is read of it."""

    def __init__(self, path: Any, **options: Any) -> None:
        opened[Path(path).name] += 1
        self.held = OPEN(path, **options)

    def get_slice(self, name: str) -> Slice:
        return Slice(name, self.held.get_slice(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.held, name)


OPEN = loading.safe_open


def anonymous() -> int:
    """Return the bytes of memory that belong to no file."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    """Load a folder; write what was read, and how much memory it took."""
    folder, small, out = sys.argv[1:]
    AutoModelForCausalLM.from_pretrained(small)  # warm up
    loading.safe_open = File
    base = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(folder)
    done.set()
    watcher.join()
    held = sum(t.nbytes for t in model.state_dict().values())
    found = {"peak": peak - base, "held": held, "taken": taken, "opened": opened}
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
