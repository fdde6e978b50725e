"""Put (IA)³ on a model: which layers make keys and values, and which end feed-forward blocks.

Source: https://arxiv.org/abs/2205.05638, section 3.3; what it is, nf4/adapters/ia3.py says.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nf4.adapters.ia3 import IA3
from nf4.adapters.targets import match_targets
from nf4.models.adapt import (
    find_targets,
    inside,
    layer_base,
    put_adapters,
    unwrapped,
    with_adapter,
)
from nf4.models.quantize import Model, check_model
from nf4.ops.checks import check_names

_BERT = (r".*\.(key|value)", r".*layer\.\d+\.output\.dense")
_LLAMA = (r".*\.(k_proj|v_proj)", r".*\.down_proj")
_FC2 = (r".*\.(k_proj|v_proj)", r".*\.fc2")
_FUSED = (r".*\.query_key_value", r".*\.dense_4h_to_h")
_GPT2 = (r".*\.c_attn", r".*\.mlp\.c_proj")
_T5 = (r".*Attention\.(k|v)", r".*\.wo")
# By config.model_type: the layers that make keys and values, and those that end a feed-forward
# block. Where one layer makes queries, keys and values, its queries get a factor too, as in PEFT.
KNOWN_TARGETS = {
    "albert": (r".*\.(key|value)", r".*\.ffn_output"),
    "bart": _FC2,
    "bert": _BERT,
    "bloom": _FUSED,
    "deberta": (r".*\.in_proj", r".*layer\.\d+\.output\.dense"),
    "deberta-v2": (r".*\.(key_proj|value_proj)", r".*layer\.\d+\.output\.dense"),
    "distilbert": (r".*\.(k_lin|v_lin)", r".*\.ffn\.lin2"),
    "electra": _BERT,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": (r".*\.(k_proj|v_proj)", r".*\.mlp\.c_proj"),
    "gpt_neox": _FUSED,
    "gptj": (r".*\.(k_proj|v_proj)", r".*\.fc_out"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mt5": _T5,
    "opt": _FC2,
    "phi": _FC2,
    "phi3": (r".*\.qkv_proj", r".*\.down_proj"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
}


def add_ia3(
    model: Model,
    target_modules: str | Iterable[str] | None = None,
    feedforward_modules: str | Iterable[str] | None = None,
    *,
    adapter_name: str = "default",
) -> Model:
    """Add (IA)³'s trainable factors to linear layers, and freeze everything else.

    They start at one: the first output is the base's. A layer may have several adapters, by name
    and of any kind; the one added last is active, see `nf4.set_adapter`.

    Args:
        model: a module with linear layers, `LinearNF4` or dense; changed in place.
        target_modules: the layers, named as for `nf4.add_lora`. By default those that make keys
            and values and those that end feed-forward blocks, for models whose
            ``config.model_type`` is known here.
        feedforward_modules: those of the targets whose inputs are scaled instead of their outputs;
            named likewise, none by default unless target_modules are the known ones.
        adapter_name: by which the adapter is chosen.

    Returns:
        The model; a new layer if the model itself is the layer.

    Raises:
        TypeError: model is no module, a name no string, or a target no linear layer.
        ValueError: no module matches target_modules or feedforward_modules, a feed-forward module
            is no target, a target has an adapter of that name, or the model is not known.

    Source: https://arxiv.org/abs/2205.05638, section 3.3.
    """
    check_model(model)
    if target_modules is None:
        target_modules, feedforward_modules = _known_targets(model, feedforward_modules)
    targets = find_targets(model, target_modules, adapter_name, IA3)
    inputs = _feedforward(model, feedforward_modules, targets)

    def make(name: str, layer: nn.Module) -> nn.Module:
        return with_adapter(layer, adapter_name, IA3(layer_base(layer), id(layer) in inputs))

    return put_adapters(model, targets, make, adapter_name)


def _known_targets(
    model: Any, feedforward_modules: str | Iterable[str] | None
) -> tuple[str, str | Iterable[str]]:
    """Return the targets for a model of a known type, and its feed-forward modules.

    Raises:
        ValueError: the type is not known.
    """
    kind = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
    if kind not in KNOWN_TARGETS:
        raise ValueError(
            "target_modules: expected names of layers for a model whose config.model_type is not "
            f"one of {', '.join(KNOWN_TARGETS)}, got None for {kind!r}"
        )
    keys_values, ends = KNOWN_TARGETS[kind]
    return f"{keys_values}|{ends}", ends if feedforward_modules is None else feedforward_modules


def _feedforward(
    model: nn.Module, modules: str | Iterable[str] | None, targets: Mapping[str, nn.Module]
) -> set[int]:
    """Return the ids of the layers whose inputs are to be scaled.

    Raises:
        TypeError: modules are no names.
        ValueError: modules name nothing, or what is no target.
    """
    if modules is None:
        return set()
    if not isinstance(modules, str):
        modules = check_names(modules, "feedforward_modules")
    if not modules:
        return set()
    known = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not inside(name, targets)
    }
    found = match_targets(known, modules, "feedforward_modules")
    if not found:
        raise ValueError(
            f"feedforward_modules: expected names of target_modules, {modules!r} matches none"
        )
    layers = {id(layer) for layer in targets.values()}
    for name in sorted(found):
        if id(known[name]) not in layers:
            raise ValueError(
                f"feedforward_modules: expected names of target_modules, {modules!r} matches "
                f"{name}, which is none of them"
            )
    return {id(known[name]) for name in found}
