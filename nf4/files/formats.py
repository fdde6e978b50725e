"""The formats that `nf4.export_checkpoint` writes, and dtypes of dense weights, by name."""

from typing import Any

FORMATS = ("bitsandbytes",)
# As config.json calls them
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def check_format(format: str) -> str:
    """Return the name of a format, or raise ValueError if there is none of that name."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return format


def check_dtype(dtype: Any) -> str:
    """Return a dtype as config.json calls it, of a short or long name or torch's own.

    Raises:
        ValueError: it is none that weights are written in.
    """
    name = str(dtype).removeprefix("torch.")
    name = DTYPE_NAMES.get(name, name)
    if name not in DTYPE_NAMES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPE_NAMES)}, got {dtype}")
    return name
