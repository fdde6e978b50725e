"""Adapters of every kind, on 4-bit and dense layers: one mechanism, and a fifth kind in a file."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import error
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import nf4
from nf4.adapted import AdaptedLayer, adapted_layers
from nf4.adapter import KINDS, Adapter
from nf4.adapters import adapter_names, find_targets, layer_base, put_adapters, with_adapter
from nf4.kinds.adamix import AdaMix
from nf4.kinds.ia3 import IA3

TOKENS = torch.arange(24).view(2, 12) % 320


class _Shift:
    """y = below(x) + shift."""

    def __init__(self, shift) -> None:
        self.shift = shift

    def apply(self, x, below, base):
        y = below(x)
        return y + self.shift.to(y.dtype)

    def fold(self, w, bias, base):
        shift = self.shift.detach()
        return w, shift if bias is None else (bias + shift).to(bias.dtype)


class Shift(Adapter):
    """A fifth kind, whole: a learned shift of each output."""

    peft_type = "TEST_SHIFT"
    parts = {"shift": 1}  # noqa: RUF012

    def __init__(self, base) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(base.weight.shape[0], device=base.weight.device))

    def term(self):
        return _Shift(self.shift)

    def tensors(self):
        return {"shift": self.shift}

    @classmethod
    def config_of(cls, layers):
        return {}

    @classmethod
    def check_config(cls, config) -> None:
        pass

    @classmethod
    def from_file(cls, base, config, name, tensors):
        adapter = cls(base)
        adapter.shift.data.copy_(tensors["shift"])
        return adapter


def add_shift(model, target_modules="all-linear", adapter_name="default"):
    targets = find_targets(model, target_modules, adapter_name)
    return put_adapters(
        model,
        targets,
        lambda _, layer: with_adapter(layer, adapter_name, Shift(layer_base(layer))),
        adapter_name,
    )


ADD = {
    "lora": lambda m, **o: nf4.add_lora(m, r=4, **o),
    "dora": lambda m, **o: nf4.add_lora(m, r=4, use_dora=True, **o),
    "ia3": lambda m, **o: nf4.add_ia3(m, **o),
    "adamix": lambda m, **o: nf4.add_adamix(m, r=4, **o),
    "adamix_share_a": lambda m, **o: nf4.add_adamix(m, r=4, share="A", num_modules=3, **o),
    "adamix_share_b": lambda m, **o: nf4.add_adamix(m, r=4, share="B", num_modules=3, **o),
    "fifth": add_shift,
}
BASES = ["4bit", "dense"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def randomize(model: nn.Module, name: str = "default") -> None:
    """Give an adapter values beside its start."""
    torch.manual_seed(4)
    for layer in adapted_layers(model):
        if name in layer.named_adapters():
            for parameter in layer.named_adapters()[name].parameters_of_adapter():
                parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.fixture(params=BASES)
def base(request, tiny_llama) -> nn.Module:
    """A model with biases, in four bits or dense."""
    model = tiny_llama(attention_bias=True, mlp_bias=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return nf4.quantize_model(model) if request.param == "4bit" else model


@pytest.fixture(params=ADD)
def kind(request) -> str:
    return request.param


def with_kind(base: nn.Module, kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return ADD[kind](copy.deepcopy(base), **options)


def test_kind_starts_at_the_base_trains_only_itself_and_switches_off(kind, base) -> None:
    model = with_kind(base, kind).train()
    assert error(logits(model), logits(base)) < 1e-6
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    adapters = [layer.named_adapters()["default"] for layer in adapted_layers(model)]
    own = [p for adapter in adapters for p in adapter.parameters_of_adapter()]
    assert {id(model.get_parameter(n)) for n in trained} == set(map(id, own)) and trained
    optimizer = torch.optim.Adam(own, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    model.eval()
    tuned = logits(model)
    assert error(tuned, logits(base)) > 1e-3
    with nf4.disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
    nf4.set_adapter(model, None)
    assert torch.equal(logits(model), logits(base))
    assert not any(p.requires_grad for p in model.parameters())
    nf4.set_adapter(model, "default")
    assert torch.equal(logits(model), tuned)


def test_kind_has_files_a_state_dict_and_copies(kind, base, tmp_path) -> None:
    model = with_kind(base, kind)
    randomize(model)
    nf4.save_adapter(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    # The same layers take the file's values
    layers, other = list(map(id, again.modules())), with_kind(base, kind)
    nf4.load_adapter(other, tmp_path / "saved")
    nf4.load_adapter(again, tmp_path / "saved")
    assert list(map(id, again.modules())) == layers
    assert torch.equal(logits(other), logits(model))
    twin = with_kind(base, kind)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    assert "default" in repr(model) or "r=4" in repr(model)


def test_kind_merges_to_within_rounding(kind, base) -> None:
    model = with_kind(base, kind).train()
    randomize(model)
    rows = []
    merged = nf4.merge(copy.deepcopy(model), report=rows.append)
    model.eval()
    assert error(logits(merged.eval()), logits(model)) < 1e-5
    assert error(logits(model), logits(base)) > 1e-3
    assert not adapted_layers(merged)
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    assert rows and all(row.relative < 1e-6 for row in rows)


def test_kinds_stack_on_a_layer_and_merge_in_turn(base) -> None:
    model = copy.deepcopy(base)
    for name in ("lora", "ia3", "adamix", "fifth", "dora"):
        ADD[name](model, adapter_name=name)
        randomize(model, name)
    assert sorted(adapter_names(model)) == ["adamix", "dora", "fifth", "ia3", "lora"]
    alone = {}
    for name in adapter_names(model):
        nf4.set_adapter(model, name)
        alone[name] = logits(model)
    assert all(error(a, b) > 1e-3 for a in alone.values() for b in alone.values() if a is not b)
    for names in (["lora", "ia3"], ["ia3", "lora"], ["fifth", "ia3", "adamix", "dora", "lora"]):
        nf4.set_adapter(model, names)
        merged = nf4.merge(copy.deepcopy(model))
        assert error(logits(merged), logits(model)) < 1e-5
    nf4.set_adapter(model, ["lora", "ia3"])
    one = logits(model)
    nf4.set_adapter(model, ["ia3", "lora"])
    assert error(logits(model), one) > 1e-4, "the last is outermost"


def test_kinds_by_sample(base) -> None:
    model = copy.deepcopy(base)
    for name in ("lora", "ia3", "fifth"):
        ADD[name](model, adapter_name=name)
        randomize(model, name)
    expected = {}
    for name in (None, "lora", "ia3", "fifth"):
        nf4.set_adapter(model, name)
        expected[name] = logits(model)
    for names in (["ia3", "lora"], [None, "ia3"], ["fifth", "fifth"]):
        with nf4.mixed_batch(model, names):
            mixed = logits(model)
        for sample, name in enumerate(names):
            assert error(mixed[sample], expected[name][sample]) < 1e-5


def test_adapters_on_dense_layers_keep_names_and_modules(tiny_llama) -> None:
    model = tiny_llama()
    names, lm_head = list(model.state_dict()), model.lm_head
    nf4.add_lora(model, r=2)
    assert model.lm_head is lm_head, "the output layer is not adapted"
    assert [n for n in model.state_dict() if ".adapters." not in n] == names
    with pytest.raises(ValueError, match="expected a model without adapters, got them on model.la"):
        nf4.quantize_model(model)


def test_conv1d_is_adapted_dense_and_gives_itself_back(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=4)).eval()
    for add in (ADD["lora"], ADD["dora"], ADD["ia3"], ADD["adamix"]):
        model = add(copy.deepcopy(dense))
        randomize(model)
        assert error(logits(model), logits(dense)) > 1e-3
        merged = nf4.merge(copy.deepcopy(model))
        assert type(merged.transformer.h[0].attn.c_attn) is type(dense.transformer.h[0].attn.c_attn)
        assert error(logits(merged), logits(model)) < 1e-5
        assert merged.state_dict().keys() == dense.state_dict().keys()


# --- (IA)³


def test_ia3_is_peft_s_in_values_gradients_and_files(base, tmp_path) -> None:
    model = with_kind(base, "ia3")
    scaled = {n.rpartition(".")[2]: m.named_adapters()["default"].of_inputs
              for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}  # fmt: skip
    assert scaled == {"k_proj": False, "v_proj": False, "down_proj": True}
    randomize(model)
    nf4.save_adapter(model, tmp_path / "ours")
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True)
    assert error(logits(model), logits(theirs)) < 1e-5
    for one in (model, theirs):
        one(TOKENS, labels=TOKENS).loss.backward()
    for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        ours = model.model.layers[1].get_submodule(name).adapters["default"].ia3_l.grad
        expected = theirs.base_model.model.model.layers[1].get_submodule(name)
        assert error(ours, expected.ia3_l["default"].grad.flatten()) < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    nf4.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))


def nf4_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nf4.LinearNF4)]


def test_ia3_of_peft_opens_with_its_own_targets(base, tmp_path) -> None:
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    config = IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    theirs = get_peft_model(plain, config)
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    nf4.load_adapter(model, tmp_path / "theirs")
    assert error(logits(model), logits(theirs.eval())) < 1e-5


@pytest.mark.parametrize("double_quant", [False, True])
def test_ia3_of_outputs_merges_into_the_scales(double_quant, tiny_llama) -> None:
    model = nf4.quantize_model(tiny_llama(attention_bias=True).eval(), double_quant=double_quant)
    nf4.add_ia3(model)
    randomize(model)
    layer = model.model.layers[0].self_attn.k_proj
    layer.adapters["default"].ia3_l.data[:3] = torch.tensor([0.0, -1.5, 2.0])
    expected, packed = logits(model), layer.packed.clone()
    rows = []
    merged = nf4.merge(model, requantize="exact", report=rows.append)
    attention, mlp = merged.model.layers[0].self_attn, merged.model.layers[0].mlp
    assert type(attention.k_proj) is nf4.LinearNF4 and torch.equal(attention.k_proj.packed, packed)
    assert not attention.k_proj.double_quant
    assert type(mlp.down_proj) is nn.Linear, "factors of inputs have no place in scales"
    assert type(mlp.up_proj) is nf4.LinearNF4 and mlp.up_proj.double_quant == double_quant
    assert error(logits(merged), expected) < 1e-5
    assert all(row.relative < 1e-6 for row in rows) and len(rows) == 6


def test_ia3_of_inputs_is_requantized_on_request(tiny_llama) -> None:
    model = nf4.add_ia3(nf4.quantize_model(tiny_llama().eval()))
    randomize(model)
    expected, rows = logits(model), []
    merged = nf4.merge(model, requantize=True, report=rows.append)
    assert len(nf4_layers(merged)) == 14
    assert 1e-3 < error(logits(merged), expected) < 0.3
    errors = {row.name.rpartition(".")[2]: row.relative for row in rows}
    assert errors["k_proj"] < 1e-6 and 0.02 < errors["down_proj"] < 0.2


def test_lora_is_made_dense_where_exact_four_bits_are_wanted(tiny_llama) -> None:
    model = nf4.add_lora(nf4.quantize_model(tiny_llama().eval()), r=2, target_modules=["q_proj"])
    randomize(model)
    expected = logits(model)
    merged = nf4.merge(model, requantize="exact")
    attention = merged.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear and type(attention.k_proj) is nf4.LinearNF4
    assert error(logits(merged), expected) < 1e-5


def test_ia3_in_bf16_rounds_as_peft_does(tiny_llama, tmp_path) -> None:
    model = nf4.add_ia3(nf4.quantize_model(tiny_llama().bfloat16().eval()))
    randomize(model)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 160, dtype=torch.bfloat16)
    factor = layer.adapters["default"].ia3_l
    assert layer(x).dtype == torch.bfloat16 and factor.dtype == torch.float32
    assert torch.equal(layer(x), nf4.linear((x * factor).to(torch.bfloat16), layer.weight))


# --- AdaMix


def draws(model: nn.Module, monkeypatch) -> list[int]:
    """Record the modules that forwards draw from now on."""
    seen, randint = [], torch.randint

    def recorded(*args, **options):
        drawn = randint(*args, **options)
        seen.append(drawn.item())
        return drawn

    monkeypatch.setattr(torch, "randint", recorded)
    return seen


def test_adamix_draws_a_and_b_apart_for_each_layer_and_forward(base, monkeypatch) -> None:
    model = with_kind(base, "adamix").train()
    randomize(model)
    seen = draws(model, monkeypatch)
    rounds = 60
    for _ in range(rounds):
        model(TOKENS)
    layers = len(adapted_layers(model))
    assert len(seen) == 2 * layers * rounds
    counts = torch.tensor(seen).view(-1, 2)
    joint = torch.bincount(4 * counts[:, 0] + counts[:, 1], minlength=16).double()
    expected = len(counts) / 16
    chi2 = ((joint - expected) ** 2 / expected).sum().item()
    assert chi2 < 44.3, "above the 99.99th percentile of chi-squared with 15 degrees of freedom"
    per_layer = counts.view(rounds, layers, 2)
    assert (per_layer != per_layer[:1]).any() and (per_layer[0] != per_layer[0, :1]).any()


def test_adamix_computes_what_it_drew(monkeypatch) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 48), r=4, num_modules=3).train()
    mixture = layer.adapters["default"]
    nn.init.normal_(mixture.lora_B)
    seen, x = draws(layer, monkeypatch), torch.randn(5, 64)
    y = layer(x)
    y.sum().backward()
    i, j = seen
    low = (mixture.lora_A[i], mixture.lora_B[j], mixture.scaling)
    assert torch.equal(y, nf4.lora_linear(x, layer.weight, *low, layer.bias))
    for grad, drawn in ((mixture.lora_A.grad, i), (mixture.lora_B.grad, j)):
        assert [g.abs().max() > 0 for g in grad] == [m == drawn for m in range(3)]
    layer.eval()
    mean = (mixture.lora_A.mean(0), mixture.lora_B.mean(0), mixture.scaling)
    assert torch.equal(layer(x), nf4.lora_linear(x, layer.weight, *mean, layer.bias))
    assert len(seen) == 2, "nothing is drawn in evaluation"


def test_adamix_is_repeated_by_its_seed(base) -> None:
    model = with_kind(base, "adamix").train()
    randomize(model)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(logits(model))
    assert torch.equal(found[0], found[1]) and error(found[2], found[0]) > 1e-4
    assert error(logits(model), logits(model)) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_adamix_draws_again_alike_under_checkpointing(reentrant, base) -> None:
    """Also where another forward comes before backward, as the consistency loss has it."""
    model = with_kind(base, "adamix").train()
    randomize(model)
    grads = {}
    for checkpointed in (False, True):
        if checkpointed:
            options = {"use_reentrant": reentrant}
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(3)
        first, second = model(TOKENS).logits, model(TOKENS).logits
        loss = nf4.losses.consistency_loss(first, second) + first.square().mean()
        loss.backward()
        grads[checkpointed] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads[False].items():
        assert error(grads[True][name], grad) < 1e-5 or grad.abs().max() == 0, name


def test_adamix_compiles_once_for_all_draws(backend) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 48), r=4).train()
    nn.init.normal_(layer.adapters["default"].lora_B)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    outputs = [compiled(x) for _ in range(12)]
    assert len(graphs) == 1
    assert any(error(y, outputs[0]) > 1e-3 for y in outputs)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    outputs = [compiled(x) for _ in range(12)]
    assert any(error(y, outputs[0]) > 1e-3 for y in outputs)
    mixture = layer.adapters["default"]
    pairs = [(a, b, mixture.scaling) for a in mixture.lora_A for b in mixture.lora_B]
    possible = [nf4.lora_linear(x, layer.weight, *pair, layer.bias) for pair in pairs]
    assert all(min(error(y, p) for p in possible) < 1e-5 for y in outputs)


def test_adamix_under_a_checkpoint_of_one_layer_is_compiled_too(backend) -> None:
    layer = nf4.add_adamix(nf4.LinearNF4(64, 64), r=4).train()
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(5, 64, requires_grad=True)

    def step(x):
        return checkpoint(layer, x, use_reentrant=False).square().sum()

    compiled = torch.compile(step, backend=backend)
    compiled(x).backward()
    grad = layer.adapters["default"].lora_A.grad
    assert sum(g.abs().max().item() > 0 for g in grad) == 1


@pytest.mark.parametrize("share", [None, "A", "B"])
def test_merged_adamix_is_lora_in_peft_s_files(share, base, tmp_path) -> None:
    model = nf4.add_adamix(copy.deepcopy(base), r=4, lora_alpha=8, num_modules=3, share=share)
    randomize(model)
    expected = logits(model)
    model = nf4.merge_adamix(model)
    assert error(logits(model), expected) < 1e-6
    assert {type(a) for m in adapted_layers(model) for a in m.named_adapters().values()} <= {
        nf4.QLoRALinear,
        KINDS["LORA"],
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        4 * (m.in_features + m.out_features) for m in adapted_layers(model)
    )
    nf4.save_adapter(model, tmp_path / "lora")
    plain = nf4.merge(copy.deepcopy(base)) if nf4_layers(base) else copy.deepcopy(base)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    assert error(logits(theirs), expected) < 1e-5
    assert error(logits(nf4.merge(model)), expected) < 1e-5


def test_merged_adamix_stays_beside_other_adapters(base) -> None:
    model = nf4.add_lora(copy.deepcopy(base), r=2, adapter_name="first")
    nf4.add_adamix(model, r=4, adapter_name="mixed")
    for name in ("first", "mixed"):
        randomize(model, name)
    nf4.set_adapter(model, ["first", "mixed"])
    expected = logits(model)
    nf4.merge_adamix(model, "mixed")
    assert adapter_names(model) == ["first", "mixed"]
    assert error(logits(model), expected) < 1e-6
    with pytest.raises(ValueError, match=r"expected mixtures called 'first' .*, found none"):
        nf4.merge_adamix(model, "first")


# --- bad input


def mixture_of(layer: nn.Module) -> AdaMix:
    return layer.adapters["default"]


def spoiled(model: nn.Module, spoil) -> nn.Module:
    nf4.add_adamix(model, r=4)
    with torch.no_grad():
        spoil(mixture_of(adapted_layers(model)[-1]))
    return model


def ranks(mixture: AdaMix) -> None:
    mixture.lora_B = nn.Parameter(torch.zeros(4, mixture.lora_B.shape[1], 5))


def fewer(mixture: AdaMix) -> None:
    mixture.lora_A = nn.Parameter(mixture.lora_A[:3].clone())


BAD = {
    "no_module": (lambda m: nf4.add_ia3(m, ["q"]), ValueError, "names of linear layers, .*'q'"),
    "no_feedforward": (
        lambda m: nf4.add_ia3(m, ["k_proj"], ["nothing"]),
        ValueError,
        "feedforward_modules: expected names of target_modules, .*nothing.* matches none",
    ),
    "feedforward_no_target": (
        lambda m: nf4.add_ia3(m, ["k_proj"], ["up_proj"]),
        ValueError,
        "feedforward_modules: expected names of target_modules, .* which is none of them",
    ),
    "feedforward_number": (
        lambda m: nf4.add_ia3(m, ["k_proj"], [3]),
        TypeError,
        "feedforward_modules: expected names, got 3",
    ),
    "container": (lambda m: nf4.add_ia3(m, ["mlp"]), TypeError, "mlp: expected a LinearNF4, torch"),
    "pattern": (lambda m: nf4.add_adamix(m, target_modules="("), ValueError, "a regular expressio"),
    "no_model": (lambda m: nf4.add_ia3(3, ["k_proj"]), TypeError, "model: expected a torch.nn.Mod"),
    "no_model_known": (lambda m: nf4.add_ia3(3), TypeError, "model: expected a torch.nn.Module"),
    "adamix_model": (lambda m: nf4.add_adamix("m"), TypeError, "expected a torch.nn.Module, got s"),
    "merge_model": (lambda m: nf4.merge_adamix("m"), TypeError, "expected a torch.nn.Module, got"),
    "num_modules": (
        lambda m: nf4.add_adamix(m, num_modules=0),
        ValueError,
        "num_modules: expected an int of at least 1, got 0",
    ),
    "num_modules_float": (
        lambda m: nf4.add_adamix(m, num_modules=2.0),
        TypeError,
        "num_modules: expected an int, got float",
    ),
    "share": (lambda m: nf4.add_adamix(m, share="C"), ValueError, "share: expected None, 'A' or"),
    "r": (lambda m: nf4.add_adamix(m, r=0), ValueError, "r: expected an int of at least 1, got 0"),
    "merge_nothing": (lambda m: nf4.merge_adamix(m), ValueError, "expected mixtures .nf4.add_ada"),
    "name": (lambda m: nf4.add_ia3(m, adapter_name="a.b"), ValueError, "a name without dots"),
    "requantize": (
        lambda m: nf4.merge(m, requantize="scales"),
        TypeError,
        "requantize: expected a bool or 'exact', got 'scales'",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_bad_argument_is_refused_and_nothing_changed(call, kind, message, base) -> None:
    before = {n: (id(p), p.requires_grad) for n, p in base.named_parameters()}
    modules = list(map(id, base.modules()))
    with pytest.raises(kind, match=message):
        call(base)
    assert {n: (id(p), p.requires_grad) for n, p in base.named_parameters()} == before
    assert list(map(id, base.modules())) == modules


def test_unknown_model_needs_names() -> None:
    with pytest.raises(ValueError, match="target_modules: expected names of layers for a model wh"):
        nf4.add_ia3(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            ranks,
            r"down_proj: expected lora_B of shape \(4, 64, 4\), 4 modules of rank 4, got .*5\)",
        ),
        (fewer, r"down_proj: expected lora_A of shape \(4, 4, 160\), 4 modules of rank 4, got \(3"),
        (lambda m: m.lora_A[0].fill_(torch.nan), "down_proj: expected finite values in lora_A"),
    ],
    ids=["ranks", "fewer", "nan"],
)
def test_mixture_of_mixed_shapes_is_not_merged(spoil, message, base) -> None:
    model = spoiled(base, spoil)
    modules = list(map(id, model.modules()))
    with pytest.raises(ValueError, match=message):
        nf4.merge_adamix(model)
    assert list(map(id, model.modules())) == modules


@pytest.mark.parametrize("file", ["lora", "ia3", "adamix", "fifth"])
@pytest.mark.parametrize("held", ["lora", "ia3", "adamix"])
def test_a_file_of_another_kind_is_refused_unless_beside(file, held, base, tmp_path) -> None:
    other = with_kind(base, file)
    randomize(other)
    nf4.save_adapter(other, tmp_path / file)
    model = with_kind(base, held)
    randomize(model)
    once, modules = logits(model), list(map(id, model.modules()))
    if file == held:
        nf4.load_adapter(model, tmp_path / file)
        assert torch.equal(logits(model), logits(other))
        return
    with pytest.raises(
        ValueError, match="expected peft_type .* like the model's adapter 'default'"
    ):
        nf4.load_adapter(model, tmp_path / file)
    assert torch.equal(logits(model), once) and list(map(id, model.modules())) == modules
    nf4.load_adapter(model, tmp_path / file, "beside")
    assert error(logits(model), logits(other)) < 1e-6
    nf4.set_adapter(model, "default")
    assert error(logits(model), once) < 1e-6
    with pytest.raises(ValueError, match="adapter_name: expected one of .*beside.*, got None"):
        nf4.set_adapter(model, ["default", "beside"])
        nf4.save_adapter(model, tmp_path / "both")


def test_file_of_ia3_that_fits_no_layer_is_refused(base, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = with_kind(base, "ia3")
    nf4.save_adapter(model, tmp_path / "ia3")
    file = tmp_path / "ia3" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    assert tensors[key].shape == (32, 1)
    for value, message in (
        (torch.ones(31, 1), r"k_proj: expected ia3_l of shape \(32, 1\) or \(1, 64\), got \(31, 1"),
        (torch.full((32, 1), torch.inf), "k_proj: expected finite values"),
        (torch.ones(32), r"with the parts ia3_l of 2 dimensions, got '.*ia3_l'.*\(32,\)"),
    ):
        save_file({**tensors, key: value}, file)
        with pytest.raises(ValueError, match=message):
            nf4.load_adapter(base, tmp_path / "ia3")
    assert not adapted_layers(base)


def test_one_layer_takes_an_adapter_of_its_kind_alone(tmp_path) -> None:
    layer, again = (one_ia3_layer() for _ in range(2))
    layer.adapters["default"].ia3_l.data.uniform_()
    nf4.save_adapter(layer, tmp_path / "a")
    nf4.load_adapter(again, tmp_path / "a")
    assert torch.equal(again.adapters["default"].ia3_l, layer.adapters["default"].ia3_l)
    with pytest.raises(ValueError, match="a LinearNF4 alone cannot be replaced in place"):
        nf4.load_adapter(nf4.LinearNF4(64, 48), tmp_path / "a")


def one_ia3_layer() -> AdaptedLayer:
    layer = nf4.LinearNF4(64, 48)
    adapted = with_adapter(layer, "default", IA3(layer_base(layer), of_inputs=False))
    adapted.set_adapter("default")
    return adapted
