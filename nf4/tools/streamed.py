"""A safetensors file written a tensor at a time: none but the one being written is in memory.

Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# As safetensors call them, those that weights are rounded to
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Streamed:
    """What a file is to hold, and what makes each tensor when its turn comes.

    Attributes:
        forms: dtype as safetensors call it, bytes of an element, and sizes, by name.
        make: returns a tensor of that form, of any strides, on the CPU.
    """

    forms: Mapping[str, tuple[str, int, tuple[int, ...]]]
    make: Callable[[str], Tensor]

    def save(self, path: Path) -> None:
        """Write the file; tensors of wide elements come first, so that all are aligned.

        Biases come after all else of their width: what they become may be known by then.

        Raises:
            OSError: the file cannot be written; with its path.
            ValueError: a tensor that was made has another size.
        """

        def place(name: str) -> tuple[int, bool, str]:
            return -self.forms[name][1], name.endswith("bias"), name

        names, end = sorted(self.forms, key=place), 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        sizes: dict[str, int] = {}
        for name in names:
            dtype, width, shape = self.forms[name]
            sizes[name] = width * math.prod(shape)
            offsets = [end, end + sizes[name]]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            end = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        try:
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    data = self.make(name).contiguous().reshape(-1).view(torch.uint8).numpy()
                    if data.nbytes != sizes[name]:
                        raise ValueError(f"{name}: expected {sizes[name]} bytes, got {data.nbytes}")
                    file.write(data.data)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
