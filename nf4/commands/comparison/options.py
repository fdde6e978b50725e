"""What `nf4 compare` can be asked for: checked before anything is loaded, torch too."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nf4.tools.sources import check_packages, check_text, model_path

DTYPES = ("float32", "bfloat16")
# Peak learning rates by method; None where nothing is trained. They were picked: on SmolLM2 the
# best of 1e-3, 2e-3, 4e-3 for QLoRA, which LoRA takes too; of 3e-3, 1e-2, 3e-2, 1e-1 for (IA)³; of
# 2e-3, 4e-3, 1e-2 for AdaMix. Each was tried for 40 steps of other batches and scored on a part of
# Macbeth that is not scored here.
LEARNING_RATES = {"base": None, "lora": 2e-3, "qlora": 2e-3, "t-few": 3e-2, "adamix": 2e-3}


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        model: as `nf4.tools.samples.load_model` takes it.
        methods: names of `LEARNING_RATES`, in the order in which to run them.
        steps: of training, at least 2: the first is not timed.
        text: a UTF-8 file, whose last tenth is held out; None for Shakespeare.
        r: rank of the adapters.
        dtype: name of `DTYPES`: of what stays dense, and of products.
        seed: of all randomness.
        lr: peak learning rates by method; the methods' own where there is none.
        device: where to train; a GPU if there is one by default.
        threads: of a CPU; PyTorch's number by default.

    Raises:
        FileNotFoundError: model or text is not there.
        ModuleNotFoundError: a package of the extra demo is missing.
        ValueError: an option is out of range.
    """

    model: str | None = None
    methods: Sequence[str] = tuple(LEARNING_RATES)
    steps: int = 40
    text: str | None = None
    r: int = 8
    dtype: str = "float32"
    seed: int = 0
    lr: Mapping[str, float] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check every option, as far as it can be without loading the model."""
        _check_methods(self.methods, self.lr)
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2 (one is not timed), got {self.steps}")
        for name, value in (("r", self.r), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device is not None and not re.fullmatch(r"(cpu|cuda)(:\d+)?", self.device):
            raise ValueError(f"device: expected cuda, cuda:1, … or cpu, got {self.device!r}")
        check_packages(self.model)
        if self.model is not None:
            model_path(self.model)
        if self.text is not None:
            check_text(self.text)


def check_results(results: str | Path | None) -> None:
    """Raise IsADirectoryError if the file for results is a folder."""
    if results is not None and Path(results).is_dir():
        raise IsADirectoryError(f"results: expected a file, {results} is a folder")


def _check_methods(methods: Iterable[str], lr: Mapping[str, float]) -> None:
    known = ", ".join(LEARNING_RATES)
    methods = list(methods)
    for name in methods:
        if name not in LEARNING_RATES:
            raise ValueError(f"methods: expected some of {known}, got {name!r}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods: expected some of {known}, each once, got {methods}")
    trained = [name for name in methods if LEARNING_RATES[name] is not None]
    for name, value in lr.items():
        if name not in trained:
            raise ValueError(f"lr: expected a method that is trained here, got {name!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"lr: expected a positive number for {name}, got {value}")
