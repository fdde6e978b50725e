"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

Needs no device and no driver: the Triton wheel holds ptxas and cuobjdump, and LLVM for AMD. The
counts are of instructions, not of time.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _sass
from ._launch import Launch
from ._targets import TARGETS

# Of a kernel's arguments by their names, for bfloat16, a double-quantized weight and an adapter in
# float32; what is no pointer and not here is an int32
_TYPES = {
    **dict.fromkeys(("x", "y", "z", "t", "v", "out", "bias", "along"), "*bf16"),
    **dict.fromkeys(("lora_A", "lora_B", "b", "w", "across", "sums", "factor", "parts"), "*fp32"),
    **dict.fromkeys(("absmax2", "offset", "map", "levels", "thresholds", "weights"), "*fp32"),
    **dict.fromkeys(("packed", "absmax", "codes"), "*u8"),
    **dict.fromkeys(("words", "bases", "arrived"), "*i32"),
    "seed": "*i64",
    "candidates": "*fp64",
}
_TYPES = {f"{name}_ptr": kind for name, kind in _TYPES.items()}
_TYPES |= dict.fromkeys(("scaling", "factor", "kept_inverse"), "fp32")


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        name: what to call it in a table.
        launch: the kernel as it is launched: its constants, warps and stages.
        elements: weights one program takes, or one step of its loop with the tensor cores.
        types: of run-time arguments, where they differ from what their names say, such as
            ``{"absmax_ptr": "*fp32"}``; pointers are taken to be multiples of 16, as those of
            whole tensors are.
        indivisible: run-time arguments that need not be multiples of 16.
        ones: run-time arguments that are 1, which Triton makes constants.
        targets: GPUs that it is compiled for.
    """

    name: str
    launch: Launch
    elements: int
    types: dict[str, str] = field(default_factory=dict)
    indivisible: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS

    @property
    def constants(self) -> dict[str, Any]:
        """Return the value of each constant but SHUFFLE, which follows the target."""
        return {**self.launch.constants, **dict.fromkeys(self.ones, 1)}

    @property
    def num_warps(self) -> int:
        """Return the warps of one program."""
        return int(self.launch.options["num_warps"])

    @property
    def signature(self) -> dict[str, str]:
        """Return the type of each run-time argument, such as ``{"x_ptr": "*bf16", "n": "i32"}``.

        Raises:
            KeyError: nothing says what a pointer points at.
        """
        known = {**_TYPES, **self.types}
        constants = {*self.constants, "SHUFFLE"}
        names = [name for name in self.launch.kernel.arg_names if name not in constants]
        return {n: known[n] if n.endswith("_ptr") else known.get(n, "i32") for n in names}


@dataclass(frozen=True)
class Report:
    """What a compiler made of a variant; of its loop with tensor cores alone, where it has one.

    Attributes:
        registers: of each thread.
        spills: bytes of stack and local memory, where registers go that do not fit.
        shared: bytes of shared memory.
        instructions: in the listing, times threads, per weight; None on AMD.
        cycles: model cycles per 32 weights of each pipe, see `_sass`; empty on AMD.
        memory: loads, stores and shuffles by width, such as ``{"LDG.128": 4}``; empty on AMD.
        products: matrix products, and how many of them take W from registers.
        waits: loads from global memory in the working loop whose address comes of another load of
            the same turn, see `_sass.waiting_loads`.
        warnings: what ptxas complained of, such as C7515: wgmma made to run one by one.
    """

    registers: int
    spills: int
    shared: int
    instructions: float | None = None
    cycles: Counter[str] = field(default_factory=Counter)
    memory: Counter[str] = field(default_factory=Counter)
    products: tuple[int, int] = (0, 0)
    waits: int = 0
    warnings: tuple[str, ...] = ()


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: Iterable[str],
    target: str,
    options: dict[str, Any],
) -> Any:
    """Compile a jit function without a device.

    Args:
        kernel: the jit function.
        signature: type of each run-time argument, such as ``{"x_ptr": "*bf16", "n": "i32"}``.
        constants: value of every other argument.
        divisible: run-time arguments that are multiples of 16.
        target: ``"sm_90"``, ``"gfx942"`` and so on.
        options: num_warps, num_stages, enable_fp_fusion.

    Returns:
        Triton's compiled kernel; its ``asm`` has the PTX or the AMD assembly.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    return triton.compile(source, target=gpu, options=options)


def compile_for(variant: Variant, target: str) -> Any:
    """Compile a variant for ``"sm_90"``, ``"gfx942"`` and so on; the result's ``asm`` has it."""
    kernel, signature = variant.launch.kernel, variant.signature
    constants = variant.constants
    if "SHUFFLE" in kernel.arg_names:
        constants["SHUFFLE"] = target.startswith("sm_")
    divisible = [
        name
        for name, kind in signature.items()
        if name not in variant.indivisible and kind not in ("fp32", "i64")
    ]
    return compile_kernel(kernel, signature, constants, divisible, target, variant.launch.options)


def report(variant: Variant, target: str) -> Report:
    """Compile a variant for a target and count."""
    compiled = compile_for(variant, target)
    if target.startswith("sm_"):
        return _report_nvidia(compiled, variant, target)
    text = compiled.asm["amdgcn"]
    registers, spilled, scratch = (
        int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return Report(registers, max(4 * spilled, scratch), compiled.metadata.shared)


def _report_nvidia(compiled: Any, variant: Variant, target: str) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(_sass.CUOBJDUMP, "-res-usage", cubin)
        code = _sass.disassemble(cubin)
        warnings: list[str] = []
        if _sass.tensor_instructions(code):
            arch = re.search(r"\.target\s+(\w+)", compiled.asm["ptx"])[1]  # type: ignore[index]
            listing = _run(_ptxas(target), "-v", f"--gpu-name={arch}", ptx, "-o", cubin)
            warnings = [line for line in listing.splitlines() if "warning" in line.lower()]
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key in ("REG", "STACK", "LOCAL")
    )
    work = _sass.main_loop(code) or code
    scale = 32 * variant.num_warps / variant.elements
    cycles = {pipe: n * scale for pipe, n in _sass.pipe_cycles(work).items()}
    return Report(
        registers,
        stack + local,
        compiled.metadata.shared,
        len(work) * scale,
        Counter(cycles),
        _sass.memory(work),
        (_sass.tensor_instructions(work), _sass.products_from_registers(work)),
        _sass.waiting_loads(code)[1],
        tuple(warnings),
    )


def _ptxas(target: str) -> str:
    """Return the assembler that Triton itself takes for a target."""
    from triton.backends.nvidia.compiler import get_ptxas

    path: str = get_ptxas(int(target.removeprefix("sm_"))).path
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr
