"""The weights of well-known models' linear layers, for tuning and for benchmarks."""

# W ``[N, K]`` of each distinct linear layer
MODELS = {
    "llama-3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "llama-3-70b": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
    "qwen3-32b": [(8192, 5120), (1024, 5120), (5120, 8192), (25600, 5120), (5120, 25600)],
}


def parse_shape(text: str) -> tuple[int, int]:
    """Return a shape given as ``"4096x4096"``.

    Raises:
        ValueError: the text is no shape.
    """
    n, _, k = text.replace("×", "x").partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise ValueError(f"shapes: expected NxK such as 4096x4096, got {text}")
    return int(n), int(k)
