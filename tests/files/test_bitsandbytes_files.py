"""bitsandbytes' checkpoints, read and written, against bitsandbytes and transformers themselves."""

import io
import json

import pytest
import torch
from torch import nn

import nf4
from nf4.layers.bitsandbytes import tensors_of

STATE = "weight.quant_state.bitsandbytes__nf4"


BAD_STATES = {
    "offset_null": {"nested_offset": None},
    "offset_list": {"nested_offset": [0.5]},
    "offset_missing": {"nested_offset": ...},
    "offset_nan": {"nested_offset": float("nan")},
    "nested_blocksize": {"nested_blocksize": None},
    "shape_number": {"shape": 64},
    "shape_huge": {"shape": [10**30, 64]},
    "shape_bool": {"shape": [True, 64]},
    "dtype_list": {"dtype": ["bfloat16"]},
    "dtype_module": {"dtype": "nn"},
    "blocksize_list": {"blocksize": [64]},
}
BAD_BYTES = (b"[" * 100_000, b"[]", b"null", b"{}", b"\xff\xfe", b"")


def two_layers(double_quant: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    return nf4.quantize_model(model, double_quant=double_quant)


def check_refused(state_dict: dict[str, torch.Tensor], message: str) -> None:
    """Neither read, nor loaded: of a model's first layers either."""
    with pytest.raises(ValueError, match=message):
        nf4.from_bitsandbytes(state_dict)
    model = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state_dict)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("change", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_wrong_quant_state_is_refused_before_anything_is_loaded(change) -> None:
    state_dict = nf4.to_bitsandbytes(two_layers().state_dict())
    state = json.loads(bytes(state_dict[f"1.{STATE}"].tolist())) | change
    state = {name: value for name, value in state.items() if value is not ...}
    state_dict[f"1.{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    check_refused(state_dict, f"1.{STATE}: |1.weight: expected .* bytes")


@pytest.mark.parametrize("raw", BAD_BYTES, ids=range(len(BAD_BYTES)))
def test_no_quant_state_is_refused_before_anything_is_loaded(raw) -> None:
    state_dict = nf4.to_bitsandbytes(two_layers().state_dict())
    state_dict[f"1.{STATE}"] = torch.tensor(list(raw), dtype=torch.uint8)
    check_refused(state_dict, f"1.{STATE}: expected bitsandbytes' JSON as bytes")


@pytest.mark.parametrize("name", ["absmax", "nested_absmax"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(name, bad) -> None:
    double = name == "nested_absmax"
    state_dict = nf4.to_bitsandbytes(two_layers(double).state_dict())
    state_dict[f"1.weight.{name}"][-1] = bad
    check_refused(state_dict, f"1.weight.{name}: expected finite values, got NaN or an infinity")


@pytest.fixture
def linear4bit(bnb):
    """Make a layer of bitsandbytes, quantized on the CPU."""
    import bitsandbytes.nn

    def make(n=48, k=192, block_size=64, double_quant=True, dtype=torch.bfloat16, **options):
        layer = bitsandbytes.nn.Linear4bit(
            k, n, bias=options.pop("bias", True), quant_type="nf4", compute_dtype=dtype, **options
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            torch.randn(n, k).to(dtype),
            requires_grad=False,
            blocksize=block_size,
            quant_type="nf4",
            compress_statistics=double_quant,
            quant_storage=options.get("quant_storage", torch.uint8),
            module=layer,
        )
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
        return layer.to("cpu")

    return make


def dequantized(bnb, layer) -> torch.Tensor:
    """Return bitsandbytes' dense weight; on a CPU its blocks must not straddle rows."""
    return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


KINDS = {
    "usual": {},
    "single": {"double_quant": False},
    "block_128": {"block_size": 128, "k": 256},
    "block_4096_single": {"block_size": 4096, "double_quant": False, "n": 3, "k": 4096},
    "fp16": {"dtype": torch.float16},
    "fp32_no_bias": {"dtype": torch.float32, "bias": False},
    "stored_as_bf16": {"quant_storage": torch.bfloat16},
    "stored_as_fp32": {"quant_storage": torch.float32},
    "odd_columns": {"n": 4, "k": 33},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_layer_takes_bitsandbytes_tensors_and_gives_them_back(kind, linear4bit, bnb) -> None:
    theirs = linear4bit(**kind)
    state = theirs.state_dict()
    dtype = kind.get("dtype", torch.bfloat16)
    n, k = kind.get("n", 48), kind.get("k", 192)
    layer = nf4.LinearNF4(k, n, bias=kind.get("bias", True), dtype=dtype)
    layer.load_state_dict(state, strict=True)
    assert layer.block_size == kind.get("block_size", 64)
    assert layer.double_quant is kind.get("double_quant", True)
    if k % layer.block_size == 0:
        assert torch.equal(layer.merged_weight(), dequantized(bnb, theirs))
    again = nf4.to_bitsandbytes(layer.state_dict())
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        if name == "weight":
            tensor = tensor.view(torch.uint8).reshape(-1, 1)
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_layer_keeps_its_dtype_or_takes_the_file_s_when_assigned(linear4bit) -> None:
    state = linear4bit().state_dict()
    layer = nf4.LinearNF4(192, 48)
    layer.load_state_dict(state)
    assert layer.dtype == torch.float32
    with torch.device("meta"):
        layer = nf4.LinearNF4(192, 48, block_size=128)
    layer.load_state_dict(state, assign=True)
    assert layer.dtype == torch.bfloat16 and layer.block_size == 64
    assert layer.packed.data_ptr() == state["weight"].data_ptr()
    assert layer(torch.ones(1, 192)).shape == (1, 48)


def test_layer_in_fragments_takes_bitsandbytes_tensors(linear4bit, bnb) -> None:
    for options in ({}, {"double_quant": False}):
        theirs = linear4bit(48, 128, **options)
        layer = nf4.LinearNF4(128, 48, dtype=torch.bfloat16).to_fragments()
        layer.load_state_dict(theirs.state_dict())
        assert torch.equal(layer.merged_weight(), dequantized(bnb, theirs))


def test_state_dict_of_a_model_goes_both_ways(linear4bit, bnb, tmp_path) -> None:
    theirs = nn.ModuleDict(
        {"a": linear4bit(), "b": nn.Sequential(linear4bit(32, 64, double_quant=False))}
    )
    theirs["norm"] = nn.LayerNorm(4)
    state = theirs.state_dict()
    before = dict(state)
    ours = nf4.from_bitsandbytes(state)
    assert dict(state) == before, "unchanged"
    assert set(ours) == {
        *(f"a.{name}" for name in ("packed", "absmax", "absmax2", "offset", "bias")),
        *(f"b.0.{name}" for name in ("packed", "absmax", "bias")),
        "norm.weight",
        "norm.bias",
    }
    model = nn.ModuleDict({"a": nn.Linear(192, 48), "b": nn.Sequential(nn.Linear(64, 32))})
    model["norm"] = nn.LayerNorm(4)
    model = nf4.quantize_model(model.bfloat16())
    model.load_state_dict(state, strict=True)
    assert torch.equal(model["b"][0].merged_weight(), dequantized(bnb, theirs["b"][0]))
    assert torch.equal(model["a"].packed, ours["a.packed"])
    for source in (ours, model.state_dict()):
        again = nf4.to_bitsandbytes(source)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[k], state[k]) for k in state if k.startswith(("a.w", "b.0.w")))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    saved = nf4.to_bitsandbytes(torch.load(buffer, weights_only=True))
    assert torch.equal(saved["a." + STATE], state["a." + STATE])


def test_to_bitsandbytes_without_metadata_reads_sizes_and_dtype_off_the_tensors() -> None:
    layer = nf4.LinearNF4(64, 6, block_size=128, dtype=torch.float16)
    bare = dict(layer.state_dict())

    def state(found) -> dict:
        return json.loads(bytes(found[STATE].tolist()))

    assert state(nf4.to_bitsandbytes(bare))["blocksize"] == 128
    assert state(nf4.to_bitsandbytes(bare))["dtype"] == "float16"  # as the bias
    del bare["bias"]
    assert state(nf4.to_bitsandbytes(bare))["dtype"] == "bfloat16"
    assert state(nf4.to_bitsandbytes(bare, torch.float32))["dtype"] == "float32"
    one_block = nf4.LinearNF4(8, 2, bias=False, block_size=4096).state_dict()
    assert state(nf4.to_bitsandbytes(dict(one_block)))["blocksize"] == 64  # any says the same
    assert state(nf4.to_bitsandbytes(one_block))["blocksize"] == 4096


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_loads_what_is_written(double_quant, bnb) -> None:
    import bitsandbytes.nn

    layer = nf4.LinearNF4(192, 48, dtype=torch.bfloat16, double_quant=double_quant)
    written = nf4.to_bitsandbytes(layer.state_dict())
    stats = {k.removeprefix("weight."): v for k, v in written.items() if k.startswith("weight.")}
    parameter = bitsandbytes.nn.Params4bit.from_prequantized(
        written["weight"], stats, requires_grad=False, device="cpu"
    )
    found = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(found, layer.merged_weight())


def test_transformers_loads_what_is_written_with_its_own_config(tiny_llama, tmp_path, bnb) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = nf4.quantize_model(tiny_llama(intermediate_size=128).bfloat16())
    written = nf4.to_bitsandbytes(model.state_dict())
    save_file(
        {k: v.contiguous() for k, v in written.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.config.to_dict()
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = dict(theirs.state_dict())  # a forward on a CPU repacks the weights for it
    layers = dict(theirs.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, nf4.LinearNF4):
            assert type(layers[name]).__name__ == "Linear4bit"
            assert torch.equal(dequantized(bnb, layers[name]), layer.merged_weight()), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, found = model(tokens).logits, theirs(tokens).logits
    assert (ours - found).norm() < 0.02 * ours.norm()
    # transformers 5.23 cannot save what it loaded; its tensors load here
    again = nf4.quantize_model(tiny_llama(intermediate_size=128).bfloat16())
    again.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def with_state(state: dict, **changes) -> dict:
    known = json.loads(bytes(state[STATE].tolist()))
    text = json.dumps({**known, **changes}).encode()
    return {**state, STATE: torch.tensor(list(text), dtype=torch.uint8)}


def without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


BAD_STATES = {
    "fp4": (
        lambda s: {
            **without(s, STATE),
            STATE.replace("nf4", "fp4"): s[STATE],
        },
        "weight: expected a weight that bitsandbytes quantized to nf4, got fp4",
    ),
    "fp4_inside": (lambda s: with_state(s, quant_type="fp4"), "expected quant_type nf4"),
    "codebook": (
        lambda s: {**s, "weight.quant_map": s["weight.quant_map"].flip(0)},
        "weight.quant_map: expected the NF4 codebook, got another table",
    ),
    "map": (
        lambda s: {**s, "weight.nested_quant_map": torch.zeros(256)},
        "weight.nested_quant_map: expected the 8-bit map, got another table",
    ),
    "no_absmax": (
        lambda s: without(s, "weight.absmax"),
        "weight.absmax: expected a tensor, got nothing",
    ),
    "no_nested": (lambda s: without(s, "weight.nested_absmax"), "weight.nested_absmax: expected"),
    "cut_state": (lambda s: {**s, STATE: s[STATE][:40]}, "expected bitsandbytes' JSON as bytes"),
    "cut_weight": (
        lambda s: {**s, "weight": s["weight"][:-1]},
        "weight: expected 4608 bytes for shape",
    ),
    "short_absmax": (
        lambda s: {**s, "weight.absmax": s["weight.absmax"][:-1]},
        r"weight.absmax: expected shape \(144,\)",
    ),
    "block_size": (lambda s: with_state(s, blocksize=48), "a blocksize from 32 to 4096"),
    "nested_block": (lambda s: with_state(s, nested_blocksize=64), "expected nested_blocksize 256"),
    "other_shape": (
        lambda s: with_state(s, shape=[192, 48]),
        r"weight: expected shape \(48, 192\), got \(192, 48\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_layer_refuses_and_stays_as_it_was(change, message) -> None:
    state = tensors_of(nf4.quantize(torch.randn(48, 192)))
    layer = nf4.LinearNF4(192, 48, bias=False, block_size=128)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)  # whole, it is taken
    layer = nf4.LinearNF4(192, 48, bias=False, block_size=128)
    layer.load_state_dict(before)
    changed = change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(changed)
    assert layer.block_size == 128
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    if "shape" not in message or "4608" in message or "144" in message:
        with pytest.raises(ValueError, match=message):
            nf4.from_bitsandbytes(changed)


def test_to_bitsandbytes_refuses() -> None:
    layer = nf4.LinearNF4(33, 4, bias=False)
    bare = dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"weight.packed: expected \[N, K / 2\], got shape"):
        nf4.to_bitsandbytes(bare)
    with pytest.raises(TypeError, match="dtype: expected float32, float16 or bfloat16"):
        nf4.to_bitsandbytes(bare, torch.int8)
    even = dict(nf4.LinearNF4(64, 4, bias=False).state_dict())
    with pytest.raises(ValueError, match="absmax: expected one scale for each of"):
        nf4.to_bitsandbytes({**even, "absmax": torch.zeros(77)})
    with pytest.raises(ValueError, match="found one of them alone"):
        nf4.to_bitsandbytes(without(even, "absmax"))
    with pytest.raises(ValueError, match="expected a weight in rows"):
        tensors_of(nf4.to_fragments(nf4.quantize(torch.randn(16, 64))))
