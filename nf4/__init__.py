"""4-bit NormalFloat (QLoRA) for PyTorch.

Quantize tensors, layers and models to NF4, multiply by them, train adapters on them, and measure
what four bits cost. Importing this package needs neither a GPU nor Triton, and no
torch either: what needs it is imported with it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nf4.integrations.lazy import import_with, when_imported

if TYPE_CHECKING:
    from nf4 import losses
    from nf4.error.activations import collect_activation_stats
    from nf4.error.measured import model_error, quantization_error
    from nf4.error.theory import expected_error
    from nf4.files.checkpoint import save_adapter
    from nf4.files.export import export_checkpoint
    from nf4.files.loading import load_adapter
    from nf4.files.merging import merge_checkpoint
    from nf4.files.stream import quantize_checkpoint
    from nf4.functional import (
        dequantize,
        embedding,
        linear,
        lora_linear,
        quantize,
        to_fragments,
        to_rows,
    )
    from nf4.layers.bitsandbytes import from_bitsandbytes, to_bitsandbytes
    from nf4.layers.embedding import EmbeddingNF4
    from nf4.layers.linear import LinearNF4
    from nf4.layers.parallel import ColwiseParallel, RowwiseParallel
    from nf4.layers.qlora import QLoRALinear
    from nf4.models.adapt import disable_adapter, mixed_batch, set_adapter
    from nf4.models.fuse import fuse_projections, unfuse_projections
    from nf4.models.kinds.adamix import add_adamix, merge_adamix
    from nf4.models.kinds.ia3 import add_ia3
    from nf4.models.kinds.lora import add_lora
    from nf4.models.merge import merge
    from nf4.models.quantize import quantize_model
    from nf4.ops.choice import explain
    from nf4.tensor import NF4Tensor
    from nf4.tools.scratch import release_scratch

__version__ = "0.1.0"
__all__ = [
    "ColwiseParallel",
    "EmbeddingNF4",
    "LinearNF4",
    "NF4Tensor",
    "QLoRALinear",
    "RowwiseParallel",
    "add_adamix",
    "add_ia3",
    "add_lora",
    "collect_activation_stats",
    "dequantize",
    "disable_adapter",
    "embedding",
    "expected_error",
    "explain",
    "export_checkpoint",
    "from_bitsandbytes",
    "fuse_projections",
    "linear",
    "load_adapter",
    "lora_linear",
    "losses",
    "merge",
    "merge_adamix",
    "merge_checkpoint",
    "mixed_batch",
    "model_error",
    "quantization_error",
    "quantize",
    "quantize_checkpoint",
    "quantize_model",
    "release_scratch",
    "save_adapter",
    "set_adapter",
    "to_bitsandbytes",
    "to_fragments",
    "to_rows",
    "unfuse_projections",
]


# What quantizes and multiplies is there as soon as torch is: names by module
_WITH_TORCH: dict[str, tuple[str, ...]] = {
    "nf4.losses": (),
    "nf4.functional": (
        *("dequantize", "embedding", "linear", "lora_linear", "quantize"),
        *("to_fragments", "to_rows"),
    ),
    "nf4.layers.bitsandbytes": ("from_bitsandbytes", "to_bitsandbytes"),
    "nf4.layers.embedding": ("EmbeddingNF4",),
    "nf4.layers.linear": ("LinearNF4",),
    "nf4.layers.qlora": ("QLoRALinear",),
    "nf4.models.adapt": ("disable_adapter", "mixed_batch", "set_adapter"),
    "nf4.models.merge": ("merge",),
    "nf4.models.quantize": ("quantize_model",),
    "nf4.ops.choice": ("explain",),
    "nf4.tensor": ("NF4Tensor",),
    "nf4.tools.scratch": ("release_scratch",),
}
# What neither quantizes nor multiplies, and is imported when it is asked for: where it is
_LATER = {
    "add_adamix": "nf4.models.kinds.adamix",
    "add_ia3": "nf4.models.kinds.ia3",
    "add_lora": "nf4.models.kinds.lora",
    "collect_activation_stats": "nf4.error.activations",
    "expected_error": "nf4.error.theory",
    "export_checkpoint": "nf4.files.export",
    "ColwiseParallel": "nf4.layers.parallel",
    "RowwiseParallel": "nf4.layers.parallel",
    "fuse_projections": "nf4.models.fuse",
    "load_adapter": "nf4.files.loading",
    "merge_adamix": "nf4.models.kinds.adamix",
    "merge_checkpoint": "nf4.files.merging",
    "model_error": "nf4.error.measured",
    "quantization_error": "nf4.error.measured",
    "quantize_checkpoint": "nf4.files.stream",
    "save_adapter": "nf4.files.checkpoint",
    "unfuse_projections": "nf4.models.fuse",
}
# Parts of the package that are imported with torch
_ROOMS = (
    *("adapters", "codebook", "functional", "layers", "models", "ops", "reference", "tensor"),
    "tools",
)


def _import_with_torch() -> None:
    """Import what quantizes and multiplies, whole, so that no later look-up meets `__getattr__`."""
    for module, names in _WITH_TORCH.items():
        found = import_module(module)
        globals().update({name: getattr(found, name) for name in names})


def _follow_torch() -> None:
    """Import what needs torch, unless a module of this package is being executed right now.

    That one is not whole yet, and imports what it needs itself.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        name = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and name.startswith("nf4."):
            return
    _import_with_torch()


def __getattr__(name: str) -> Any:
    """Import what is not needed at once: torch takes a second, scipy longer than all of nf4."""
    if name in ("error", "files"):  # with the parts that the names above are in
        for module in {m for m in _LATER.values() if m.startswith(f"nf4.{name}.")}:
            if not module.endswith("theory"):
                import_module(module)
        return globals()[name]
    if name in _LATER:
        value = globals()[name] = getattr(import_module(_LATER[name]), name)
        return value
    if name in _ROOMS:
        _follow_torch()
        return import_module(f"nf4.{name}")
    if name in __all__:
        _import_with_torch()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names there are, those not yet imported too."""
    return sorted({*globals(), *__all__})


when_imported("torch", _follow_torch)
# transformers and PEFT know 4-bit layers as soon as they are there, and cost nothing before
import_with("transformers.modeling_utils", "nf4.integrations.transformers")
import_with("transformers.trainer", "nf4.integrations.transformers.training")
import_with("peft", "nf4.integrations.peft")
