"""A mesh of one process: what several do, where coverage and a debugger see it."""

import parts_worker
import pytest
import tensor_worker
import torch.distributed as dist
from test_tensor_parallel import check_split


@pytest.fixture
def alone():
    """Make a process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["double_quant", "fp32", "fragments", "late"])
def test_a_model_split_over_one_process(kind, alone) -> None:
    check_split(kind, 1, [tensor_worker.tensor(kind, 0, 1)])


def test_what_is_refused_of_one_part(alone) -> None:
    found = parts_worker.refused("", 0, 1)
    assert all(found.values())
    assert "a whole layer to merge, got one with rows of 256 x 128" in found["merge"]


def test_a_part_that_is_all_is_used_as_a_whole(alone, tmp_path) -> None:
    found = parts_worker.used(str(tmp_path), 0, 1)
    assert found["output"] < 1e-5 and found["named"] == 0 and found["restored"] < 1e-6
    assert found["state"] and found["again"] and found["theirs"]
    found = parts_worker.biases(str(tmp_path), 0, 1)
    assert max(found["parts"]) < 1e-4 and found["loaded"] == [True, True]
    assert parts_worker.llama(str(tmp_path), 0, 1)["same"]
