"""Sequences that ranks have a part of each, with layers as they are: gradients of one process."""

import context_worker
import processes
import pytest
from helpers import error
from pipeline_worker import trained

CASES = {
    "two-peft": (2, "peft"),
    "two-norms": (2, "norms"),  # by torch's SequenceParallel
    "four-lora": (4, "lora"),
}


@pytest.mark.parametrize(("ranks", "kind"), CASES.values(), ids=CASES)
def test_a_sequence_in_parts_trains_as_one_process_does(ranks, kind, tmp_path) -> None:
    found = processes.run(context_worker, tmp_path / "ranks", ranks, kind)
    model, tokens = context_worker.adapted(kind), context_worker.TOKENS
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert abs(sum(one["loss"] for one in found) - loss) < 1e-5 * loss
    for one in found:
        assert one["rows"] == tokens.shape[1] // ranks
        assert one["norms"] == (9 if kind == "norms" else 0)  # two a layer, and the last
        assert one["gradients"].keys() == trained(model).keys()
        for name, parameter in trained(model).items():
            assert error(one["gradients"][name], parameter.grad) < 1e-4, name
