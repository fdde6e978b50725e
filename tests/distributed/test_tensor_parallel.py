"""Layers split over several processes, on a CPU by gloo: the outputs and gradients of one."""

from pathlib import Path
from typing import Any

import pytest
import tensor_worker
import torch
import worker
from ranks import check, run, run_all

import nf4


def check_state(found: dict, model: torch.nn.Module) -> None:
    """Hold a gathered state dict to that of one process, bit for bit."""
    state = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Over two processes some parts keep the codes of their scales, over four none does
SPLIT = {2: ["double_quant", "fp32", "fragments", "late"], 4: ["double_quant"]}


@pytest.mark.parametrize("ranks", SPLIT)
def test_a_split_model_is_that_of_one_process(ranks, tmp_path) -> None:
    kinds = run_all(tensor_worker, "tensor", SPLIT[ranks], tmp_path / "ranks", ranks)
    for kind, found in kinds.items():
        check_split(kind, ranks, found)


def check_split(kind: str, ranks: int, found: list[dict]) -> None:
    model = tensor_worker.adapted_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model.eval()(input_ids=worker.TOKENS).logits
    grads = worker.gradients(model.train(), worker.TOKENS)
    for parameter, grad in zip(worker.trained(model).values(), grads.values(), strict=True):
        parameter.grad = grad
    norm = torch.nn.utils.clip_grad_norm_(worker.trained(model).values(), 1e9)
    torch.optim.AdamW(worker.trained(model).values(), lr=1e-2).step()
    after = model(input_ids=worker.TOKENS, labels=worker.TOKENS).loss
    assert found[0]["state"].keys() == state.keys()
    for name, tensor in state.items():
        given = found[0]["state"][name]
        assert given.dtype == tensor.dtype and torch.equal(given, tensor), name
    for one in found:
        assert one["share"] == 1 / ranks
        torch.testing.assert_close(one["logits"], logits, rtol=1e-4, atol=1e-4)
        check(one["gradients"], grads)
        torch.testing.assert_close(one["norm"], norm, rtol=1e-4, atol=0)
        assert abs(one["after"] - after) < 1e-3 * after


def test_parts_are_sharded_over_other_processes(tmp_path) -> None:
    """Two dimensions: tensor parallelism over two processes, fully_shard over two such pairs."""
    kinds = run_all(tensor_worker, "both", ["plain", "mixed"], tmp_path / "ranks", 4)
    model = tensor_worker.adapted_model("double_quant")
    grads = worker.gradients(model, worker.TOKENS)
    for kind, found in kinds.items():
        check_state(found[0]["state"], model)
        for one in found:
            check(one["gradients"], grads, 0.1 if kind == "mixed" else 1e-4)


def test_split_checkpoints_are_loaded_by_other_numbers_of_ranks(tmp_path) -> None:
    path = str(tmp_path / "checkpoint")
    saved = run(tensor_worker, "save", path, tmp_path / "save")
    model = tensor_worker.adapted_model("double_quant")
    model.save_pretrained(tmp_path / "one")
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "folder" / file.name).read_bytes() == file.read_bytes(), file.name
    for ranks in (1, 2, 4):
        for one in run(tensor_worker, "load", path, tmp_path / str(ranks), ranks):
            torch.testing.assert_close(one["logits"], saved[0]["logits"], rtol=1e-4, atol=1e-4)


def test_each_process_opens_its_part_of_a_folder(tmp_path) -> None:
    """As transformers plans it: ``tp_plan="auto"``, and its fully_shard."""
    model = tensor_worker.quantized_model("double_quant").eval()
    model.save_pretrained(tmp_path / "model")
    kinds = [f"{how}:{tmp_path / 'model'}" for how in ("sharded", "auto")]
    for kind, found in run_all(tensor_worker, "opened", kinds, tmp_path / "ranks").items():
        check_opened(kind.split(":")[0], found, model, tmp_path)


def check_opened(how: str, found: list[dict], model: Any, folder: Path) -> None:
    check_state(found[0]["state"], model)
    with torch.no_grad():
        logits = model(input_ids=worker.TOKENS).logits
    held = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("packed"))
    for one in found:
        assert one["held"] == held / 2
        torch.testing.assert_close(one["logits"], logits, rtol=1e-4, atol=1e-4)
    weights = [folder / name / "model.safetensors" for name in (f"model-{how}", "model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    if how == "sharded":
        assert "one of fully_shard, which comes after" in found[0]["message"]
        return
    grads = worker.gradients(tensor_worker.adapt(model, seed=0), worker.TOKENS)
    for one in found:
        check(one["gradients"], grads)


def test_what_no_process_can_have_a_part_of_is_refused_before_it_is_loaded(tmp_path) -> None:
    tensor_worker.dense_model().save_pretrained(tmp_path / "dense")
    tensor_worker.quantized_model("double_quant").save_pretrained(tmp_path / "model")
    kinds = [f"dense:{tmp_path / 'dense'}", f"both:{tmp_path / 'model'}"]
    found = run_all(tensor_worker, "opened", kinds, tmp_path / "ranks", 4)
    dense, both = (found[kind][0]["message"] for kind in kinds)
    assert "got dense ones; quantize it first: `nf4 quantize SOURCE TARGET`" in dense
    assert "expected tp_size or fsdp_size for 4-bit weights, got 2 and 2" in both


def test_what_cannot_be_split_is_refused_in_words(tmp_path) -> None:
    for found in run(tensor_worker, "refused", "", tmp_path / "ranks"):
        assert (
            "2 × 64, got 192; block sizes that work: 32; numbers of processes up to 64: 3"
            in (found["columns"])
        )
        assert "a multiple of block_size 64, got 96" in found["odd"]
        assert "rows of the weight for each of 2 processes, got 1" in found["rows"]
        assert "a whole layer to split, got rows of 64 x 128 over 2" in found["twice"]
        assert "LoRA adapters on a layer that is split, got DoRA" in found["dora"]
        assert "LinearNF4 or QLoRALinear to split, got EmbeddingNF4" in found["embedding"]
        assert "a whole layer to merge, got one with rows of 64 x 128" in found["merge"]
        assert "a LoRA adapter without DoRA for a layer that is split" in found["adapt"]


def test_a_style_does_for_dense_layers_what_torch_s_does() -> None:
    assert issubclass(nf4.ColwiseParallel, torch.distributed.tensor.parallel.ColwiseParallel)
    assert issubclass(nf4.RowwiseParallel, torch.distributed.tensor.parallel.RowwiseParallel)
