"""A request to `nf4 bench` on this machine: checked as a whole before anything is made."""

from dataclasses import replace
from typing import Any

import torch

from nf4.bench.harness.asked import OPS as OPS
from nf4.bench.harness.asked import Asked, check_device, parse_sizes
from nf4.bench.harness.cases import DEVICE, Options
from nf4.tools.shapes import MODELS


class Request(Asked):
    """What to time, with what this machine has."""

    def chosen_device(self) -> torch.device:
        """Return the device asked for.

        Raises:
            ValueError: it is not there, threads were asked for of a GPU, or see `check`.
        """
        self.check()
        device = DEVICE if self.device is None else find_device(self.device)
        if self.threads is not None and device.type != "cpu":
            raise ValueError(f"threads: expected a CPU to use them, got {device}")
        return device

    def options(self, on_cpu: Options, on_gpu: Options) -> Options:
        """Return an op's defaults, with what was asked for in their place.

        Raises:
            ValueError: something asked for is not possible.
        """
        device = self.chosen_device()
        given: dict[str, Any] = {"device": device}
        for name in ("rows", "ranks", "dtypes"):
            asked = getattr(self, name)
            if asked is not None:
                given[name] = tuple(dict.fromkeys(asked))
        if self.rounds is not None:
            given["rounds"] = self.rounds
        if self.model is not None:
            given["shapes"] = MODELS[self.model]
        elif self.shapes is not None:
            given["shapes"], given["rows_of"] = parse_sizes(self.shapes)
        return replace(on_gpu if device.type == "cuda" else on_cpu, **given)


def find_device(text: str) -> torch.device:
    """Return a device by its name.

    Raises:
        ValueError: there is none of that name.
    """
    check_device(text)
    device = torch.device(text)
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else 0
    if index >= count:
        raise ValueError(f"device: expected one of the {count} GPUs found, got {text}")
    return torch.device("cuda", index)
