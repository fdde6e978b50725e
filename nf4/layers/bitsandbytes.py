"""The tensors that bitsandbytes writes for a 4-bit weight, read and made.

    weight                               uint8 ``[ceil(n / 2), 1]``, or its bytes in a float dtype
    weight.absmax                        float32 ``[blocks]``; uint8 with double quantization
    weight.quant_map                     float32 ``[16]``, the codebook
    weight.nested_absmax                 float32 ``[ceil(blocks / 256)]``
    weight.nested_quant_map              float32 ``[256]``
    weight.quant_state.bitsandbytes__nf4 uint8, JSON: sizes, dtype, offset

The nested ones are there with double quantization only.
Format: bitsandbytes 0.50, `QuantState.as_dict`.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from nf4.codebook import ABSMAX_BLOCK_SIZE, BLOCK_SIZES, absmax_map, nf4_levels
from nf4.functional import dequantize
from nf4.ops.checks import check_number
from nf4.tensor import DTYPES, PARTS, NF4Tensor, check_nf4, is_finite, packed_shape

_STATE = ".quant_state.bitsandbytes__"
_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_CPU = torch.device("cpu")


def weights_in(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the names of the 4-bit weights that bitsandbytes wrote, such as ``"fc.weight"``."""
    return [key.partition(_STATE)[0] for key in state_dict if _STATE in key]


def take(state_dict: MutableMapping[str, Any], name: str) -> NF4Tensor:
    """Remove a weight's tensors from a state dict and return them as one quantized tensor.

    Args:
        state_dict: as bitsandbytes writes it; unchanged if an error is raised.
        name: of the weight, such as ``"fc.weight"``.

    Raises:
        ValueError: a tensor is missing or does not fit, or the weight is not NF4 with
            bitsandbytes' own codebooks; the message names the tensor.
    """
    q = read(state_dict, name)
    for key in names_of(state_dict, name):
        del state_dict[key]
    return q


def names_of(state_dict: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of all tensors there are of a 4-bit weight."""
    known = (name, *_keys(name))
    return [key for key in known if key in state_dict] + states_of(state_dict, name)


def states_of(state_dict: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of a weight's quant_state: one, if all is well."""
    return [key for key in state_dict if key.startswith(name + _STATE)]


def form_of(state_dict: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], int]:
    """Return sizes and block size of a weight, of which only the quant_state is looked at.

    Raises:
        ValueError: there is none of NF4, or it is not as bitsandbytes writes it.
    """
    key = _state_key(state_dict, name)
    state = _state(state_dict[key], key)
    return tuple(state["shape"]), state["blocksize"]


