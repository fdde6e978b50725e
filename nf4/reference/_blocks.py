"""Cut a flat tensor into blocks."""

from torch import Tensor
from torch.nn.functional import pad


def as_blocks(x: Tensor, block_size: int) -> Tensor:
    """Return ``[blocks, block_size]`` over the flattened x, the last block padded with zeros."""
    flat = x.reshape(-1)
    missing = -flat.numel() % block_size
    return (pad(flat, (0, missing)) if missing else flat).view(-1, block_size)
