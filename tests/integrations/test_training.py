"""Training loops that people have: the Trainer, TRL's SFTTrainer, Lightning, and plain PyTorch."""

import copy
import json

import pytest
import torch
from helpers import error
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils.data import DataLoader

import nf4
import nf4.integrations.peft

TOKENS = torch.arange(24).view(2, 12) % 320
SAME = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 32
DATA = [{"input_ids": row, "labels": row} for row in torch.arange(32 * 12).view(32, 12) % 320]
# Lightning's, TRL's and the Trainer's own, on a machine without a GPU
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]


@pytest.fixture
def base(tiny_llama) -> nn.Module:
    return nf4.quantize_model(tiny_llama())


def with_peft(base: nn.Module, **options) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    return get_peft_model(base, config)


def arguments(folder, **options):
    from transformers import TrainingArguments

    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train(model: nn.Module, folder, **options) -> list[float]:
    from transformers import Trainer

    trainer = Trainer(model=model, args=arguments(folder, **options), train_dataset=SAME)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer_lowers_the_loss_with_any_checkpointing(bf16, base, tmp_path) -> None:
    """Recomputing activations, one way or the other, changes no loss but by rounding."""
    curves = {}
    for name, reentrant in {"none": None, "reentrant": True, "not_reentrant": False}.items():
        model = copy.deepcopy(base)
        options = {"bf16": bf16, "gradient_accumulation_steps": 2}
        if reentrant is not None:
            how = {"use_reentrant": reentrant}
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=how)
            options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how}
        curves[name] = train(with_peft(model), tmp_path / name, **options)
    for curve in curves.values():
        assert curve[-1] < 0.9 * curve[0]
        tolerance = 2**-6 if bf16 else 1e-4
        assert curve == pytest.approx(curves["none"], rel=tolerance)


@pytest.mark.parametrize("kind", ["peft", "ours"])
def test_resuming_gives_the_same_losses(kind, base, tmp_path) -> None:
    from transformers import Trainer

    def trainer(folder) -> Trainer:
        torch.manual_seed(0)
        if kind == "peft":
            model = with_peft(copy.deepcopy(base), lora_dropout=0.1)
        else:
            model = nf4.add_lora(copy.deepcopy(base), r=4, lora_dropout=0.1)
        how = arguments(tmp_path / folder, save_strategy="steps", save_steps=4)
        return Trainer(model=model, args=how, train_dataset=DATA)

    whole = trainer("whole")
    whole.train()
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(losses(whole)) == 8
    assert losses(again)[-4:] == losses(whole)[-4:]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_trainer_saves_the_adapter_alone(base, tmp_path) -> None:
    model = with_peft(copy.deepcopy(base))
    train(model, tmp_path, save_strategy="steps", save_steps=8)
    folder = tmp_path / "checkpoint-8"
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        assert error(again(TOKENS).logits, model.eval()(TOKENS).logits) < 1e-6


def test_sft_trainer_of_trl_lowers_the_loss(base, tokenizer, tmp_path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    how = SFTConfig(
        **{k: v for k, v in arguments(tmp_path).to_dict().items() if k in TRAINER_OPTIONS},
        output_dir=str(tmp_path),
        max_length=32,
    )
    data = Dataset.from_dict({"text": ["to be, or not to be: that is the question"] * 16})
    trainer = SFTTrainer(
        model=base,
        args=how,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    kinds = {type(m).__name__ for m in trainer.model.modules()}
    assert "NF4LoraLinear" in kinds
    trainer.train()
    assert losses(trainer)[-1] < 0.95 * losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4


TRAINER_OPTIONS = (
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "logging_steps",
    "save_strategy",
    "report_to",
    "disable_tqdm",
    "use_cpu",
    "dataloader_pin_memory",
)


def test_lightning_needs_nothing_special(base, tmp_path) -> None:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Module(nf4.add_lora(base, r=4))
    packed = base.model.layers[0].mlp.up_proj.packed.clone()
    trainer = lightning.Trainer(
        max_steps=8,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(SAME, batch_size=2))
    assert module.losses[-1] < 0.95 * module.losses[0]
    assert torch.equal(base.model.layers[0].mlp.up_proj.packed, packed)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = Module.load_from_checkpoint(checkpoint, model=copy.deepcopy(base))
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_plain_loop_with_accumulation_and_clipping(base) -> None:
    model = nf4.add_lora(base, r=4, use_dora=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        (loss / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[-1] < 0.9 * found[0]
