"""What users do with models of which each process has a part, by tensor parallelism or sharding."""

from types import SimpleNamespace

import parts_worker
import pytest
from ranks import run

from nf4.integrations.transformers.parallel import check_distributed


def test_what_a_part_cannot_have_is_refused_and_nothing_is_changed(tmp_path) -> None:
    for found in run(parts_worker, "refused", "", tmp_path / "ranks"):
        assert "a whole layer to merge, got one with rows of 256 x 128" in found["merge"]
        assert "a whole layer to merge, got one with" in found["requantize"]
        assert "1: expected a LoRA adapter without DoRA for a layer that is split" in found["ia3"]
        assert "1: expected a LoRA adapter without DoRA for a layer that is split" in found["dora"]
        assert "1: expected a LoRA adapter without DoRA for a layer that is split" in found["load"]
        assert "a whole layer to start by pissa, got one with" in found["pissa"]
        assert "use nf4.add_lora, which splits adapters to match" in found["peft"]
        assert "0.bias: expected a DTensor for a layer that is split" in found["plain"]
        assert "lora_B: expected a DTensor for a layer that is split" in found["plain"]
        assert "0.packed: expected all of packed, absmax, absmax2, offset" in found["partial"]


def test_a_split_model_is_used_as_a_whole_one(tmp_path) -> None:
    for found in run(parts_worker, "used", str(tmp_path), tmp_path / "ranks"):
        assert found["output"] < 1e-5 and found["named"] == 0 and found["restored"] < 1e-6
        assert found["state"] and found["again"] and found["theirs"]


def test_trained_biases_of_split_layers(tmp_path) -> None:
    for found in run(parts_worker, "biases", str(tmp_path), tmp_path / "ranks"):
        assert max(found["parts"]) < 1e-4 and max(found["dense"]) < 1e-4
        assert found["loaded"] == [True, True]


def test_adapters_are_saved_and_loaded_where_parameters_were_left_gathered(tmp_path) -> None:
    for found in run(parts_worker, "gathered", str(tmp_path), tmp_path / "ranks"):
        assert "got one of fully_shard, which comes after adapters" in found["adapt"]
        assert found["loaded"] == [True, True]
        assert "a whole layer to merge, got one of fully_shard" in found["merge"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "ranks", "start"]


def test_a_stage_of_other_processes_is_saved(tmp_path) -> None:
    *_, last = run(parts_worker, "stages", str(tmp_path), tmp_path / "ranks")
    assert last["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_split_llama_is_saved_without_biases_too(tmp_path) -> None:
    for found in run(parts_worker, "llama", str(tmp_path), tmp_path / "ranks"):
        assert found["same"]
        assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_folders_of_others_are_not_shared() -> None:
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    check_distributed(model, True, "nf4")
    with pytest.raises(ValueError, match="a folder that nf4 has written, got one of bitsandbytes"):
        check_distributed(model, True, "bitsandbytes")