def tensors_of(q: NF4Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Return a quantized matrix as bitsandbytes writes it.

    Args:
        q: quantized ``[N, K]``, in rows.
        name: of the weight.

    Raises:
        ValueError: q is in fragments.
    """
    check_nf4(q)
    if q.layout != "rows":
        raise ValueError(f"{name}: expected a weight in rows, got layout {q.layout!r}; see to_rows")
    device = q.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    found = {
        name: q.packed.detach().reshape(-1, 1),
        name + ".absmax": q.absmax.detach(),
        name + ".quant_map": nf4_levels(_CPU).to(device, copy=True),
    }
    if q.absmax2 is not None and q.offset is not None:
        found[name + ".nested_absmax"] = q.absmax2.detach()
        found[name + ".nested_quant_map"] = absmax_map(_CPU).to(device, copy=True)
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": q.offset.item(),
        }
    text = bytearray(json.dumps(state).encode())
    found[name + _STATE + "nf4"] = torch.frombuffer(text, dtype=torch.uint8).to(device)
    return found


def from_bitsandbytes(state_dict: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """Return a state dict of bitsandbytes under the names of `LinearNF4`.

    Args:
        state_dict: of a model with bitsandbytes' 4-bit layers; unchanged.

    Returns:
        ``packed``, ``absmax``, ``absmax2`` and ``offset`` for each 4-bit weight, which share their
        bytes with state_dict; everything else as it was.

    Raises:
        ValueError: see `take`.
    """
    left = OrderedDict(state_dict)
    metadata: dict[str, dict[str, Any]] = {}
    for name in weights_in(state_dict):
        q = take(left, name)
        module = _module(name)
        left.update(zip(_named(module), q.parts(), strict=True))
        metadata[module] = describe(q)
    found = OrderedDict((key, value) for key, value in left.items() if value is not None)
    found._metadata = metadata  # type: ignore[attr-defined]
    return found


def to_bitsandbytes(
    state_dict: Mapping[str, Any], dtype: torch.dtype | None = None
) -> "OrderedDict[str, Any]":
    """Return a state dict of `LinearNF4` layers under bitsandbytes' names, as its files have them.

    Args:
        state_dict: as ``model.state_dict()`` returns it, or read from a file; unchanged.
        dtype: that bitsandbytes is to dequantize to. By default the layer's own, which
            ``model.state_dict()`` knows, and where that is lost that of the other tensors, or
            bfloat16.

    Returns:
        Six tensors for each quantized weight, four without double quantization; everything else as
        it was. Embeddings, which bitsandbytes' files do not have in 4 bits, become dense.

    Raises:
        TypeError: state_dict is no mapping, or dtype not float32, float16 or bfloat16.
        ValueError: a weight's tensors do not fit together.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected tensors by name, got {type(state_dict).__name__}; for a folder "
            "see nf4.export_checkpoint"
        )
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    metadata = getattr(state_dict, "_metadata", {})
    left = OrderedDict(state_dict)
    modules = [key.rpartition("packed")[0].removesuffix(".") for key in left if _is_packed(key)]
    others = _other_dtype(left, modules)
    for module in modules:
        parts = [left.pop(name, None) for name in _named(module)]
        known = metadata.get(module, {})
        shape, block_size = _sizes(parts[0], parts[1], known, module)
        wanted = dtype or known.get("nf4_dtype") or others
        q = NF4Tensor(parts[0], parts[1], shape, wanted, block_size, *parts[2:])
        check_nf4(q, module or "weight")
        if known.get("nf4_is_embedding"):
            left[_join(module, "weight")] = dequantize(q)
            continue
        left.update(tensors_of(q, _join(module, "weight")))
    return left


def describe(q: NF4Tensor) -> dict[str, Any]:
    """Return what `to_bitsandbytes` reads of a layer in a state dict's metadata."""
    return {"nf4_shape": tuple(q.shape), "nf4_dtype": q.dtype, "nf4_block_size": q.block_size}


def _keys(name: str) -> tuple[str, ...]:
    return tuple(name + part for part in _SUFFIXES)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _named(module: str) -> list[str]:
    return [_join(module, name) for name in PARTS]


def _is_packed(key: str) -> bool:
    return key == "packed" or key.endswith(".packed")


def read(state_dict: Mapping[str, Any], name: str) -> NF4Tensor:
    """Return a weight of a state dict, which is left as it is; arguments and errors as `take`."""
    key = _state_key(state_dict, name)
    state = _state(state_dict[key], key)
    _check_map(state_dict, name + ".quant_map", nf4_levels(_CPU), "the NF4 codebook")
    packed = _tensor(state_dict, name).contiguous().view(-1).view(torch.uint8)
    expected = (math.prod(state["shape"]) + 1) // 2
    if packed.numel() != expected:
        raise ValueError(
            f"{name}: expected {expected} bytes for shape {tuple(state['shape'])}, "
            f"got {packed.numel()}"
        )
    shape = torch.Size(state["shape"])
    absmax, absmax2, offset = _tensor(state_dict, name + ".absmax"), None, None
    if "nested_offset" in state or name + ".nested_absmax" in state_dict:
        if state.get("nested_blocksize") != ABSMAX_BLOCK_SIZE:
            raise ValueError(
                f"{key}: expected nested_blocksize {ABSMAX_BLOCK_SIZE}, "
                f"got {state.get('nested_blocksize')}"
            )
        _check_map(state_dict, name + ".nested_quant_map", absmax_map(_CPU), "the 8-bit map")
        absmax2 = _tensor(state_dict, name + ".nested_absmax").to(torch.float32)
        # A checkpoint may hold a number that was cast to bf16: what is computed with is fp32
        try:
            mean: Any = state.get("nested_offset")
            check_number(mean, "nested_offset")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from None
        offset = torch.tensor(mean, dtype=torch.float32)
        offset = offset.to(absmax.device)
    elif absmax.dtype.is_floating_point:
        absmax = absmax.to(torch.float32)
    for part, scales in ((".absmax", absmax), (".nested_absmax", absmax2)):
        if scales is not None and not is_finite(scales):
            raise ValueError(f"{name}{part}: expected finite values, got NaN or an infinity")
    packed = packed.view(packed_shape(shape))
    dtype = getattr(torch, state["dtype"])
    q = NF4Tensor(packed, absmax, shape, dtype, state["blocksize"], absmax2, offset)
    try:
        check_nf4(q, name)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return q


