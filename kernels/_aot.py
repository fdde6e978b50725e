"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

Needs no device and no driver: the Triton wheel holds ptxas and cuobjdump, and LLVM for AMD. The
counts are of instructions, not of time.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx90a", "gfx1100")
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        name: what to call it in a table.
        kernel: the jit function.
        signature: type of each run-time argument, such as ``{"x_ptr": "*bf16", "n": "i32"}``;
            pointers are taken to be multiples of 16, as those of whole tensors are.
        constants: value of each constexpr but SHUFFLE, which follows the target.
        elements: weights one program takes.
        num_warps: warps of one program.
        odd: sizes need not be multiples of 16 either.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    elements: int
    num_warps: int = 4
    odd: bool = False


@dataclass(frozen=True)
class Report:
    """What a compiler made of a variant.

    Attributes:
        registers: of each thread.
        spills: bytes of stack and local memory, where registers go that do not fit.
        shared: bytes of shared memory.
        instructions: in the listing, times threads, per weight; None on AMD.
        memory: loads, stores and shuffles by width, such as ``{"LDG.128": 4}``; empty on AMD.
    """

    registers: int
    spills: int
    shared: int
    instructions: float | None = None
    memory: Counter[str] = field(default_factory=Counter)


def compile_for(variant: Variant, target: str) -> Any:
    """Compile a variant for ``"sm_90"``, ``"gfx942"`` and so on; the result's ``.asm`` has it."""
    nvidia = target.startswith("sm_")
    names = variant.kernel.arg_names
    constants = {**variant.constants}
    if "SHUFFLE" in names:
        constants["SHUFFLE"] = nvidia
    signature = {n: "constexpr" if n in constants else variant.signature[n] for n in names}
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, kind in variant.signature.items()
            if kind.startswith("*") or not variant.odd
        },
    )
    if nvidia:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=gpu, options=options)


def report(variant: Variant, target: str) -> Report:
    """Compile a variant for a target and count."""
    compiled = compile_for(variant, target)
    shared = compiled.metadata.shared
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]
        registers, spilled, scratch = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]
            for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Report(registers, max(4 * spilled, scratch), shared)
    usage, sass = _cuobjdump(compiled.asm["cubin"])
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key in ("REG", "STACK", "LOCAL")
    )
    opcodes = [op for op in _SASS.findall(sass) if not op.startswith("NOP")]
    threads = 32 * variant.num_warps
    memory = Counter(_width(op) for op in opcodes if op.startswith(("LD", "ST", "SHFL")))
    return Report(
        registers, stack + local, shared, len(opcodes) * threads / variant.elements, memory
    )


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [_CUOBJDUMP, flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass


def _width(opcode: str) -> str:
    parts = opcode.split(".")
    bits = next((p for p in parts if p in ("128", "64", "U16", "S16", "U8", "S8")), "32")
    return f"{parts[0]}.{bits.lstrip('US')}"
