"""What a backend chooses for a product: which way it goes, why, and how long that should take."""

from typing import NamedTuple


class Choice(NamedTuple):
    """How something is computed.

    Attributes:
        how: the way, one of those that its backend has.
        reason: why, in a sentence.
        seconds: time of the product by nf4/tools/cost.py, modelled and not measured; None off a
            GPU.
        function: what computes, where `how` is a part of it and no kernel's name.
    """

    how: str
    reason: str
    seconds: float | None = None
    function: str = ""

    @property
    def kernel(self) -> str:
        """What runs: a kernel on a GPU, else a function."""
        return self.function or self.how

    @property
    def modelled_seconds(self) -> float | None:
        """The same as `seconds`."""
        return self.seconds

    def __str__(self) -> str:
        """Return one line."""
        time = "" if self.seconds is None else f"; modelled: {1e6 * self.seconds:.1f} µs"
        return f"{self.kernel}: {self.reason}{time}"
