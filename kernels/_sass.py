"""Read NVIDIA's machine code: its loops, and what it asks of each pipe of a multiprocessor.

Cycles are a model: instructions times the cycles that one holds its pipe on one of the four parts
of a multiprocessor, from the throughput table of the CUDA programming guide for compute capability
9.0. They know nothing of latency, bank conflicts or occupancy.
"""

import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P[T0-9]+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*(?:/\*.*)?$"
)
_JUMPS = ("BRA", "JMP")
_ENDS = ("BRA", "JMP", "EXIT", "RET")
_PIPES = {
    "ALU": "PRMT LOP3 SHF IADD3 ISETP SEL FSEL FSETP FMNMX IMNMX VIMNMX LEA BMSK SGXT PLOP3 I2FP "
    "F2FP IABS VIADD LOP PLOP P2R R2P FMNMX3 IADD VIADDMNMX HMNMX2",
    "FMA": "FFMA FMUL FADD HFMA2 HMUL2 HADD2 MOV CS2R FFMA2 IMAD",
    "XU": "MUFU I2F F2I F2F POPC FLO BREV FRND I2I",
    "LSU": "LDG STG LDS STS LDSM STSM LDL STL SHFL LD ST ATOM ATOMG ATOMS RED LDGSTS LDC",
    "TENSOR": "HGMMA HMMA WARPGROUP UTCHMMA",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
_CYCLES = {"ALU": 2.0, "FMA": 1.0, "XU": 8.0, "LSU": 4.0, "TENSOR": 0.0, "OTHER": 1.0}
_HALF_RATE = ("IMAD",)


@dataclass(frozen=True)
class Instruction:
    """One line of a listing."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode before its first dot."""
        return self.opcode.split(".")[0]


def disassemble(cubin: Path) -> list[Instruction]:
    """Return the instructions of a cubin, without padding."""
    command: list[str | Path] = [CUOBJDUMP, "-sass", cubin]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [_LINE.match(line) for line in listing.splitlines()]
    lines = [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4]) for m in found if m]
    return [line for line in lines if line.base != "NOP"]


def main_loop(code: list[Instruction]) -> list[Instruction] | None:
    """Return the loop that does the work, or None: no loop inside it multiplies, waiting apart."""
    bodies = [set(body) for body in loops(code)]
    working = [body for body in bodies if tensor_instructions([code[i] for i in body])]
    innermost = [body for body in working if not any(other < body for other in working)]
    found = [[code[i] for i in sorted(body)] for body in innermost]
    return max(found, key=tensor_instructions, default=None)


def tensor_instructions(code: list[Instruction]) -> int:
    """Return the number of matrix products."""
    return sum(i.base in ("HGMMA", "HMMA", "UTCHMMA") for i in code)


def products_from_registers(code: list[Instruction]) -> int:
    """Return the number of HGMMA that take their left factor from registers."""
    return sum(
        i.base == "HGMMA" and re.search(r"R\d+,\s*R\d+,\s*gdesc", i.operands) is not None
        for i in code
    )


def pipe_cycles(code: list[Instruction]) -> Counter[str]:
    """Return model cycles of one warp on each pipe, and as ISSUE the number of instructions.

    A part multiplies 512 pairs of 16-bit numbers a cycle; the four warps of an HGMMA each hold the
    tensor core of a part of their own.
    """
    cycles: Counter[str] = Counter()
    for i in code:
        pipe = _PIPE_OF.get(i.base, "OTHER")
        if shape := re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", i.opcode):
            held = int(shape[1]) * int(shape[2]) * int(shape[3]) / 2048
        elif i.base == "HMMA":
            held = 16 * 8 * 16 / 512
        else:
            held = 2.0 if i.base in _HALF_RATE else _CYCLES[pipe]
        cycles[pipe] += held
    cycles["ISSUE"] = len(code)
    return cycles


def waiting_loads(code: list[Instruction]) -> tuple[int, int]:
    """Return the loads from global memory in the loop that works, and how many of them wait.

    A load waits if its address comes of another load of the same turn, shared memory's too: their
    latencies add up within the turn. Copies to shared memory in the background are not counted.
    """
    working = [body for body in loops(code) if any(code[i].base in _WORK for i in body)]
    body = min(working, key=len, default=[])
    depth: dict[str, int] = {}
    loads = waits = 0
    for i in sorted(body):
        instruction = code[i]
        written, read = _registers(instruction)
        above = max((depth.get(register, 0) for register in read), default=0)
        if instruction.base in ("LDG", "LD"):
            loads += 1
            waits += above > 0
        if instruction.base in ("LDG", "LD", "LDS", "LDSM", "LDL"):
            above += 1
        for register in written:
            depth[register] = above
    return loads, waits


