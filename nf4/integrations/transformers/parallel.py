"""Tensor parallelism as transformers plans it, of folders of 4-bit weights.

    AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=8))

Each process reads its part of ``packed``, and all scales, of which it keeps those of its part.
"""

from collections.abc import Callable
from typing import Any

from transformers.distributed import tensor_parallel as shipped

from nf4.integrations.transformers.config import METHOD
from nf4.integrations.wrapping import wrap_once
from nf4.layers.module import QuantizedModule

_DIMS = {shipped.ColwiseParallel: 0, shipped.RowwiseParallel: 1}


def install() -> None:
    """Let transformers' styles split 4-bit layers; once."""
    wrap_once(shipped.TensorParallelLayer, "validate_param", _checking)
    for style in _DIMS:
        wrap_once(style, "shard_param", _leaving)
        wrap_once(style, "install_forward", _splitting)


def check_distributed(model: Any, pre_quantized: bool, stored_as: str) -> None:
    """Raise ValueError if processes cannot have their parts of a model that is to be loaded.

    Args:
        model: whose config says how it is distributed.
        pre_quantized: whether its weights are in 4 bits already.
        stored_as: what wrote them.
    """
    plan = getattr(model.config, "distributed_config", None)
    tensor, others = getattr(plan, "tp_size", 1) or 1, getattr(plan, "dp_size", 1) or 1
    if max(tensor, others) > 1 and not pre_quantized:
        raise ValueError(
            "distributed_config: expected a folder of 4-bit weights, of which each process reads "
            "its part, got dense ones; quantize it first: `nf4 quantize SOURCE TARGET`"
        )
    if max(tensor, others) > 1 and stored_as != METHOD:
        raise ValueError(
            f"distributed_config: expected a folder that nf4 has written, got one of {stored_as}; "
            "open it in one process, and save it"
        )
    if tensor > 1 and others > 1:
        raise ValueError(
            f"distributed_config: expected tp_size or fsdp_size for 4-bit weights, got {tensor} "
            f"and {others}; open the model with tp_size, and call fully_shard on it over the "
            "others"
        )


def _checking(check: Callable[..., Any]) -> Callable[..., Any]:
    def validate_param(
        self: Any, module: Any, param: Any, mesh: Any, parameter_name: str | None = None
    ) -> Any:
        if isinstance(module, QuantizedModule) and not isinstance(self, tuple(_DIMS)):
            raise ValueError(
                f"{parameter_name or param}: expected style 'colwise' or 'rowwise' for a 4-bit "
                f"layer, got {type(self).__name__}; leave it dense by skip_modules"
            )
        return check(self, module, param, mesh, parameter_name=parameter_name)

    return validate_param


def _leaving(shard: Callable[..., Any]) -> Callable[..., Any]:
    def shard_param(self: Any, module: Any, param: Any, mesh: Any) -> Any:
        """Leave a 4-bit layer's parameters to `install_forward`, which sees them all."""
        return None if isinstance(module, QuantizedModule) else shard(self, module, param, mesh)

    return shard_param


def _splitting(install: Callable[..., Any]) -> Callable[..., Any]:
    def install_forward(self: Any, module: Any, mesh: Any) -> Any:
        if not isinstance(module, QuantizedModule):
            return install(self, module, mesh)
        from nf4.layers import parallel

        dim = next(dim for kind, dim in _DIMS.items() if isinstance(self, kind))
        kind: Any = parallel.RowwiseParallel if dim else parallel.ColwiseParallel
        style = kind(
            input_layouts=self.input_layouts,
            output_layouts=self.output_layouts,
            use_local_output=self.use_local_output,
        )
        parallel.split_layer(module, mesh, dim, style, awaits=True)
        return module

    return install_forward
