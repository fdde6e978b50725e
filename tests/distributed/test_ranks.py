"""Training in several processes, on a CPU by gloo: the gradients of one process."""

import pytest
import torch
import worker
from helpers import error
from ranks import check, run, run_all

import nf4


def test_ddp_trains_as_one_process_does(tmp_path) -> None:
    for kind, found in run_all(worker, "ddp", ["lora", "peft", "ia3"], tmp_path / "ranks").items():
        check_ddp(kind, *found)


def check_ddp(kind: str, first: dict, second: dict) -> None:
    if kind != "ia3":  # whose factors start at one
        assert any(not torch.equal(second["drawn"][n], p) for n, p in first["drawn"].items())
    for name, parameter in first["drawn"].items():
        assert torch.equal(first["start"][name], parameter)
        assert torch.equal(second["start"][name], parameter)
    expected = worker.gradients(worker.adapted_model(kind), worker.TOKENS)
    for part in ("gradients", "again", "accumulated", "pair"):
        check(first[part], expected)
        for name, grad in first[part].items():
            assert torch.equal(second[part][name], grad), (part, name)
    assert any(not torch.equal(second["unsynced"][n], g) for n, g in first["unsynced"].items())


def test_accelerate_trains_as_one_process_does(tmp_path) -> None:
    kinds = run_all(worker, "accelerated", ["lora", "peft"], tmp_path / "ranks")
    for kind, found in kinds.items():
        assert {one["wrapper"] for one in found} == {"DistributedDataParallel"}
        expected = worker.gradients(worker.adapted_model(kind), worker.TOKENS)
        for one in found:
            check(one["gradients"], expected)


SHARDED = {
    2: ["double_quant", "fp32", "peft", "checkpointed", "offloaded", "meta", "fragments", "mixed"],
    3: ["fp32"],  # whose shares are uneven
    4: ["double_quant"],
}


@pytest.mark.parametrize("ranks", SHARDED)
def test_sharded_training_is_that_of_one_process(ranks, tmp_path) -> None:
    kinds = run_all(worker, "fsdp", SHARDED[ranks], tmp_path / "ranks", ranks)
    for kind, found in kinds.items():
        check_sharded(kind, ranks, found)


def check_sharded(kind: str, ranks: int, found: list[dict]) -> None:
    model = worker.adapted_model("peft" if kind == "peft" else "lora", kind != "fp32")
    state = model.state_dict()
    assert found[0]["state"].keys() == state.keys()
    for name, tensor in state.items():  # gathered, bit for bit
        assert found[0]["state"][name].dtype == tensor.dtype
        assert torch.equal(found[0]["state"][name], tensor), name
    parts = [worker.own_part(rank, ranks) for rank in range(ranks)]
    grads = [worker.gradients(model, part) for part in parts]
    expected = {name: sum(grad[name] for grad in grads) / ranks for name in grads[0]}
    parameters = worker.trained(model)
    for name, parameter in parameters.items():
        parameter.grad = expected[name]
    torch.optim.AdamW(parameters.values(), lr=1e-2).step()
    for one, part in zip(found, parts, strict=True):
        # What is mixed computes in bfloat16: near what is computed in float32
        check(one["gradients"], expected, 0.1 if kind == "mixed" else 1e-4)
        assert one["share"] <= 1 / ranks + 1 / 64
        loss = model(input_ids=part, labels=part).loss
        assert abs(one["loss"] - loss) < (1e-2 if kind == "mixed" else 1e-3) * loss
    elements = sum(p.numel() for p in parameters.values())
    assert sum(one["shards"] for one in found) == elements
    assert sum(one["states"] for one in found) == elements


def test_accelerate_shards_and_loads_from_one_process(tmp_path) -> None:
    """With fully_shard, weights sent by the first rank, and bfloat16, as its own settings are."""
    kinds = run_all(worker, "prepared", ["lora", "peft"], tmp_path / "ranks")
    for kind, found in kinds.items():
        check_prepared(kind, found)


def check_prepared(kind: str, found: list[dict]) -> None:
    model = worker.adapted_model(kind)
    state = model.state_dict()
    assert found[0]["state"].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[0]["state"][name], tensor), name
    expected = worker.gradients(model, worker.TOKENS)
    for one in found:
        assert one["wrapper"].startswith("FSDP") and one["cast"] == "torch.bfloat16"
        for name, grad in one["gradients"].items():
            assert error(grad, expected[name]) < 0.1, name


def test_a_sharded_model_is_saved_as_one_process_saves_it(tmp_path) -> None:
    run(worker, "folder", str(tmp_path / "out"), tmp_path / "ranks")
    model = worker.adapted_model("lora")
    model.save_pretrained(tmp_path / "one")
    nf4.save_adapter(model, tmp_path / "adapter")
    for made in ("own", "given"):
        files = {p.name for p in (tmp_path / "one").iterdir()}
        assert {p.name for p in (tmp_path / "out" / made).iterdir()} == files
        for name in files:
            assert (tmp_path / "out" / made / name).read_bytes() == (
                tmp_path / "one" / name
            ).read_bytes(), name
    for file in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "out" / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_scales_that_are_cast_are_refused_in_words(tmp_path) -> None:
    """Those of single quantization are parameters, a ninth of a weight's bytes."""
    for one in run(worker, "cast", "fp32", tmp_path / "ranks"):
        assert "absmax: expected torch.float32, got torch.bfloat16; fully_shard" in one["message"]


def test_a_sharded_checkpoint_is_loaded_by_other_numbers_of_ranks(tmp_path) -> None:
    saved = run(worker, "save", str(tmp_path / "checkpoint"), tmp_path / "save")
    for ranks in (1, 2, 4):
        for one in run(worker, "load", str(tmp_path / "checkpoint"), tmp_path / str(ranks), ranks):
            assert torch.equal(one["logits"], saved[0]["logits"])
            for ours, right in zip(one["moments"], saved[0]["moments"], strict=True):
                assert torch.equal(ours, right)
