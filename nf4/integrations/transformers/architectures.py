"""What transformers knows of the models in folders, for nf4/files/ to ask; imported when asked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nf4.files.architectures import KNOWN, Found, Layout, Plan, StoredLayer
from nf4.tools.shards import Shards


class TransformersArchitectures:
    """Asks transformers' classes."""

    def find(
        self, folder: Path, tensors: Iterable[str], skip_modules: str | Iterable[str]
    ) -> list[Found] | None:
        """Return the weights of a folder that are linear layers'."""
        from nf4.integrations.transformers.dense_layers import find

        return find(folder, tensors, skip_modules)

    def make_plan(
        self,
        folder: Path,
        skip_modules: str | Iterable[str] | None,
        options: dict[str, Any],
        shards: Shards,
    ) -> Plan:
        """Return what is to be quantized of a folder."""
        from nf4.integrations.transformers.dense_layers import make_plan

        return make_plan(folder, skip_modules, options, shards)

    def stored_layers(
        self, folder: Path, shards: Shards, said: Mapping[str, Any]
    ) -> tuple[list[StoredLayer], list[str]]:
        """Return the 4-bit weights of a folder, and which linear layers are dense."""
        from nf4.integrations.transformers.stored_layers import stored_layers

        return stored_layers(folder, shards, said)

    def layout(
        self, shards: Shards, stored: Sequence[StoredLayer], names: Iterable[str], dtype: str
    ) -> Layout:
        """Return how a folder's model and its tensors belong together."""
        from nf4.integrations.transformers.layout import layout

        return layout(shards, stored, names, dtype)


def install() -> None:
    """Let nf4/files/ ask transformers; once."""
    if not any(isinstance(known, TransformersArchitectures) for known in KNOWN):
        KNOWN.append(TransformersArchitectures())
