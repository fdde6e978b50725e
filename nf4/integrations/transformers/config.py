"""How transformers' models are quantized, in words that ``config.json`` holds."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from nf4.models.selection import check_skip_modules
from nf4.ops.checks import check_block_size, check_scale

METHOD = "nf4"
_OPTIONS_OF_OTHERS = ("bnb_", "load_in_", "llm_int8_")


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` quantizes a model.

    Args:
        block_size: elements that share one scale, a power of two from 32 to 4096.
        double_quant: quantize the scales to 8 bits too.
        skip_modules: modules to leave dense, as in `nf4.quantize_model`. By default what
            transformers leaves alone: the output layer, and what is tied to the embeddings.
            Names replace that; names that begin with a plus are added to it.
        stored_as: what wrote the weights, of a checkpoint that is quantized already: "nf4" or
            "bitsandbytes", which no dense model can be asked to become.
        quantize_embeddings: quantize the embeddings of tokens too, and with them an output layer
            that is tied to them.
        codebook: "nf4", the only one; a checkpoint says so.
        scale: how scales are found, see `nf4.quantize`.
        forms: block size and double quantization of layers that differ from the rest, by name, of
            a checkpoint that is quantized.
        **unknown: refused.

    Raises:
        TypeError: an argument has the wrong type, or a name that is none.
        ValueError: block_size is not supported, or stored_as, codebook or scale another word.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: list[str] | str | None = None,
        stored_as: str = METHOD,
        quantize_embeddings: bool = False,
        codebook: str = "nf4",
        scale: str = "absmax",
        forms: Mapping[str, Sequence[Any]] | None = None,
        **unknown: Any,
    ) -> None:
        _check_known(unknown)
        for name, value in (
            ("double_quant", double_quant),
            ("quantize_embeddings", quantize_embeddings),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if stored_as not in (METHOD, "bitsandbytes"):
            raise ValueError(f"stored_as: expected 'nf4' or 'bitsandbytes', got {stored_as!r}")
        if codebook != "nf4":
            raise ValueError(f"codebook: expected 'nf4', got {codebook!r}")
        if skip_modules is not None:
            found = check_skip_modules(skip_modules)
            skip_modules = found if isinstance(found, str) else list(found)
        self.quant_method = METHOD
        self.block_size = check_block_size(block_size)
        self.double_quant = double_quant
        self.skip_modules = skip_modules
        self.stored_as = stored_as
        self.quantize_embeddings = quantize_embeddings
        self.codebook, self.scale = codebook, check_scale(scale)
        self.forms = _check_forms(forms)

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig | dict[str, Any]) -> "NF4Config":
        """Return the config that opens a checkpoint of bitsandbytes as nf4's.

        Args:
            config: that of the checkpoint: ``AutoConfig.from_pretrained(path)`` has it as
                ``quantization_config``; put the result's ``to_dict()`` in its place and pass the
                whole as ``config`` to ``from_pretrained``.

        Raises:
            TypeError: config is none of bitsandbytes.
            ValueError: the checkpoint is not NF4.
        """
        if isinstance(config, dict):
            if not config.get("load_in_4bit"):
                raise ValueError(f"config: expected one with load_in_4bit, got {config}")
            config = BitsAndBytesConfig.from_dict(config)
        if not isinstance(config, BitsAndBytesConfig):
            raise TypeError(f"config: expected a BitsAndBytesConfig, got {type(config).__name__}")
        if not config.load_in_4bit or config.bnb_4bit_quant_type != "nf4":
            raise ValueError(
                "config: expected load_in_4bit with bnb_4bit_quant_type 'nf4', got "
                f"{config.bnb_4bit_quant_type!r} with load_in_4bit={config.load_in_4bit}"
            )
        return cls(
            double_quant=config.bnb_4bit_use_double_quant,
            skip_modules=config.llm_int8_skip_modules,
            stored_as="bitsandbytes",
        )


_OPTIONS = [name for name in inspect.signature(NF4Config).parameters if name != "unknown"]


def _check_known(unknown: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if there are options that `NF4Config` does not have."""
    for name in unknown:
        if name == "quant_method":  # as config.json has it
            if unknown[name] != METHOD:
                raise ValueError(f"quant_method: expected {METHOD!r}, got {unknown[name]!r}")
            continue
        if name.startswith(_OPTIONS_OF_OTHERS):
            raise ValueError(
                f"{name}: expected options of nf4, got one of bitsandbytes; see "
                "NF4Config.from_bitsandbytes"
            )
        near = difflib.get_close_matches(name, _OPTIONS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(
            f"{name}: expected options of NF4Config ({', '.join(_OPTIONS)}), got {name!r}{hint}"
        )


def _check_forms(forms: Any) -> dict[str, list[Any]] | None:
    """Return block size and double quantization of layers by name, or raise TypeError."""
    if forms is None:
        return None
    if not isinstance(forms, Mapping):
        raise TypeError(f"forms: expected sizes by name of layer, got {type(forms).__name__}")
    found: dict[str, list[Any]] = {}
    for name, form in forms.items():
        if not isinstance(form, list | tuple) or len(form) != 2 or not isinstance(form[1], bool):
            raise TypeError(f"forms: expected [block size, bool] for {name!r}, got {form!r}")
        found[name] = [check_block_size(form[0]), form[1]]
    return found