def _state_key(state_dict: Mapping[str, Any], name: str) -> str:
    """Return the name of a weight's quant_state, or raise ValueError unless it is one of NF4."""
    kinds = [key for key in state_dict if key.startswith(name + _STATE)]
    if kinds != [name + _STATE + "nf4"]:
        found = ", ".join(key.removeprefix(name + _STATE) for key in kinds) or "no quant_state"
        raise ValueError(
            f"{name}: expected a weight that bitsandbytes quantized to nf4, got {found}"
        )
    return kinds[0]


def _state(tensor: Any, key: str) -> dict[str, Any]:
    """Return the JSON of a quant_state, checked as far as this module reads it."""
    try:
        state = json.loads(bytes(tensor.cpu().tolist()))
        good = (
            state["quant_type"] == "nf4"
            and state["blocksize"] in BLOCK_SIZES
            and getattr(torch, state["dtype"], None) in DTYPES
            and isinstance(state["shape"], list)
            and all(type(size) is int and 0 <= size < 2**63 for size in state["shape"])
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: expected bitsandbytes' JSON as bytes, got {error!r}") from None
    if not good:
        raise ValueError(
            f"{key}: expected quant_type nf4, a blocksize from 32 to 4096, dtype float32, float16 "
            f"or bfloat16, and a shape; got {state}"
        )
    return dict(state)


def _tensor(state_dict: Mapping[str, Any], key: str) -> Tensor:
    found = state_dict.get(key)
    if not isinstance(found, Tensor):
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(f"{key}: expected a tensor, got {what}")
    return found.detach()


def _check_map(state_dict: Mapping[str, Any], key: str, expected: Tensor, what: str) -> None:
    found = _tensor(state_dict, key)
    if found.is_meta:
        return
    # Half precision holds the map too, where a checkpoint was cast
    if found.shape != expected.shape or not torch.equal(found.cpu(), expected.to(found.dtype)):
        raise ValueError(f"{key}: expected {what}, got another table")


def _sizes(
    packed: Any, absmax: Any, known: Mapping[str, Any], module: str
) -> tuple[torch.Size, int]:
    """Return shape and block size of a weight, from what is known of its layer or its tensors."""
    if "nf4_shape" in known:
        return torch.Size(known["nf4_shape"]), known["nf4_block_size"]
    name = module or "weight"
    if not isinstance(packed, Tensor) or not isinstance(absmax, Tensor):
        raise ValueError(f"{name}: expected the tensors packed and absmax, found one of them alone")
    if packed.ndim != 2:
        raise ValueError(
            f"{name}.packed: expected [N, K / 2], got shape {tuple(packed.shape)}; an odd number "
            "of columns is known to the model alone: pass model.state_dict()"
        )
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    fitting = [b for b in BLOCK_SIZES if -(-shape.numel() // b) == absmax.numel()]
    if not fitting:
        raise ValueError(
            f"{name}.absmax: expected one scale for each of 32 to 4096 elements of {tuple(shape)}, "
            f"got {absmax.numel()}"
        )
    return shape, 64 if 64 in fitting else fitting[0]


def _other_dtype(state_dict: Mapping[str, Any], modules: Iterable[str]) -> torch.dtype:
    """Return the most frequent dtype of the tensors that are no quantized weight, or bfloat16."""
    ours = {name for module in modules for name in _named(module)}
    found = [
        value.dtype
        for key, value in state_dict.items()
        if key not in ours and isinstance(value, Tensor) and value.dtype in DTYPES
    ]
    return max(found, key=found.count) if found else torch.bfloat16
