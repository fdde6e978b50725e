"""What a GPU day consists of: the commands that gpu_day.py runs, and what their output says.

Nothing but the standard library is imported, so that a machine on which PyTorch or Triton is
broken gets its summary too.
"""

import ast
import glob
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 520  # less than nine minutes, with what it takes to end the last stage
# Seconds of those, and what is done. Tests and verify run beside each other, and so do the two
# checkers: none of them takes times, and most of what they do is compiling.
GROUPS = {
    "environment": (20, "GPU, driver, versions and commit"),
    "tests": (120, "what launches kernels, and the layers; beside verify"),
    "verify": (120, "every operator against its reference and float64"),
    "tune": (75, "the fastest tiles on this GPU, kept for later runs"),
    "benchmarks": (165, "bench_*.py, one after another"),
    "end_to_end": (80, "training steps and decoding of two sizes of Llama"),
    "host_cost": (20, "what a call costs the host"),
    "memcheck": (40, "compute-sanitizer: memory; beside racecheck"),
    "racecheck": (40, "compute-sanitizer: races in shared memory"),
}
# Tests of what is put together from kernels
LAYERS = [
    *("gpu/test_gpu", "gpu/test_tune", "ops/test_linear", "ops/test_lora_linear"),
    *("ops/test_dispatch", "layers/test_layers", "layers/test_embedding", "test_functional"),
]


@dataclass(frozen=True)
class Stage:
    """One command of the day.

    Attributes:
        name: for the summary and the log; letters, digits, '.', '_' and '-', with the group first.
        command: what to run, from the checkout.
        seconds: its share of the day; stages beside each other share the largest.
        wave: stages in sequence that name the same run beside each other; "" for alone.
        output: file of the folder for what is printed, or "": then it is in the log.
        environment: variables beyond those of this process.
        found: makes one line of what is printed; "" for the log's last line.
        left_out: why this is not run, or "".
    """

    name: str
    command: list[str]
    seconds: float
    wave: str = ""
    output: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    found: Callable[[str], str] = lambda printed: ""
    left_out: str = ""

    @property
    def group(self) -> str:
        """Name in `GROUPS`."""
        return self.name.partition("-")[0]


def plan(folder: Path, device: str) -> list[Stage]:
    """Return all stages, in order.

    Args:
        folder: for results; absolute.
        device: "cuda", or "cpu" for a trial at tiny sizes.
    """
    gpu = device == "cuda"
    costs = script("harness/host_cost.py")
    machine = script("gpu_day/gpu_parts.py", "environment")
    check = nf4("verify", "--device", device, "--json")
    return [
        Stage(
            "environment", machine, share("environment"), output="environment.json", found=_machine
        ),
        *_tests(folder, gpu),
        Stage("verify", check, share("verify"), "checks", "verify.json", found=comparisons),
        *_tuning(gpu),
        *_benchmarks(folder, gpu),
        *_end_to_end(folder, gpu),
        Stage("host_cost", costs, share("host_cost"), output="host-cost.md", found=_costs),
        *_checkers(gpu),
    ]


def share(group: str) -> float:
    """Return the seconds of a group, of `SECONDS`."""
    return GROUPS[group][0]


def nf4(*arguments: str) -> list[str]:
    """Return how nf4's command line is called."""
    return [sys.executable, "-m", "nf4.commands.cli", *arguments]


def script(name: str, *arguments: str) -> list[str]:
    """Return how a file of bench/ is called."""
    return [sys.executable, str(ROOT / "bench" / name), *arguments]


def _tests(folder: Path, gpu: bool) -> list[Stage]:
    """Return the tests that launch kernels, and those of layers."""
    kernels = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "@pytest.mark.kernel" in path.read_text(encoding="utf-8")
    )
    layers = [f"tests/{name}.py" for name in LAYERS]
    interpret = {}
    if not gpu:
        kernels, layers = ["tests/kernels/test_repack.py"], ["tests/ops/test_linear.py"]
        interpret = {"TRITON_INTERPRET": "1"}
    cores = os.cpu_count() or 1
    return [
        _test(folder, "tests-kernels", kernels, "kernel", min(8, cores // 2), interpret),
        _test(folder, "tests-layers", layers, "not kernel and not alone", min(4, cores // 4), {}),
    ]


def _test(
    folder: Path, name: str, files: list[str], marks: str, workers: int, more: Mapping[str, str]
) -> Stage:
    """Return pytest on those of the files whose imports are installed."""
    lacking = {file: missing_imports(ROOT / file) for file in files}
    without = [f"{file} left out: no {', '.join(no)}" for file, no in lacking.items() if no]
    chosen = [file for file in files if not lacking[file]]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--junitxml={folder / name}.xml", "-m", marks]
    if find_spec("bitsandbytes") is None:
        command += ["-k", "not bitsandbytes"]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal"]
    # Plugins that happen to be installed may warn, and warnings are errors here. The tests ask for
    # deterministic algorithms, which cuBLAS has only with its workspace set.
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    reason = "" if chosen else "; ".join(without)
    return Stage(
        name,
        [*command, *chosen],
        share("tests"),
        "checks",
        environment={**environment, **more},
        found=lambda printed: "; ".join([tests_found(printed), *without]),
        left_out="pytest is not installed" if find_spec("pytest") is None else reason,
    )


def missing_imports(path: Path) -> list[str]:
    """Return the packages that a test file imports at its top and that are not installed."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    ours = {"nf4", *(helper.stem for helper in (ROOT / "tests" / "support").glob("*.py"))}
    return sorted(name for name in names - ours if find_spec(name) is None)


def _tuning(gpu: bool) -> list[Stage]:
    """Return a stage a model: what one of them measured is kept if the next has no time."""
    models = runpy.run_path(str(ROOT / "nf4" / "tools" / "shapes.py"))["MODELS"]
    return [
        Stage(
            f"tune-{name}",
            nf4("bench", "--tune", "--json", "--shapes", *(f"{n}x{k}" for n, k in shapes)),
            share("tune") / len(models),
            output=f"tune-{name}.json",
            found=_tuned,
            left_out="" if gpu else "needs a GPU",
        )
        for name, shapes in models.items()
    ]


def _benchmarks(folder: Path, gpu: bool) -> list[Stage]:
    """Return a stage an operator, all for one file, and one that draws what is in it."""
    names = sorted(p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py"))
    out = folder / "benchmarks.json"
    options = ["--device", "cuda" if gpu else "cpu", "--out", str(out)]
    if not gpu:
        options += ["--shapes", "64x128", "--rounds", "1"]
    seconds = share("benchmarks") / (1 + len(names))
    draw = script("gpu_day/gpu_parts.py", "draw", str(out), str(folder / "plots"))
    reason = "" if find_spec("matplotlib") is not None else "matplotlib is not installed"
    stages = []
    for name in names:
        command, found = nf4("bench", name, *options), partial(_timed, out, name)
        stages.append(Stage(f"benchmarks-{name}", command, seconds, found=found))
    pictures = Stage(
        "benchmarks-plots",
        draw,
        seconds,
        found=lambda printed: f"{len(json.loads(printed))} pictures",
        left_out=reason,
    )
    return [*stages, pictures]


def _end_to_end(folder: Path, gpu: bool) -> list[Stage]:
    """Return the model that is done in time first, then the largest that fits."""
    few = ["--rounds", "3", "--new-tokens", "32"]
    if not gpu:
        few = ["--device", "cpu", "--rounds", "1", "--length", "32", "--new-tokens", "2"]
    stages = []
    for size, part in (("1b", 0.4), ("auto", 0.6)) if gpu else (("tiny", 1.0),):
        out = folder / f"end-to-end-{size}.json"
        command = script("model/end_to_end.py", "--size", size, *few, "--out", str(out))
        seconds = part * share("end_to_end")
        found = partial(_trained, out)
        stages.append(Stage(f"end_to_end-{size}", command, seconds, found=found))
    return stages


def _checkers(gpu: bool) -> list[Stage]:
    tool = find_sanitizer()
    options = ["--error-exitcode", "9", "--target-processes", "application-only"]
    reason = "" if tool else "compute-sanitizer is not installed"
    return [
        Stage(
            name,
            [tool, "--tool", name, *options, *script("gpu_day/gpu_parts.py", "launch")],
            share(name),
            "checkers",
            # Out of bounds is beyond a tensor, not beyond what PyTorch holds
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            found=checker_found,
            left_out=reason if gpu else "needs a GPU",
        )
        for name in ("memcheck", "racecheck")
    ]


def find_sanitizer() -> str:
    """Return where compute-sanitizer is, or ""."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += sorted(glob.glob("/usr/local/cuda*"), reverse=True)
    folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders)) or ""


def _few(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


def tests_found(printed: str) -> str:
    """Return how many tests passed and failed, and the names of those that failed."""
    totals = re.findall(r"^[= ]*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", printed, re.MULTILINE)
    lines = (line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    wrong = _few(line.split(" ", 1)[1].partition(" - ")[0] for line in lines)
    return ": ".join(filter(None, [totals[-1] if totals else "no totals", wrong]))


def comparisons(printed: str) -> str:
    """Return how many comparisons are right, and the operators of those that are not."""
    rows = json.loads(printed)
    wrong = [row["operator"] for row in rows if not row["ok"]]
    right = f"{len(rows) - len(wrong)} of {len(rows)} comparisons are right"
    return f"{right}; wrong: {_few(dict.fromkeys(wrong))}" if wrong else right


def checker_found(printed: str) -> str:
    """Return what the checker counted."""
    return "; ".join(re.findall(r"SUMMARY: (.*)", printed))


def _machine(printed: str) -> str:
    found = json.loads(printed)
    versions = ", ".join(f"{name} {found['versions'].get(name)}" for name in ("torch", "triton"))
    return f"{found['device'] or found['processor']}; {versions}; commit {found['commit']}"


def _tuned(printed: str) -> str:
    found = json.loads(printed)
    return f"{len(found['fused_limits'])} weights, {len(found['tiles'])} tiles known"


def _timed(out: Path, op: str, printed: str) -> str:
    """Return what was timed, unless the last line says something else than where it is."""
    if not printed.rstrip().endswith(str(out)):
        return ""
    rows = json.loads(out.read_text(encoding="utf-8"))["sections"][op]["rows"]
    return f"{len(rows)} cases: {', '.join(dict.fromkeys(n for r in rows for n in r['timings']))}"


def _trained(out: Path, printed: str) -> str:
    found = json.loads(out.read_text(encoding="utf-8"))
    rates = [f"{name} {r['step']['median']:.0f}" for name, r in found["results"].items()]
    missing = [f"{name} left out" for name in found["left_out"]]
    size = found["options"]["size"]
    return f"size {size}, training tokens/s: {', '.join([*rates, *missing])}"


def _costs(printed: str) -> str:
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:]]
    return f"{len(rows)} calls timed; {rows[-1][0]}: {rows[-1][1]} µs"
