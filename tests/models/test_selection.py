"""Which layers are quantized and which are left: what is asked, what code reads, what is said."""

import pytest
import torch
import transformers
from torch import nn

import nf4
from nf4.commands.cli import main
from nf4.integrations.transformers import NF4Config
from nf4.models.readers import read_layers
from nf4.models.selection import resolve_skip

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
GEMMA3N = {
    **{**SMALL, **HEADS, "num_hidden_layers": 2, "head_dim": 16},
    **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
    **{"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    **{"activation_sparsity_pattern": [0.0, 0.0], "altup_coef_clip": 1.0},
}
# Models, and the layers whose weight their code reads
READ = {
    "Mamba": ("MambaForCausalLM", SMALL, {"dt_proj", "out_proj", "x_proj"}),
    "Mamba-2": (
        "Mamba2ForCausalLM",
        {**SMALL, "num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
        {"out_proj"},
    ),
    "Jamba": (
        "JambaForCausalLM",
        {**SMALL, **HEADS, "num_hidden_layers": 2, "num_experts": 2, "use_mamba_kernels": False}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
        {"dt_proj"},
    ),
    "RWKV": (
        "RwkvForCausalLM",
        {**SMALL, "attention_hidden_size": 64, "num_hidden_layers": 2, "rescale_every": 1},
        {"output", "value"},
    ),
    "Gemma3n": ("Gemma3nForCausalLM", GEMMA3N, {"correction_coefs", "prediction_coefs"}),
}
TOKENS = torch.arange(12)[None] + 3


def make(name):
    kind, sizes, _ = READ[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls._from_config(getattr(transformers, cls.config_class.__name__)(**sizes))


@pytest.mark.parametrize("name", READ)
@pytest.mark.filterwarnings("ignore:.*fast path is not available")
def test_layers_whose_weight_is_read_stay_dense(name, tmp_path) -> None:
    """By either way in; the model runs, trains and is saved and opened as it computes."""
    dense, (_, _, expected) = make(name), READ[name]
    dense.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="left dense are .*whose weight .* reads"):
        loaded = type(dense).from_pretrained(
            tmp_path / "dense", quantization_config=NF4Config(), dtype=torch.float32
        )
    with pytest.warns(UserWarning, match="left dense are .*whose weight .* reads"):
        model = nf4.quantize_model(dense, loaded.config.quantization_config.skip_modules)
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {n.rpartition(".")[2] for n in linear} - {"lm_head", "head", "router"} == expected
    model.save_pretrained(tmp_path / "saved")  # RWKV's weights are others after a forward
    for one in (model, loaded):
        assert any(isinstance(m, nf4.LinearNF4) for m in one.modules())
        one.train()
        one(TOKENS, labels=TOKENS).loss.backward()
        one.eval()
    with torch.no_grad():
        found = model(TOKENS).logits
        assert torch.equal(found, loaded(TOKENS).logits) and found.isfinite().all()
    again = type(dense).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, found)


class Reads(nn.Module):
    """Code as models have it: what reads a weight, and what only asks for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.asked = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.inner = nn.ModuleDict({"deep": nn.Linear(32, 32, bias=False)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"local": nn.Linear(32, 32)})])

    def _init_weights(self) -> None:
        self.called.weight.data.zero_()

    def _reset_parameters(self) -> None:
        self.called.weight.data.zero_()

    def fuse_projections(self):
        return torch.cat([self.called.weight, self.asked.weight])

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor):
            x = x.to(self.asked.weight.dtype)
        for block in self.blocks:
            block.local.weight.mul_(1)
        return x @ self.read.weight + self.called(x) @ self.inner.deep.weight.T


def test_what_is_read_is_told_from_what_is_asked() -> None:
    model = Reads()
    names = {id(m): n for n, m in model.named_modules()}
    found = {names[key]: reader for key, reader in read_layers(model).items()}
    assert found == dict.fromkeys(("read", "inner.deep", "blocks.0.local"), "Reads")


class Overrides(Reads):
    """A forward in the place of one that reads."""

    def forward(self, x):
        return self.read(x)


def test_what_only_a_replaced_forward_read_is_called() -> None:
    assert read_layers(Overrides()) == {}


REFUSED = {
    "matmul": (lambda w: torch.ones(2, 64) @ w, TypeError),
    "linear": (lambda w: nn.functional.linear(torch.ones(2, 64), w), TypeError),
    "index": (lambda w: w[0], TypeError),
    "method": (lambda w: w.float(), AttributeError),
    "data": (lambda w: w.data.copy_(w), AttributeError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_4_bit_weight_says_of_which_layer_it_is_and_what_to_do(case) -> None:
    model = nf4.quantize_model(nn.ModuleDict({"mixer": nn.ModuleDict({"fc": nn.Linear(64, 32)})}))
    weight = model["mixer"]["fc"].weight
    assert (weight.shape, weight.size(), weight.size(-1)) == ((32, 64), (32, 64), 64)
    assert (weight.dim(), weight.ndim, weight.numel()) == (2, 2, 2048)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", False)
    assert not hasattr(weight, "quant_state")
    call, kind = REFUSED[case]
    with pytest.raises(kind, match=r"4-bit weight of mixer\.fc; .*skip_modules=\['\+mixer\.fc'\]"):
        call(weight)
    with pytest.raises(kind, match="an NF4Tensor; multiply by it with nf4.linear"):
        call(nf4.quantize(torch.randn(32, 64)))


def layers() -> nn.ModuleDict:
    return nn.ModuleDict({n: nn.Linear(32, 32) for n in ("lm_head", "gate", "up")})


def test_names_with_a_plus_are_added_to_the_default() -> None:
    for skip, left in (
        (["+gate"], {"lm_head", "gate"}),
        ("+gate", {"lm_head", "gate"}),
        (["gate"], {"gate"}),
        ("(lm_head|gate)", {"lm_head", "gate"}),
        ((), set()),
    ):
        model = nf4.quantize_model(layers(), skip)
        assert {n for n, m in model.items() if type(m) is nn.Linear} == left, skip
    assert resolve_skip(None, ("a",)) == ("a",)
    with pytest.raises(ValueError, match="added to it, got both: gate, \\+up"):
        nf4.quantize_model(layers(), ["gate", "+up"])


MISSED = {
    "names": (["up", "gaet"], "'gaet'"),
    "plus": (["+down"], "'down'"),
    "re": ("x.*", "'x.*'"),
}


@pytest.mark.parametrize("case", MISSED)
def test_names_that_match_nothing_are_named(case, tiny_llama, tmp_path) -> None:
    skip, named = MISSED[case]
    with pytest.warns(UserWarning, match="no module is called " + named.replace("*", r"\*")):
        nf4.quantize_model(layers(), skip)
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    skip = ["+gaet"] if case == "plus" else ["lm_head", "gaet"] if case == "names" else "gae+t"
    with pytest.warns(UserWarning, match=r"no module is called 'gae\+?t'"):
        loaded = type(dense).from_pretrained(
            tmp_path / "dense", quantization_config=NF4Config(skip_modules=skip)
        )
    if case != "re":
        said = loaded.config.quantization_config.skip_modules
        assert sorted(said) == ["gaet", "lm_head"]
    with pytest.warns(UserWarning, match=r"no module is called 'gae\+?t'"):
        nf4.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", skip)
    with pytest.warns(UserWarning, match=r"no module is called 'gae\+?t'"):
        nf4.model_error(tmp_path / "dense", skip)


@pytest.mark.filterwarnings("default:skip_modules")
def test_the_command_line_says_it_in_one_line(tiny_llama, tmp_path, capsys) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    args = ["quantize", str(tmp_path / "dense"), str(tmp_path / "q"), "--skip"]
    assert main([*args, "+gaet"]) == 0
    said = capsys.readouterr().err.splitlines()
    expected = "nf4 quantize: warning: skip_modules: no module is called 'gaet'"
    assert [line for line in said if "warning" in line] == [
        f"{expected}; nothing is left dense by it"
    ]


def test_targets_that_match_nothing_are_named() -> None:
    model = nf4.quantize_model(layers())
    with pytest.warns(UserWarning, match="target_modules: no module is called 'uup'"):
        nf4.add_lora(model, r=2, target_modules=["gate", "uup"])
    assert isinstance(model["gate"], nf4.QLoRALinear)


class Named(nn.Linear):
    """A subclass with a forward of its own, as Falcon has one."""

    def forward(self, x):
        return x @ self.weight.T


def test_subclasses_and_experts_that_stay_dense_are_named_once() -> None:
    class OddExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 8, 8))

    model = nn.Sequential(nn.Linear(32, 32), Named(32, 32), Named(32, 32), OddExperts())
    with pytest.warns(UserWarning) as said:
        nf4.quantize_model(model)
    assert [str(w.message) for w in said] == [
        "Sequential: left dense are 2 Named, whose class has a forward of its own; 1 OddExperts, "
        "which keep their weights in a form of their own"
    ]
    with pytest.raises(ValueError, match="found none in Sequential.*1 Named, whose class has"):
        nf4.quantize_model(nn.Sequential(Named(32, 32)))
