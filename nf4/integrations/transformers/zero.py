"""Refuse DeepSpeed's ZeRO-3, which takes parameters apart itself.

ZeRO-3 leaves an empty tensor in the place of every parameter, frozen integers and scales too, and
gathers a module's own ones by hooks around its forward (``deepspeed.zero``, "Gathering parameters",
https://deepspeed.readthedocs.io/en/stable/zero3.html). 4-bit layers are read outside their forward
too: to save, load and merge them. ZeRO-1 and ZeRO-2 leave parameters whole.
"""

from transformers.integrations import is_deepspeed_zero3_enabled


def refuse_zero3(name: str) -> None:
    """Raise ValueError if transformers' models are to be partitioned by ZeRO-3.

    Args:
        name: of what has been asked for, to begin the message with.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{name}: expected 4-bit weights that stay whole or are sharded by torch, got "
            "DeepSpeed ZeRO-3, which partitions the packed integers and scales itself and leaves "
            "empty tensors in their place; use torch's fully_shard (FSDP2), or ZeRO-2"
        )
