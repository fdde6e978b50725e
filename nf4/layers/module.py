"""What modules with a 4-bit weight share: how they hold it, move it, save it and load it."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from nf4.layers import bitsandbytes as bitsandbytes_files
from nf4.layers.group import group_of
from nf4.layers.sharded import repacked
from nf4.layers.split import OWN, Split
from nf4.ops import replay
from nf4.tensor import PARTS, NF4Tensor, is_finite, is_mark
from nf4.tools.ranks import is_sharded, replicated, whole

# A 2,000th of a weight's bytes. As buffers they keep their dtype under the mixed precision of
# sharded training, and may lack dimensions; each rank holds them whole
BUFFERS = ("absmax2", "offset")


class QuantizedModule(nn.Module):
    """A module with a frozen weight in 4-bit NormalFloat, held as plain parameters and buffers.

    ``packed`` uint8 ``[rows, columns / 2]`` and ``absmax`` are parameters, ``absmax2`` and
    ``offset``, of double quantization, buffers, as in `NF4Tensor`: ``state_dict``, ``.to`` and
    sharding need no special case.
    Casting the module changes `dtype`, never the bytes or the fp32 scales. A subclass says by
    `_weight_shape` which sizes the weight has, and by `_choose_layout` in which order it is held.
    """

    packed: nn.Parameter
    absmax: nn.Parameter
    absmax2: Tensor | None
    offset: Tensor | None
    block_size: int
    double_quant: bool
    dtype: torch.dtype
    split: Split | None = None  # over the processes of tensor parallelism
    awaits = False  # values that transformers loads, whose state dict has plain scales

    @property
    def _weight_shape(self) -> torch.Size:
        raise NotImplementedError

    def _set_weight(self, q: NF4Tensor) -> None:
        self.block_size, self.double_quant, self.dtype = q.block_size, q.double_quant, q.dtype
        self._hold(q)
        self._choose_layout()

    def _choose_layout(self) -> None:
        """Hold the weight in the order that suits its device: rows, unless a subclass knows."""

    def _hold(self, q: NF4Tensor) -> Self:
        """Hold a weight by its parameters, or new ones: what autograd saved of the old stays."""
        self.__dict__.pop("_replays", None)
        packed = q.packed if q.layout == "rows" else q.packed.detach().view(torch.int32)
        for name, tensor in (("packed", packed), ("absmax", q.absmax)):
            if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                tensor = nn.Parameter(tensor, requires_grad=False)
            self._buffers.pop(name, None)
            self.register_parameter(name, tensor)
        if self.split is not None:  # of scales a part may have fp32 ones in place of codes
            del self.absmax
            self.register_buffer("absmax", q.absmax.detach())
            own = None if q.absmax2 is None else q.absmax2.detach()
            self.register_buffer("part_absmax2", own, persistent=False)
            return self
        for name, scales in zip(BUFFERS, q.parts()[2:], strict=True):
            plain = scales is None or (type(scales) is Tensor and not scales.requires_grad)
            self.register_buffer(name, scales if plain else scales.detach())  # type: ignore[union-attr]
        return self

    @property
    def layout(self) -> str:
        """Order of ``packed`` and ``absmax`` in memory: "rows", or "fragments" if packed is int32.

        The bytes are the same either way; the dtype lets the tensor itself say what it holds.
        """
        return "fragments" if self.packed.dtype == torch.int32 else "rows"

    @property
    def weight(self) -> NF4Tensor:
        """The quantized weight, sharing this module's tensors, and what it remembers."""
        q = self.held()
        if not torch.compiler.is_compiling():
            replay.share(q, self.replays())
        return q

    def held(self) -> NF4Tensor:
        """Return the quantized weight, sharing this module's tensors."""
        packed: Tensor = self.packed
        layout, absmax2, offset = "rows", self.absmax2, self.offset
        if self.split is not None:
            absmax2, offset = self.split.scales(self)
        if packed.dtype == torch.int32:
            packed, layout = packed.view(torch.uint8), "fragments"
        return NF4Tensor(
            packed,
            self.absmax,
            self._weight_shape,
            self.dtype,
            self.block_size,
            absmax2,
            offset,
            layout,
        )

    def replays(self) -> replay.Replays:
        """Return what is remembered of products with this weight; see nf4/ops/replay.py."""
        if torch.compiler.is_compiling():
            return {}
        found: replay.Replays = self.__dict__.setdefault("_replays", {})
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what is remembered of these very tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "_replays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what is pickled; what an earlier version held as parameters becomes buffers."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in BUFFERS:
            if name in self._parameters:
                held = self._parameters.pop(name)
                self.register_buffer(name, None if held is None else held.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the weight with the module, but keep its bytes and fp32 scales as they are."""
        self.__dict__.pop("_replays", None)
        group = group_of(self)
        if group is not None:
            group.forget()
        names = PARTS if self.split is None or self.awaits else (*PARTS, *OWN)
        frozen = {id(getattr(self, name)) for name in names}

        def keep_dtype(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in frozen and out.dtype != t.dtype else out

        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        if dtype.is_floating_point:
            self.dtype = dtype
        self._choose_layout()
        return self

    def _describe(self) -> dict[str, Any]:
        """Return what `nf4.to_bitsandbytes` reads of this module in a state dict's metadata."""
        q = self.weight
        if self.split is not None:
            q = q.with_parts(q.parts(), shape=self.split.shape)
        return bitsandbytes_files.describe(q)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save the weight in rows, whatever its layout in memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata.update(self._describe())
        if self.split is not None:
            self.split.save(self, destination, prefix)
            return
        if self.layout != "rows":
            q = repacked(self.weight, "rows")
            destination[prefix + "packed"], destination[prefix + "absmax"] = q.packed, q.absmax
        # Then everything is a DTensor, as accelerate expects; transformers loads scales as they are
        if is_sharded(self.packed) and not self.awaits:
            for name in BUFFERS:
                scales = destination.get(prefix + name)
                if scales is not None:
                    destination[prefix + name] = replicated(scales, self.packed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a weight quantized otherwise, before anything is copied.

        A weight as bitsandbytes writes it is taken, however it is quantized: its tensors tell.
        """
        errors = self.errors_in(state_dict, prefix)
        if errors:
            args[-1].extend(errors)
            return
        if is_mark(state_dict.get(prefix + "weight")):
            del state_dict[prefix + "weight"]
        if prefix + "weight" in bitsandbytes_files.weights_in(state_dict):
            self._take_bitsandbytes(state_dict, prefix, args[0])
        if self.split is not None:
            self.split.load(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._choose_layout()
            return
        held = self.weight
        if held.layout != "rows" and any(prefix + n in state_dict for n in ("packed", "absmax")):
            self._hold(repacked(held, "rows"))
        for name in BUFFERS:
            if is_sharded(state_dict.get(prefix + name)):
                state_dict[prefix + name] = whole(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if held.layout != "rows":
            self._hold(repacked(self.weight, "fragments"))
        else:
            self._choose_layout()

    def errors_in(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return what is wrong with this layer's weight in a state dict; missing parts are not.

        Args:
            state_dict: with parts of 4-bit weights by our names or by bitsandbytes'.
            prefix: of this layer's names in it, such as ``"fc."``.
        """
        expected = self._expected()
        if prefix + "weight" in bitsandbytes_files.weights_in(state_dict):
            if self.split is not None:
                return [f"{prefix}weight: expected nf4's tensors for a split layer, got another's"]
            try:
                q = bitsandbytes_files.read(state_dict, prefix + "weight")
            except ValueError as error:
                return [str(error)]
            if q.shape == self._weight_shape:
                return []
            return [
                f"{prefix}weight: expected shape {tuple(self._weight_shape)}, got {tuple(q.shape)}"
            ]
        errors = [] if self.split is None else self._split_errors(state_dict, prefix)
        for name in PARTS:
            new, key, form = state_dict.get(prefix + name), prefix + name, expected.get(name)
            if new is not None and form is None:
                errors.append(f"{key}: expected none (double_quant=False), got one")
            elif form is None or not isinstance(new, Tensor):
                continue  # missing, or refused by torch
            elif (new.dtype, new.shape) != form:
                errors.append(
                    f"{key}: expected {form[0]} {tuple(form[1])} (block_size="
                    f"{self.block_size}, double_quant={self.double_quant}), "
                    f"got {new.dtype} {tuple(new.shape)}"
                )
            elif not is_finite(new):
                errors.append(f"{key}: expected finite values, got NaN or an infinity")
        return errors

    def _split_errors(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Return what is wrong with what a state dict has for a layer that is split."""
        there = [name for name in self._expected() if prefix + name in state_dict]
        if there and len(there) < len(self._expected()):
            return [
                f"{prefix}{there[0]}: expected all of {', '.join(self._expected())} for a layer "
                f"that is split, got {', '.join(there)} alone"
            ]
        return [
            f"{prefix}{name}: expected a DTensor for a layer that is split, got a plain tensor; "
            "use set_model_state_dict of torch.distributed.checkpoint with full_state_dict=True"
            for name, parameter in self.named_parameters()
            if is_sharded(parameter)
            and name not in PARTS
            and prefix + name in state_dict
            and not is_sharded(state_dict[prefix + name])
        ]

    def _expected(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtypes and shapes of the parts in a state dict."""
        if self.split is not None:
            return self.split.forms()
        parts = zip(PARTS, self.weight.parts(), strict=True)
        return {name: (part.dtype, part.shape) for name, part in parts if part is not None}

    def check_whole(self, what: str) -> None:
        """Raise ValueError if the layer is one of a part.

        Args:
            what: what is to be done with it.
        """
        if is_sharded(self.packed):
            raise ValueError(
                f"expected a whole layer to {what}, got one of fully_shard: do it before that, or "
                "in one process after the model was saved"
            )
        if self.split is not None:
            raise ValueError(
                f"expected a whole layer to {what}, got one with {self.split}: do it in one "
                "process, before the model is split or after it was saved"
            )

    def _take_bitsandbytes(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Put the tensors of bitsandbytes under this layer's names, and take on their form."""
        own = self.weight
        q = bitsandbytes_files.take(state_dict, prefix + "weight")
        if (q.block_size, q.double_quant) != (own.block_size, own.double_quant):
            device = own.device
            parts = [None if t is None else torch.empty_like(t, device=device) for t in q.parts()]
            self._set_weight(q.with_parts(parts, dtype=self.dtype))
        if metadata.get("assign_to_params_buffers", False):
            self.dtype = q.dtype
        for name, tensor in zip(PARTS, q.parts(), strict=True):
            if tensor is not None:
                state_dict[prefix + name] = tensor


def name_weights(model: nn.Module) -> None:
    """Let messages about the 4-bit weights of a model name their layers.

    A name lies on the scales, which layers hold as they are, and no compiled graph asks for it.
    """
    for name, module in model.named_modules():
        if name and isinstance(module, QuantizedModule):
            module.absmax.nf4_layer = name  # type: ignore[attr-defined]


def check_when_loading(model: nn.Module) -> None:
    """Have a model's `load_state_dict` check all 4-bit weights before it changes the first."""
    hooks = [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]
    if check_state_dict not in hooks and not isinstance(model, QuantizedModule):
        model.register_load_state_dict_pre_hook(check_state_dict)  # type: ignore[no-untyped-call]


def check_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any
) -> None:
    """Raise before `load_state_dict` changes anything, if a 4-bit weight of a model does not fit.

    A hook of the whole model: torch loads layer by layer, and the first ones would be overwritten.

    Raises:
        RuntimeError: as `load_state_dict` does; the message names every such tensor.
    """
    modules = model.named_modules(prefix=prefix.removesuffix("."))
    layers = {name: module for name, module in modules if isinstance(module, QuantizedModule)}
    held: dict[str, dict[str, Any]] = {name: {} for name in layers}
    for key, value in state_dict.items():  # once for all layers, as they are looked through
        name = key.rpartition(".")[0]
        while name and name not in layers:
            name = name.rpartition(".")[0]
        if name:
            held[name][key] = value
    errors: list[str] = []
    for name, layer in layers.items():
        errors += layer.errors_in(held[name], f"{name}.")
    if errors:
        raise RuntimeError(
            f"state_dict: expected weights that fit the layers of {type(model).__name__}; nothing "
            "was changed:\n\t" + "\n\t".join(errors)
        )
