"""The wheel, the ways to import nf4, and living beside Hugging Face's package called kernels."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_paths()["purelib"])
HF_KERNELS = Path(sys.prefix) / "hf-kernels"


def run(python: Path | str, code: str, cwd: Path, *path: Path) -> str:
    """Run code and return what it printed; anything on standard error fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that no stale build folder can help."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "nf4-demo*")
    shutil.copytree(ROOT, folder / "source", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """Install the wheel into a fresh environment that finds nf4's dependencies, but not nf4, here.

    A path file names this environment's packages; its own path files, and so its editable nf4, are
    not read through it.
    """
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", str(wheel)], check=True, capture_output=True)
    site = run(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])", folder)
    (Path(site.strip()) / "dependencies.pth").write_text(f"{SITE}\n")
    return python


@pytest.fixture
def python(request, installed) -> Path:
    return installed if request.param == "installed" else Path(sys.executable)


def test_wheel_has_nf4_as_its_only_top_level(wheel) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (top,) = [n for n in names if n.endswith("top_level.txt")]
        assert file.read(top).decode().split() == ["nf4"]
    roots = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert roots == {"nf4"}
    for needed in (
        "py.typed",
        "kernels.py",
        "commands/demo/othello.txt",
        "commands/demo/macbeth.txt",
        "error/theory.json",
    ):
        assert f"nf4/{needed}" in names
    assert not [n for n in names if "test" in n]


def test_wheel_has_urls_and_a_description_that_shows_anywhere(wheel) -> None:
    """What is relative to a checkout leads nowhere from an index: no picture, and no link, is."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        said = message_from_string(file.read(name).decode())
    urls = [url.split(", ") for url in said.get_all("Project-URL")]
    assert urls and all(len(parts) == 2 and parts[1].startswith("https://") for parts in urls)
    assert said["Description-Content-Type"] == "text/markdown"
    text = said.get_payload()
    targets = re.findall(r"\]\(([^)\s]*)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    assert any(t.startswith("https://") for t in targets)
    assert [t for t in targets if not t.startswith(("https://", "http://", "#"))] == []
    assert "![" not in text and "Perplexity, parameters and memory of each method" in text


def test_wheel_has_every_module_of_nf4_kernels_and_bench(wheel) -> None:
    with zipfile.ZipFile(wheel) as file:
        found = {n for n in file.namelist() if n.endswith(".py")}
    expected = set()
    for folder, package in (("nf4", "nf4"), ("kernels", "nf4/kernels"), ("bench", "nf4/bench")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    known = ("error/report/run", "bench/harness/run", "kernels/dequantize")
    assert {f"nf4/{name}.py" for name in known} < expected
    assert found == expected


def test_installed_wheel_works_outside_the_checkout(installed, tmp_path) -> None:
    code = (
        "import nf4, torch; q = nf4.quantize(torch.ones(64, 64)); "
        "print(nf4.__file__, q.bits_per_weight, nf4.dequantize(q).sum().item())"
    )
    file, bits, total = run(installed, code, tmp_path).split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert (float(bits), float(total)) == (pytest.approx(4.14, abs=0.01), 4096)


def test_installed_wheel_measures_into_the_current_folder(installed, tmp_path) -> None:
    code = (
        "from nf4.bench.harness import request, results, run; "
        "r = request.Request(ops=['repack'], shapes=['64x128'], device='cpu'); "
        "print(run.plan(r).path.parent, *request.OPS)"
    )
    folder, *ops = run(installed, code, tmp_path).split()
    assert Path(folder) == tmp_path
    assert set(ops) == {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}


@pytest.mark.parametrize("python", ["installed", "editable"], indirect=True)
def test_import_needs_no_triton_and_prints_nothing(python, tmp_path) -> None:
    code = "import sys; sys.modules['triton'] = None; import torch, nf4; nf4.linear"
    assert run(python, code, tmp_path) == ""
    code = (
        "import sys, torch; before = set(sys.modules); import nf4; print(set(sys.modules) - before)"
    )
    new = run(python, code, tmp_path)
    assert not [m for m in ("triton", "transformers", "peft", "scipy", "matplotlib") if m in new]


@pytest.mark.parametrize("where", ["root", "elsewhere"])
@pytest.mark.parametrize("python", ["installed", "editable"], indirect=True)
def test_kernels_import_as_nf4_kernels(python, where, tmp_path) -> None:
    code = (
        "import nf4.kernels, nf4.kernels.dequantize, os; (p,) = nf4.kernels.__path__; "
        "assert os.path.dirname(nf4.kernels.dequantize.__file__) == p; print(os.path.realpath(p))"
    )
    found = Path(run(python, code, ROOT if where == "root" else tmp_path).strip())
    assert found.is_dir() and found.name == "kernels"
    names = {p.name for p in found.glob("*.py")}
    assert names == {p.name for p in (ROOT / "kernels").glob("*.py")}


def test_kernels_import_from_a_bare_checkout(installed, tmp_path) -> None:
    code = "import nf4.kernels; print(*nf4.kernels.__path__)"
    assert run(installed, code, tmp_path, ROOT).strip() == str(ROOT / "kernels")


@pytest.mark.parametrize(  # every two of the three choices together
    ("python", "where", "hf"),
    [
        ("installed", "root", "with_hf_kernels"),
        ("installed", "elsewhere", "without"),
        ("editable", "root", "without"),
        ("editable", "elsewhere", "with_hf_kernels"),
    ],
    indirect=["python"],
)
def test_transformers_imports_beside_ours(python, where, hf, tmp_path) -> None:
    path = []
    if hf == "with_hf_kernels":
        assert (HF_KERNELS / "kernels" / "__init__.py").is_file(), "make installs it there"
        path = [HF_KERNELS]
    code = (
        "import nf4.kernels, transformers; from transformers import LlamaForCausalLM; "
        "import transformers.integrations.hub_kernels; "
        "import importlib.util; print(getattr(importlib.util.find_spec('kernels'), 'origin', None))"
    )
    origin = run(python, code, ROOT if where == "root" else tmp_path, *path).strip()
    assert origin == (str(path[0] / "kernels" / "__init__.py") if path else "None")


@pytest.mark.parametrize("python", ["installed"], indirect=True)
def test_import_brings_in_few_modules_beside_torch(python, tmp_path) -> None:
    """What importing takes time for, and the same on every machine."""
    code = (
        "import sys, torch; before = set(sys.modules); import nf4; "
        "new = set(sys.modules) - before; own = {m for m in new if m.partition('.')[0] == 'nf4'}; "
        "print(len(own), len(new - own))"
    )
    own, others = map(int, run(python, code, tmp_path).split())
    assert own <= 62 and others <= 25


def test_every_kernel_has_its_reference_test_and_bench() -> None:
    ops = {p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")}
    for op in ops:
        for twin in (
            f"nf4/reference/{op}.py",
            f"tests/kernels/test_{op}.py",
            f"bench/bench_{op}.py",
        ):
            assert (ROOT / twin).is_file(), twin
    references = {p.stem for p in (ROOT / "nf4/reference").glob("[a-z]*.py")}
    for op in references:
        assert list((ROOT / "tests").glob(f"*/test_{op}.py")), f"{op} has no test of its own"