_WORK = ("HGMMA", "HMMA", "UTCHMMA", "SHFL")
_REGISTER = re.compile(r"\b(U?R)(\d+)(\.64)?(?!\d)")
_WRITES_NOTHING = ("ST", "BRA", "BAR", "RED", "EXIT", "LDGSTS", "DEPBAR", "WARP", "MEMBAR", "FENCE")


def _registers(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Return the registers that an instruction writes, and those that it reads."""
    first, _, others = instruction.operands.partition(",")
    if re.fullmatch(r"U?P(T|\d)", first.strip()):  # SHFL's predicate comes before its register
        first, _, others = others.partition(",")
    width = 1
    if instruction.base.startswith("LD") or "WIDE" in instruction.opcode:
        width = {"128": 4, "64": 2}.get(_width(instruction.opcode), 1)
        width = max(width, 2 if "WIDE" in instruction.opcode else 1)
    if instruction.base.startswith(_WRITES_NOTHING):
        first, others, width = "", instruction.operands, 0
    written = [
        f"{kind}{int(n) + i}" for kind, n, _ in _REGISTER.findall(first) for i in range(width)
    ]
    read = [
        f"{kind}{int(n) + i}"
        for kind, n, wide in _REGISTER.findall(others)
        for i in range(2 if wide else 1)
    ]
    return written, read


def memory(code: list[Instruction]) -> Counter[str]:
    """Count loads, stores and shuffles by width, such as ``{"LDG.128": 4}``."""
    moving = (i for i in code if i.base.startswith(("LD", "ST", "SHFL", "UTMA", "RED", "ATOM")))
    return Counter(f"{i.base}.{_width(i.opcode)}" for i in moving)


def _width(opcode: str) -> str:
    parts = opcode.split(".")
    bits = next((p for p in parts if p in ("128", "64", "U16", "S16", "U8", "S8")), "32")
    return bits.lstrip("US")


def _blocks(code: list[Instruction]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Return the basic blocks as (first, last) instruction, and their successors."""
    index = {i.address: k for k, i in enumerate(code)}
    target: dict[int, int] = {}
    for k, i in enumerate(code):
        addresses = re.findall(r"0x([0-9a-f]+)", i.operands)
        if i.base in _JUMPS and addresses and int(addresses[-1], 16) in index:
            target[k] = index[int(addresses[-1], 16)]
    leaders = {0, *target.values()}
    leaders |= {k + 1 for k, i in enumerate(code[:-1]) if i.base in _ENDS}
    first = sorted(leaders)
    blocks = list(zip(first, [k - 1 for k in first[1:]] + [len(code) - 1], strict=True))
    block_of = {begin: n for n, (begin, _) in enumerate(blocks)}
    successors = []
    for n, (_, last) in enumerate(blocks):
        i, following = code[last], []
        conditional = bool(i.guard) or re.match(r"!?U?P\d", i.operands) is not None
        if last in target:
            following.append(block_of[target[last]])
        if (i.base not in _ENDS or conditional) and n + 1 < len(blocks):
            following.append(n + 1)
        successors.append(following)
    return blocks, successors


def loops(code: list[Instruction]) -> list[list[int]]:
    """Return the natural loops as instruction numbers, innermost and outer ones alike.

    A loop is a jump to a block that dominates the jump's own, so that blocks moved out of line,
    such as waits that jump back, count with it.
    """
    blocks, successors = _blocks(code)
    count = len(blocks)
    before: list[list[int]] = [[] for _ in range(count)]
    for n, following in enumerate(successors):
        for k in following:
            before[k].append(n)
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for n in range(1, count):
            above = [dominators[k] for k in before[n]]
            new = (set.intersection(*above) if above else set()) | {n}
            changed, dominators[n] = changed or new != dominators[n], new
    bodies: dict[int, set[int]] = defaultdict(set)
    for n, following in enumerate(successors):
        for head in following:
            itself = head == n and blocks[n][0] == blocks[n][1]
            if head in dominators[n] and not itself:
                bodies[head] |= _body(head, n, before)
    return [
        sorted(i for n in body for i in range(blocks[n][0], blocks[n][1] + 1))
        for body in bodies.values()
    ]


def _body(head: int, last: int, before: list[list[int]]) -> set[int]:
    """Return the blocks from which `last` is reached without passing `head`."""
    body, waiting = {head, last}, [last]
    while waiting:
        n = waiting.pop()
        if n != head:
            new = [k for k in before[n] if k not in body]
            body.update(new)
            waiting += new
    return body
