"""The weights in four bits that a folder's files hold, ours or bitsandbytes', read one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nf4.files.architectures import StoredLayer, architectures
from nf4.layers import bitsandbytes
from nf4.tensor import PARTS, NF4Tensor, check_nf4, packed_shape, part_forms
from nf4.tools.shards import Shards


def read_weight(shards: Shards, name: str, layer: StoredLayer, dtype: torch.dtype) -> NF4Tensor:
    """Read the parts of one weight of ours, from whichever files they are in.

    Args:
        shards: the files.
        name: one of ``layer.names``.
        layer: which layer it is of.
        dtype: that it dequantizes to.

    Raises:
        ValueError: a part is missing or has another form; the message names it.
    """
    found: dict[str, Tensor | None] = {}
    for part in PARTS:
        key = f"{name}.{part}"
        found[part] = shards.tensor(key) if key in shards.tensors else None
    packed, absmax, absmax2, offset = (found[part] for part in PARTS)
    if packed is None or absmax is None:
        raise ValueError(f"{shards.folder}: {name}: expected packed and absmax, found one of them")
    shape = torch.Size(layer.shape)
    if packed.numel() == packed_shape(shape).numel():
        packed = packed.view(packed_shape(shape))
    q = NF4Tensor(packed, absmax, shape, dtype, layer.block_size, absmax2, offset)
    try:
        check_nf4(q, name)
    except TypeError as error:
        raise ValueError(f"{shards.folder}: {error}") from error
    return q


@dataclass(frozen=True)
class StoredWeight:
    """A weight in four bits, or those of all experts of a mixture, in a folder's files.

    Attributes:
        layer: its names and form.
        shards: the files.
        theirs: whether bitsandbytes wrote it.
    """

    layer: StoredLayer
    shards: Shards
    theirs: bool

    @property
    def first(self) -> str:
        """The tensor whose file the dense weight goes to."""
        return self.layer.becomes if self.theirs else f"{self.layer.names[0]}.packed"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dense weight ``[N, K]``, with the number of experts before it if any."""
        if self.layer.kind != "experts":
            return self.layer.shape
        return (len(self.layer.names), *self.layer.shape)

    def parts(self) -> list[str]:
        """Return the names of all tensors that it is made of."""
        tensors = self.shards.tensors
        if self.theirs:
            return bitsandbytes.names_of(tensors, self.layer.becomes)
        keys = [f"{name}.{part}" for name in self.layer.names for part in PARTS]
        return [key for key in keys if key in tensors]

    def check(self) -> None:
        """Raise ValueError unless packed bytes and scales are there, in number; reads headers."""
        if self.theirs:
            return  # which `read` does
        tensors, layer = self.shards.tensors, self.layer
        forms = part_forms(torch.Size(layer.shape), layer.block_size, double_quant=False)
        for name in layer.names:
            for part, count in ((part, shape.numel()) for part, (_, shape) in forms.items()):
                held = tensors.get(f"{name}.{part}")
                if held is None or torch.Size(held.shape).numel() != count:
                    found = "none" if held is None else f"one of {held.shape}"
                    raise ValueError(
                        f"{self.shards.folder}: {name}.{part}: expected {count} elements for "
                        f"{layer.shape}, found {found}"
                    )

    def read(self, number: int, dtype: torch.dtype) -> NF4Tensor:
        """Return the weight, or that of one expert.

        Args:
            number: of the expert; 0 of all else.
            dtype: that it dequantizes to.

        Raises:
            ValueError: its tensors do not fit together, or scales are not finite; the message names
                them.
        """
        if not self.theirs:
            name = self.layer.names[number]
            q = read_weight(self.shards, name, self.layer, dtype)
        else:
            name = self.layer.becomes
            held = {key: self.shards.tensor(key) for key in self.parts()}
            try:
                q = replace(bitsandbytes.read(held, name), dtype=dtype)
            except ValueError as error:
                raise ValueError(f"{self.shards.folder}: {error}") from error
        for part in q.tensors():
            if part.is_floating_point() and not part.isfinite().all():
                raise ValueError(
                    f"{self.shards.folder}: {name}: expected finite scales, got NaN or an infinity"
                )
        return q


def stored_weights(shards: Shards, config: Mapping[str, Any]) -> list[StoredWeight]:
    """Return the 4-bit weights of a folder; none of a dense one.

    Args:
        shards: its files.
        config: of its ``config.json``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: another method has quantized it, or files and config do not agree.
    """
    said = config.get("quantization_config")
    file = shards.folder / "config.json"
    if said is None:
        return []
    method = said.get("quant_method") if isinstance(said, dict) else type(said).__name__
    if method == "nf4" and said.get("stored_as", "nf4") == "nf4":
        layers, _ = architectures().stored_layers(shards.folder, shards, said)
        found = [StoredWeight(layer, shards, theirs=False) for layer in layers]
    elif method == "nf4" or (method == "bitsandbytes" and said.get("load_in_4bit") is True):
        found = [_theirs(shards, name) for name in bitsandbytes.weights_in(shards.tensors)]
    else:
        raise ValueError(f"{file}: expected a dense model, or one in NF4, got one by {method!r}")
    if not found:
        raise ValueError(f"{file}: expected weights in four bits by {method}, found none")
    for weight in found:
        weight.check()
    return found


def _theirs(shards: Shards, name: str) -> StoredWeight:
    """Return a weight of bitsandbytes, of which its quant_state is read."""
    try:
        shape, block_size = bitsandbytes.form_of(
            {k: shards.tensor(k) for k in bitsandbytes.states_of(shards.tensors, name)}, name
        )
    except ValueError as error:
        raise ValueError(f"{shards.folder}: {error}") from error
    layer = StoredLayer("linear", (name,), name, shape, block_size)
    if name not in shards.tensors:
        raise ValueError(f"{shards.folder}: {name}: expected this tensor, found none")
    return StoredWeight(layer, shards, theirs=True)
