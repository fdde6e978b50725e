"""Weights whose parts are sharded over processes, as DTensors of which each holds its share.

`torch.distributed.fsdp.fully_shard` makes them of a layer's parameters, and gathers them while the
layer computes. What is here is for the time between: files are in rows, whatever the layout.
"""

from torch import nn

from nf4.functional import to_fragments, to_rows
from nf4.layers.split import Split
from nf4.tensor import NF4Tensor
from nf4.tools.ranks import Company, distributed, is_sharded, reshard, whole


def repacked(q: NF4Tensor, layout: str) -> NF4Tensor:
    """Return a weight in a layout, sharded as it was: then each process of its mesh has to ask."""
    if q.layout == layout:
        return q
    repack = to_rows if layout == "rows" else to_fragments
    if not is_sharded(q.packed):
        return repack(q)
    found = repack(q.with_parts([None if part is None else whole(part) for part in q.parts()]))
    packed, absmax = distributed(found.packed, q.packed), distributed(found.absmax, q.absmax)
    return found.with_parts((packed, absmax, q.absmax2, q.offset))


def company_of(model: nn.Module) -> Company:
    """Return the processes that have parts of a model, which is sharded from now on."""
    reshard(model)
    meshes = {}
    for parameter in model.parameters():
        if is_sharded(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            meshes[id(mesh)] = mesh
    for module in model.modules():
        split = getattr(module, "split", None)
        if isinstance(split, Split):
            meshes[id(split.mesh)] = split.mesh
    return Company(meshes.values())
