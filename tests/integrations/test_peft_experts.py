"""PEFT's adapters on experts in four bits, against PEFT's on the same weights made dense."""

import copy
import warnings

import pytest
import torch
import transformers
from architectures import GROUPED
from helpers import error
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import nf4
from nf4.integrations.peft import merge_and_requantize
from nf4.layers.experts import ExpertsNF4

TOKENS = 3 + torch.arange(24).view(2, 12)
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = {**GROUPED, **MIXTURE, "num_experts": 4}
ROUTED = {**GROUPED, **MIXTURE, "n_routed_experts": 4, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK = {**ROUTED, **LATENT, "v_head_dim": 16, "n_group": 1, "topk_group": 1}
del DEEPSEEK["head_dim"]
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED = {"shared_expert_intermediate_size": 32}
MODELS = {
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", {**EXPERTS, **SHARED}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", EXPERTS),
    "OLMoE": ("OlmoeForCausalLM", {**EXPERTS, "eos_token_id": 1}),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "n_shared_experts": 1}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "Qwen3-Next": ("Qwen3NextForCausalLM", {**EXPERTS, **SHARED, **LINEAR}),
    "GLM4-MoE": ("Glm4MoeForCausalLM", {**ROUTED, "n_group": 1, "topk_group": 1}),
}
NAMES = {"Mixtral": ["o_proj", "w1", "w2", "w3"]}
MODERN = ["o_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = [
    # PEFT's own: of patterns for parameters, and of a name of transformers'
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def bases(name: str) -> tuple[nn.Module, nn.Module]:
    """Return a quantized model, and the same weights dense."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    quantized = nf4.quantize_model(cls(cls.config_class(**sizes))).eval()
    return quantized, nf4.merge(copy.deepcopy(quantized)).eval()


def adapted(base: nn.Module, **options) -> PeftModel:
    torch.manual_seed(3)
    sizes = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**{**sizes, **options})).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if "lora_" in k}


@pytest.mark.parametrize("targets", ["all-linear", "list"])
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_adapted_saved_loaded_and_merged(name, targets, tmp_path) -> None:
    quantized, dense = bases(name)
    wanted = NAMES.get(name, MODERN) if targets == "list" else targets
    ours = adapted(quantized, target_modules=wanted)
    on_experts = [k for k in adapters(ours) if ".experts." in k]
    mixtures = sum(isinstance(m, ExpertsNF4) for m in quantized.modules())
    assert len(on_experts) == 4 * mixtures  # A and B of two parameters
    expected = logits(ours)
    ours.save_pretrained(tmp_path / "adapter")
    for base in (quantized, dense):  # PEFT's own on dense tensors
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        assert error(logits(again), expected) < 1e-5
    theirs = adapted(dense, target_modules=wanted)
    if name != "Qwen2-MoE":  # whose experts PEFT does not find by their old names
        assert adapters(theirs).keys() == adapters(ours).keys()
        theirs.save_pretrained(tmp_path / "theirs")
        again = PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path / "theirs")
        assert error(logits(again), logits(theirs)) < 1e-5
    ours.merge_adapter()
    assert error(logits(ours), expected) < 1e-5
    ours.unmerge_adapter()
    assert torch.equal(logits(ours), expected)
    merged = ours.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, ExpertsNF4 | nf4.LinearNF4)]
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    assert error(logits(type(merged).from_pretrained(tmp_path / "merged")), expected) < 1e-5


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_gradients_are_those_of_peft_on_dense_experts(name) -> None:
    models = [adapted(base, target_modules="all-linear") for base in bases(name)]
    models[1].load_state_dict(adapters(models[0]), strict=False)
    grads = []
    for model in models:
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[1].items():
        assert error(grads[0][key], grad) < 1e-4, key


PARTIAL = {
    "one_parameter": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "one_expert": {"target_modules": ["experts.down_proj.expert_2"]},
    "one_layer_s": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "expression": {"target_modules": r".*\.experts\..*expert_[01]"},
}


@pytest.mark.parametrize("options", PARTIAL.values(), ids=PARTIAL.keys())
def test_some_experts_are_adapted_and_merged(options, tmp_path) -> None:
    quantized, _ = bases("Qwen3-MoE")
    model = adapted(quantized, **options)
    expected = logits(model)
    assert error(logits(quantized), expected) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path / "adapter")
    assert error(logits(again), expected) < 1e-6
    assert torch.equal(logits(model.unload()), logits(quantized))
    merged = again.merge_and_unload()
    assert error(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert error(logits(type(merged).from_pretrained(tmp_path / "merged")), expected) < 1e-5


def test_adapters_of_experts_are_switched_stacked_and_disabled() -> None:
    quantized, dense = bases("Mixtral")
    models = [adapted(base, target_modules="all-linear") for base in (quantized, dense)]
    for model in models:
        torch.manual_seed(5)
        options = {"r": 3, "init_lora_weights": False, "target_modules": "all-linear"}
        model.add_adapter("second", LoraConfig(**options))
    ours, theirs = models
    theirs.load_state_dict(adapters(ours), strict=False)
    first = logits(ours)
    for names in ("second", ["default", "second"], "default"):
        for model in models:
            model.base_model.set_adapter(names)
        assert error(logits(ours), logits(theirs)) < 1e-5
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(quantized))
    ours.merge_adapter(["second"])
    ours.unmerge_adapter()  # PEFT's own on the dense router, which rounds
    assert error(logits(ours), first) < 1e-6
    ours.delete_adapter("second")
    assert error(logits(ours), first) < 1e-6


def test_adapters_of_experts_with_dropout_are_one_a_layer(tmp_path) -> None:
    quantized, _ = bases("Qwen2-MoE")
    model = adapted(quantized, target_modules="all-linear", lora_dropout=0.1)
    assert "experts.down_proj.expert_0.lora_A" in " ".join(adapters(model))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path / "adapter")
    assert error(logits(again), expected) < 1e-6
    assert error(logits(model.merge_and_unload()), expected) < 1e-5
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        adapted(bases("Mixtral")[0], target_modules="all-linear", lora_dropout=0.1)


def test_an_adapter_of_single_experts_of_old_is_taken(tmp_path) -> None:
    """As PEFT wrote one when each expert had layers of its own."""
    quantized, dense = bases("Mixtral")
    adapted(dense, target_modules=["q_proj", "w1", "w2", "w3"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {k: v for k, v in tensors.items() if "experts" not in k}
    for layer in range(2):
        for expert in range(4):
            for w, (n, k) in {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}.items():
                old = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}"
                tensors[f"{old}.lora_A.weight"] = torch.randn(4, k) / 8
                tensors[f"{old}.lora_B.weight"] = torch.randn(n, 4) / 8
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    LoraConfig(**options, inference_mode=True).save_pretrained(tmp_path)
    found = [PeftModel.from_pretrained(copy.deepcopy(b), tmp_path) for b in (quantized, dense)]
    assert error(logits(found[0]), logits(found[1])) < 1e-5
    assert error(logits(found[0]), logits(quantized)) > 1e-2


def test_merging_experts_into_four_bits_reports_each() -> None:
    quantized, _ = bases("Qwen3-MoE")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(quantized, target_modules=["q_proj"], target_parameters=parameters)
    expected, reported = logits(model), []
    merged = merge_and_requantize(model, reported.append)
    assert len(reported) == 2 + 2 * 2 * 4 and all(0 < row.of_update < 1 for row in reported)
    assert any(row.name.endswith("gate_up_proj.expert_3") for row in reported)
    assert isinstance(merged.model.layers[0].mlp.experts, ExpertsNF4)
    assert error(logits(merged), expected) < 0.5 * error(logits(quantized), expected)


def test_merging_experts_that_are_not_finite_is_refused() -> None:
    model = adapted(bases("Mixtral")[0], target_modules=[], target_parameters=["experts.down_proj"])
    key = next(n for n, _ in model.named_parameters() if "experts.lora_B" in n)
    model.get_parameter(key).data[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"down_proj.expert_\d: expected finite weights after merg"
    ):
        model.merge_adapter()


def test_experts_load_without_memory_for_what_is_overwritten(tmp_path) -> None:
    quantized, _ = bases("Mixtral")
    model = adapted(quantized, target_modules="all-linear")
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": True}
    again = PeftModel.from_pretrained(copy.deepcopy(quantized), tmp_path, **options)
    assert error(logits(again), logits(model)) < 1e-6


def test_numbered_experts_of_old_files_are_taken(tmp_path) -> None:
    model, _ = bases("Mixtral")
    old = {}
    for key, value in model.state_dict().items():
        old[key.replace(".expert_", ".")] = value
    assert len(old) == len(model.state_dict()) and old.keys() != model.state_dict().keys()
    fresh, _ = bases("Mixtral")
    for p in fresh.parameters():
        p.data.zero_()
    fresh.load_state_dict(old)
    assert torch.equal(logits(fresh), logits(model))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k.replace(".expert_", "."): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert any(".expert_0." in key for key in stored)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE"])
def test_ia3_and_our_own_adapters_on_experts_are_saved(name, tmp_path) -> None:
    quantized, _ = bases(name)
    torch.manual_seed(1)
    model = nf4.add_lora(copy.deepcopy(quantized), r=2)
    for n, p in model.named_parameters():
        if n.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = type(model).from_pretrained(tmp_path / "ours")
    assert error(logits(again), logits(model)) < 1e-5
    config = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    assert error(logits(get_peft_model(quantized, config)), logits(bases(name)[0])) < 1e-6
