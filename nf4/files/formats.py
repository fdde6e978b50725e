"""The formats that `nf4.export_checkpoint` writes, by name."""

FORMATS = ("bitsandbytes",)


def check_format(format: str) -> str:
    """Return the name of a format, or raise ValueError if there is none of that name."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    return format
