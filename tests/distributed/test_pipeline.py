"""Models cut into stages, which torch.distributed.pipelining runs: the gradients of one process."""

import pipeline_worker
import processes
import pytest
import torch
from helpers import error

SCHEDULES = ["ScheduleGPipe", "Schedule1F1B"]
# Of which each rank has two stages; the second computes the weights' gradients apart
LOOPED = ["ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble"]
CASES = {
    "two-lora": (2, "lora", SCHEDULES + LOOPED),
    "two-peft": (2, "peft", SCHEDULES + LOOPED),
    "four-lora": (4, "lora", SCHEDULES),
    "four-fused": (4, "fused", SCHEDULES),
}


@pytest.mark.parametrize(("ranks", "kind", "schedules"), CASES.values(), ids=CASES)
def test_stages_train_as_one_process_does(ranks, kind, schedules, tmp_path) -> None:
    found = processes.run(pipeline_worker, tmp_path / "ranks", ranks, kind, *schedules)
    model = pipeline_worker.whole_model(kind)
    loss = model(input_ids=pipeline_worker.TOKENS, labels=pipeline_worker.TOKENS).loss
    loss.backward()
    expected = {n: p.grad for n, p in pipeline_worker.trained(model).items()}
    for schedule in schedules:
        losses = found[-1][schedule]["losses"]
        assert len(losses) == pipeline_worker.MICROBATCHES
        assert abs(torch.stack(losses).mean() - loss) < 1e-5 * loss
        grads = {n: g for one in found for n, g in one[schedule]["gradients"].items()}
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert error(grads[name], grad) < 1e-4, (schedule, name)
