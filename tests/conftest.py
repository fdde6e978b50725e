"""Fixtures shared by the tests."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait leave the cores to the other workers
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import nf4

pytest.register_assert_rewrite("helpers")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.repair()


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what launches kernels where nothing can run them.

    test_kernels.py runs these tests in a process of its own, with Triton's interpreter.
    """
    if torch.cuda.is_available() or INTERPRETED:
        return
    launching = [item for item in items if item.get_closest_marker("kernel")]
    config.hook.pytest_deselected(items=launching)
    items[:] = [item for item in items if item not in launching]


def pytest_make_collect_report(collector) -> None:
    """Draw what a test module makes when it is imported from the same seed in every run."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["sm_80", "sm_90"])
def emulate(request):
    """Run launches on CPU tensors as compiled for an NVIDIA GPU, without one."""
    pytest.importorskip("triton", reason="nf4's kernels need Triton")
    if INTERPRETED:
        pytest.skip("the interpreter replaces the compiler")
    from emulator import emulated

    with emulated(request.param) as emulation:
        yield emulation


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_empty(request):
    """Fill torch.empty with NaN, so that what a test never wrote shows."""
    if request.node.get_closest_marker("demo"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def bnb() -> ModuleType:
    """bitsandbytes, the oracle of the format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional
    return bitsandbytes.functional


@pytest.fixture
def bnb_parts(bnb):
    """Quantize with bitsandbytes and return its parts as an NF4Tensor, and its own result."""

    def quantize(w: Tensor, block_size: int = 64, double_quant: bool = False):
        packed, state = bnb.quantize_4bit(
            w, blocksize=block_size, quant_type="nf4", compress_statistics=double_quant
        )
        q = nf4.NF4Tensor(
            packed.view(nf4.tensor.packed_shape(w.shape)),
            state.absmax,
            w.shape,
            w.dtype,
            block_size,
            state.state2.absmax if double_quant else None,
            state.offset if double_quant else None,
        )
        return SimpleNamespace(q=q, dequantized=bnb.dequantize_4bit(packed, state))

    return quantize


class Block(nn.Module):
    """A small residual block with biased and unbiased linears, one of them tied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(96, 160)
        self.down = nn.Linear(160, 96, bias=False)
        self.lm_head = nn.Linear(96, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.fixture
def tiny_llama():
    """Make a random two-layer Llama; the same one at each call with the same options."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**options) -> nn.Module:
        torch.manual_seed(1)
        sizes = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))

    return make


@pytest.fixture
def tokenizer():
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(i): i - 30 for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1}
    own = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(params=["4bit", "dense"])
def biased_llama(request, tiny_llama) -> nn.Module:
    """A model with biases, in four bits or dense."""
    model = tiny_llama(attention_bias=True, mlp_bias=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return nf4.quantize_model(model) if request.param == "4bit" else model


@pytest.fixture
def one_thread():
    """Compute on one thread: a second one makes small tensors wait, on busy cores for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def backend() -> str:
    """torch.compile's own backend where there is a C++ compiler for it."""
    return "inductor" if any(map(shutil.which, ("g++", "c++", "clang++"))) else "aot_eager"
