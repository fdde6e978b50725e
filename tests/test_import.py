"""The package without torch, and as whole as ever as soon as torch is there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nf4


def fresh(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def test_package_imports_without_torch_and_follows_it() -> None:
    code = (
        "import sys, nf4; assert 'torch' not in sys.modules and 'linear' not in vars(nf4); "
        "import torch; assert 'linear' in vars(nf4); "  # no look-up meets __getattr__ from here on
        "print(torch.ops.nf4.linear, torch.__spec__.loader, torch.__loader__)"
    )
    done = fresh(code)
    assert done.stderr == "" and done.stdout.startswith("nf4.linear ")
    assert "nf4.integrations" not in done.stdout  # torch's loader is its own again


@pytest.mark.parametrize(
    "first", ["torch", "nf4.ops", "nf4.tensor", "nf4.codebook", "nf4.reference", "nf4.kernels"]
)
def test_every_name_is_there_whatever_is_imported_first(first) -> None:
    code = (
        f"import {first}, nf4; listed = dir(nf4); "
        "found = [getattr(nf4, name) for name in nf4.__all__]; "
        "from nf4 import *; assert linear is nf4.linear and losses is nf4.losses; "
        "assert set(nf4.__all__) <= set(listed); "
        "print(nf4.ops.choice.__name__, nf4.files.stream.__name__, len(found))"
    )
    done = fresh(code)
    assert (done.stderr, done.stdout.split()) == (
        "",
        ["nf4.ops.choice", "nf4.files.stream", str(len(nf4.__all__))],
    )


def test_a_name_first_met_in_a_compiled_function_breaks_no_graph() -> None:
    code = (
        "import torch, nf4.tensor, nf4\n"
        "from nf4.functional import quantize\n"
        "q = quantize(torch.randn(64, 64))\n"
        "for name in nf4.__all__: vars(nf4).pop(name, None)\n"
        "f = torch.compile(lambda x: nf4.linear(x, q), backend='eager', fullgraph=True)\n"
        "x = torch.randn(2, 64)\n"
        "print(torch.equal(f(x), nf4.linear(x, q)))"
    )
    done = fresh(code)
    assert done.returncode == 0 and done.stdout == "True\n", done.stderr


def test_old_pickles_load_in_a_fresh_interpreter(tmp_path) -> None:
    """Whose names of modules lead to the package, though nothing of it has been imported."""
    layer = nf4.LinearNF4.from_linear(torch.nn.Linear(64, 32))
    torch.save({"layer": layer, "q": nf4.quantize(torch.ones(4, 64))}, tmp_path / "held.pt")
    code = (
        "import torch; held = torch.load('held.pt', weights_only=False); "
        "print(type(held['layer']).__name__, held['layer'](torch.ones(1, 64)).shape[1], "
        "held['q'].block_size)"
    )
    done = fresh(code, cwd=tmp_path)
    assert (done.stderr, done.stdout) == ("", "LinearNF4 32 64\n")
