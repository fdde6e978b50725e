"""Layers split over the processes of tensor parallelism, each of which has a part of the weight.

A layer becomes the layer of its part: a smaller one, with plain tensors, so that it computes as any
other. Its ``state_dict`` is that of the whole layer all the same: ``packed`` a DTensor of which
each process holds its part, the scales whole. Processes ask for it together, as for any DTensor.

Scales of scales are shared by 256 blocks, which lie one after another in the whole weight. Where a
part does not hold them together, it has its scales in fp32: the same values, four bytes each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nf4.adapters.lora import LoRA
from nf4.adapters.term import Adapter, QuantizedBase
from nf4.codebook import ABSMAX_BLOCK_SIZE, BLOCK_SIZES
from nf4.functional import to_rows
from nf4.reference.dequantize_absmax import dequantize_absmax
from nf4.tensor import PARTS, NF4Tensor, packed_shape, part_forms
from nf4.tools.ranks import distributed, is_sharded, replicated, whole

# Buffers that a split layer has beside: codes of its part's scales, where it has these in fp32, and
# else its part of absmax2. Its own absmax2 and offset are those of the whole weight
OWN = ("part_absmax", "part_absmax2")


@dataclass(frozen=True, eq=False)
class Split:
    """Which part of a weight a process has.

    Attributes:
        mesh: of the processes, a DeviceMesh of one dimension.
        dim: 0 for rows of the weight, outputs of the layer; 1 for columns, its inputs.
        shape: of the whole weight.
        block_size: of the weight.
        double_quant: of the weight.
    """

    mesh: Any
    dim: int
    shape: torch.Size
    block_size: int
    double_quant: bool

    @property
    def _step(self) -> int:
        ranks: int = self.mesh.size()
        return -(-self.shape[self.dim] // ranks)

    @property
    def _start(self) -> int:
        return int(self._step * self.mesh.get_local_rank())

    @property
    def part_shape(self) -> torch.Size:
        """Sizes of the part that this process has."""
        sizes = list(self.shape)
        sizes[self.dim] = min(self._step, sizes[self.dim] - self._start)
        return torch.Size(sizes)

    @property
    def _keeps_codes(self) -> bool:
        """Whether every process has whole groups of blocks."""
        blocks = self._step * (self.shape[1] // self.block_size)
        return not self.double_quant or (self.dim == 0 and blocks % ABSMAX_BLOCK_SIZE == 0)

    def check(self) -> None:
        """Raise ValueError unless the weight can be split so."""
        (n, k), ranks = self.shape, self.mesh.size()
        if k % self.block_size:
            raise ValueError(
                f"expected in_features a multiple of block_size {self.block_size}, got {k}: blocks "
                "lie in one row only then"
            )
        if self.dim == 0:
            if self._step * (ranks - 1) >= n:
                raise ValueError(
                    f"expected rows of the weight for each of {ranks} processes, got {n}"
                )
        elif k % (ranks * self.block_size):
            sizes = [b for b in BLOCK_SIZES if not k % (ranks * b)]
            numbers = [r for r in range(2, 65) if not k % (r * self.block_size)]
            raise ValueError(
                f"expected in_features a multiple of processes × block_size, {ranks} × "
                f"{self.block_size}, got {k}; block sizes that work: {_listed(sizes)}; "
                f"numbers of processes up to 64: {_listed(numbers)}"
            )

    def _cut(self, tensor: Tensor, columns: int) -> Tensor:
        """Return this process's part, one after another, of what a matrix has so many columns of.

        Args:
            tensor: of the whole weight, any number for each of its elements.
            columns: how many a row of the whole weight has.
        """
        per = self.shape[1] // columns if self.dim else 1
        size = self.part_shape[self.dim] // per
        cut = tensor.view(-1, columns).narrow(self.dim, self._start // per, size)
        return cut.clone(memory_format=torch.contiguous_format)

    def part(self, q: NF4Tensor) -> NF4Tensor:
        """Return this process's part of the whole weight, in rows, as tensors of its own.

        Args:
            q: the whole weight, or all scales and the part of ``packed``.
        """
        k = self.shape[1]
        blocks = k // self.block_size
        shape = packed_shape(self.part_shape)
        is_part = q.packed.shape == shape
        packed = q.packed.clone() if is_part else self._cut(q.packed, k // 2).view(shape)
        parts: tuple[Tensor | None, ...]
        if q.absmax2 is None or q.offset is None:
            parts = (packed, self._cut(q.absmax, blocks).view(-1), None, None)
        elif self._keeps_codes:
            codes = self._cut(q.absmax, blocks).view(-1)
            start = self._start * blocks // ABSMAX_BLOCK_SIZE
            groups = -(-codes.numel() // ABSMAX_BLOCK_SIZE)
            parts = (packed, codes, q.absmax2[start : start + groups].clone(), q.offset.clone())
        else:
            scales = dequantize_absmax(q.absmax, q.absmax2, q.offset)
            parts = (packed, self._cut(scales, blocks).view(-1), None, None)
        return q.with_parts(parts, shape=self.part_shape)

    def place(self, layer: Any, q: NF4Tensor) -> None:
        """Let a layer hold its part of the whole weight."""
        old = layer._parameters.get("packed")
        blocks = self.shape[1] // self.block_size
        codes = None if self._keeps_codes else self._cut(q.absmax, blocks).view(-1)
        layer.register_buffer("part_absmax", codes, persistent=False)
        for name, tensor in (("absmax2", q.absmax2), ("offset", q.offset)):
            layer.register_buffer(name, None if tensor is None else tensor.detach().clone())
        part = self.part(q)
        if is_sharded(old):  # by fully_shard
            part = part.with_parts((distributed(part.packed, old), *part.parts()[1:]))
        layer._hold(part)

    def _shared(self, part: Tensor, columns: int) -> Tensor:
        """Return a DTensor of which each process has its part: a matrix of so many columns."""
        from torch.distributed.tensor import DTensor, Shard

        shape, stride = torch.Size((self.shape[0], columns)), (columns, 1)
        placements = [Shard(self.dim)]
        return DTensor.from_local(
            part, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def save(self, layer: Any, destination: dict[str, Any], prefix: str) -> None:
        """Put the whole weight in a state dict, in place of the part.

        Scales of a layer that awaits its values are whole already.
        """
        k = self.shape[1]
        blocks = k // self.block_size
        if layer.awaits:
            part = whole(layer.packed.detach()).view(self.part_shape[0], -1)
            destination[prefix + "packed"] = self._shared(part, k // 2)
            return
        q = layer.held()
        q = to_rows(q.with_parts((whole(q.packed), *q.parts()[1:])))
        rows = q.packed.view(self.part_shape[0], -1)
        packed = self._shared(rows, k // 2)
        codes = q.absmax if layer.part_absmax is None else layer.part_absmax
        absmax = whole(self._shared(codes.view(self.part_shape[0], -1), blocks))
        for name in PARTS:
            destination.pop(prefix + name, None)
        destination[prefix + "packed"] = packed
        scales = (absmax.view(-1), layer.absmax2, layer.offset)
        for name, tensor in zip(PARTS[1:], scales, strict=True):
            if tensor is not None:
                destination[prefix + name] = replicated(tensor.detach(), packed)

    def load(self, layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
        """Hold the part of the whole weight in a state dict, and put there what is held."""
        names = PARTS if self.double_quant else PARTS[:2]
        if any(prefix + name not in state_dict for name in names):
            return
        device = layer.packed.device
        tensors: list[Tensor | None] = [None] * len(PARTS)
        for i, name in enumerate(names):
            given = state_dict.pop(prefix + name).detach()
            is_part = name == "packed" and self._is_part(given)
            tensor = given.to_local() if is_part else whole(given)
            tensors[i] = tensor if device.type == "meta" else tensor.to(device)
        self.place(layer, layer.held().with_parts(tensors, shape=self.shape, layout="rows"))
        for name in PARTS:
            held = layer._parameters.get(name)
            held = layer._buffers.get(name) if held is None else held
            if held is not None:
                state_dict[prefix + name] = held

    def _is_part(self, tensor: Any) -> bool:
        """Return whether a tensor is a DTensor of which each process has its part."""
        from torch.distributed.tensor import Shard

        return is_sharded(tensor) and (tensor.device_mesh, *tensor.placements) == (
            self.mesh,
            Shard(self.dim),
        )

    def settle(self, layer: Any) -> None:
        """Let a layer that has its part of ``packed``, and all scales, hold its part of those."""
        q = layer.held()
        self.place(layer, q.with_parts(q.parts(), shape=self.shape))
        layer.awaits = False
        layer._choose_layout()

    def carry(self, old: Any, new: Any) -> None:
        """Let a layer around another's part be one of a part too; its hooks come with others'.

        Raises:
            ValueError: it is around another weight.
        """
        if new.packed.data_ptr() != old.packed.data_ptr():
            old.check_whole("give another weight")
        for name in OWN:
            new.register_buffer(name, getattr(old, name), persistent=False)
        for name in ("absmax2", "offset"):
            new.register_buffer(name, getattr(old, name))
        new.split = self
        new._hold(old.held())
        new.bias = old.bias

    def scales(self, layer: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return absmax2 and offset of a layer's part; none where its scales are in fp32."""
        if layer.awaits:
            return layer.absmax2, layer.offset
        return layer.part_absmax2, None if layer.part_absmax2 is None else layer.offset

    def base(self, layer: Any) -> QuantizedBase:
        """Return what tells the whole weight's sizes, for adapters to be made; no product."""
        q = layer.held()
        return QuantizedBase(q.with_parts(q.parts(), shape=self.shape))

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise ValueError unless an adapter's parts compute parts of what it does."""
        if not adapter.splits:
            what = "DoRA" if isinstance(adapter, LoRA) else type(adapter).__name__
            raise ValueError(f"expected LoRA adapters on a layer that is split, got {what}")

    def share(self, adapter: Any) -> None:
        """Make an adapter's factors DTensors: one sharded as the weight is, the other whole.

        The first process's values count.
        """
        self.check_adapter(adapter)
        if is_sharded(adapter.lora_A):
            return
        from torch.distributed.tensor import Replicate, Shard

        a, b = (Shard(1), Replicate()) if self.dim else (Replicate(), Shard(0))
        adapter.lora_A = self.shared_parameter(adapter.lora_A, a)
        adapter.lora_B = self.shared_parameter(adapter.lora_B, b)

    def shared_parameter(self, tensor: Tensor, placement: Any) -> nn.Parameter:
        """Return a parameter as a DTensor; the first process's values count."""
        from torch.distributed.tensor import distribute_tensor

        placed = distribute_tensor(tensor.detach(), self.mesh, [placement])
        return nn.Parameter(placed, requires_grad=tensor.requires_grad)

    def forms(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtype and shape of each part of the whole weight."""
        return part_forms(self.shape, self.block_size, self.double_quant)

    def bias(self, bias: Any) -> Tensor | None:
        """Return what a part adds to its product: of columns nothing, for parts are summed."""
        if bias is None or self.dim:
            return None
        local: Tensor = bias.to_local() if is_sharded(bias) else bias
        return local

    def __str__(self) -> str:
        """Describe it in ``print(model)``."""
        n, k = self.shape
        return f"{'columns' if self.dim else 'rows'} of {n} x {k} over {self.mesh.size()} processes"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
