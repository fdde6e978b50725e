"""How dropout decides, the same in the reference and in every kernel."""


def dropout_threshold(p: float) -> int:
    """Return the least of 16 random bits for which an element is kept: p * 2**16, rounded.

    It stays below 2**16, so that something is kept whatever p below 1.
    """
    return min(round(p * 2**16), 2**16 - 1)
