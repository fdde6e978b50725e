"""Tensor parallelism of 4-bit layers: styles for ``torch.distributed.tensor.parallel``.

    from torch.distributed.tensor.parallel import parallelize_module
    parallelize_module(model, mesh, {
        "model.layers.*.self_attn.q_proj": nf4.ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": nf4.RowwiseParallel(),
    })

They take the place of torch's styles of the same names, whose arguments they have, and do for
dense layers what those do. A 4-bit layer becomes the layer of its part, see nf4/layers/split.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import parallel as shipped

from nf4.adapters.factor_parts import local_factor
from nf4.adapters.layer import AdaptedLayer
from nf4.layers.group import leave
from nf4.layers.linear import LinearNF4
from nf4.layers.module import QuantizedModule
from nf4.layers.split import Split
from nf4.tensor import NF4Tensor
from nf4.tools.ranks import is_sharded


class _Style:
    """What both styles have in common, before torch's own class."""

    _dim: int  # of the weight
    input_layouts: Any
    _enter: Callable[..., Any]  # called before a layer, and after it
    _leave: Callable[..., Any]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, QuantizedModule):
            split_layer(module, device_mesh, self._dim, self)
            return module
        applied: nn.Module = super()._apply(module, device_mesh)  # type: ignore[misc]
        return applied

    def attach(self, layer: nn.Module) -> None:
        """Take a layer's inputs and give its outputs."""
        layer.register_forward_pre_hook(self._take, with_kwargs=True)
        layer.register_forward_hook(self._leave)

    def _take(self, layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x = args[0] if args else named.pop("input")
        return (self._enter(layer, x), *args[1:]), named

    def _shared(self, layer: Any, x: Tensor) -> DTensor:
        """Return an input as a DTensor, placed as the style's argument says if it is plain."""
        if isinstance(x, DTensor):
            return x
        return DTensor.from_local(x, layer.split.mesh, self.input_layouts, run_check=False)


class ColwiseParallel(_Style, shipped.ColwiseParallel):
    """Split a layer's outputs, rows of its weight: each process computes some of them.

    Takes a `LinearNF4` or `QLoRALinear`, with ``lora_B`` split and ``lora_A`` whole, and what
    torch's style takes.

    Args:
        input_layouts: placement of the input, by default Replicate(): each process has all of it.
        output_layouts: placement of the output, by default Shard(-1): each has its columns.
        use_local_output: whether the output is a plain tensor, of this process's part.

    Raises:
        ValueError: of parallelize_module: the layer cannot be split so; the message says how it
            can.
    """

    _dim = 0

    def _enter(self, layer: Any, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor) and self.input_layouts == (Replicate(),):
            return _summed_backward(x, layer.split.mesh)
        shared = self._shared(layer, x).redistribute(placements=[Replicate()])
        local: Tensor = shared.to_local(grad_placements=[Partial()])
        return local

    def _leave(self, layer: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if self.use_local_output and self.output_layouts == (Shard(-1),):
            return y
        shape = torch.Size((*y.shape[:-1], layer.split.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = layer.split.mesh
        out = DTensor.from_local(
            y, mesh, [Shard(y.ndim - 1)], run_check=False, shape=shape, stride=stride
        )
        out = out.redistribute(placements=self.output_layouts)
        return out.to_local() if self.use_local_output else out


class RowwiseParallel(_Style, shipped.RowwiseParallel):
    """Split a layer's inputs, columns of its weight: each process's product is a part of a sum.

    Takes a `LinearNF4` or `QLoRALinear`, with ``lora_A`` split and ``lora_B`` whole, and what
    torch's style takes. in_features has to be a multiple of processes × block_size.

    Args:
        input_layouts: placement of the input, by default Shard(-1): each process has its columns.
        output_layouts: placement of the output, by default Replicate(): each has all of it.
        use_local_output: whether the output is a plain tensor, of this process's part.

    Raises:
        ValueError: of parallelize_module: the layer cannot be split so; the message says how it
            can.
    """

    _dim = 1

    def _enter(self, layer: Any, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor) and self.input_layouts == (Shard(-1),):
            return x
        shared = self._shared(layer, x).redistribute(placements=[Shard(x.ndim - 1)])
        local: Tensor = shared.to_local()
        return local

    def _leave(self, layer: Any, args: tuple[Any, ...], y: Tensor) -> Tensor:
        mesh, bias = layer.split.mesh, layer.bias
        if self.output_layouts == (Replicate(),):
            y = _summed(y, mesh)
        else:
            out = DTensor.from_local(y, mesh, [Partial()], run_check=False)
            y = out.redistribute(placements=self.output_layouts).to_local()
        if bias is not None:  # where each has a part of the output, gradients of it are summed
            own = bias.to_local() if self.output_layouts == (Replicate(),) else local_factor(bias)
            y = y + own.to(y.dtype)
        if self.use_local_output:
            return y
        return DTensor.from_local(y, mesh, self.output_layouts, run_check=False)


def split_layer(
    layer: QuantizedModule, mesh: DeviceMesh, dim: int, style: Any, awaits: bool = False
) -> None:
    """Make a layer that of this process's part.

    Args:
        layer: a `LinearNF4` or `QLoRALinear`; changed in place.
        mesh: of the processes.
        dim: 0 for rows of the weight, 1 for columns.
        style: takes its inputs and gives its outputs.
        awaits: whether values are to be loaded by transformers, which wants all scales whole;
            `Split.settle` is to be called then.

    Raises:
        TypeError: the layer is of another kind.
        ValueError: it is split already or sharded, has other adapters than LoRA, or sizes that
            cannot be split so.
    """
    if not isinstance(layer, LinearNF4):
        raise TypeError(f"expected LinearNF4 or QLoRALinear to split, got {type(layer).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of one dimension, got {mesh.ndim}: choose one by name")
    if layer.split is not None or is_sharded(layer.packed):
        found = "one of fully_shard" if layer.split is None else f"{layer.split}"
        raise ValueError(f"expected a whole layer to split, got {found}; fully_shard comes after")
    adapters = layer.named_adapters().values() if isinstance(layer, AdaptedLayer) else ()
    shape = torch.Size((layer.out_features, layer.in_features))
    split = Split(mesh, dim, shape, layer.block_size, layer.double_quant)
    split.check()
    for adapter in adapters:
        split.check_adapter(adapter)
    leave(layer)
    layer.to_rows()
    q: NF4Tensor = layer.weight
    layer.out_features, layer.in_features = split.part_shape
    if awaits:
        layer._hold(q.with_parts((split.part(q).packed, *q.parts()[1:])))
        layer.split = split
    else:
        layer.split = split
        split.place(layer, q)
        layer._choose_layout()
    if layer.bias is not None:
        layer.bias = split.shared_parameter(layer.bias, Replicate() if dim else Shard(0))
    for adapter in adapters:
        split.share(adapter)
    style.attach(layer)


def _sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of what each process has."""
    started = collectives.all_reduce(x.contiguous(), "sum", mesh)
    found: Tensor = collectives.wait_tensor(started)  # type: ignore[no-untyped-call]
    return found


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum of what each process has; each gets all of its gradient."""
    found: Tensor = _Summed.apply(x, mesh)  # type: ignore[no-untyped-call]
    return found


def _summed_backward(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return x; gradients are summed, as each process's product is one of a part of the weight."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _SummedBackward.apply(x, mesh)  # type: ignore[no-untyped-call]
        return found
    return x


class _SummedBackward(torch.autograd.Function):
    """What each process has whole; gradients of it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum(grads[0], ctx.mesh), None


class _Summed(torch.autograd.Function):
    """The sum of what each process has; each gets all of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        return _sum(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None
