"""Parse the PTX of one kernel, as Triton prints it, into instructions with decoded operands."""

import re
from dataclasses import dataclass, field

from ptx_values import BITS

_PARAMETER = re.compile(
    r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.(?!align)\w+)*(?:\s+\.align\s+\d+)?)?\s+(\w+)"
)
_ADDRESS = re.compile(r"\[\s*([\w%@$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")


@dataclass(frozen=True)
class Register:
    """A register, special register or symbol."""

    name: str


@dataclass(frozen=True)
class Number:
    """An immediate, as 64 bits."""

    bits: int


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: "Register | Number"
    offset: int


Operand = Register | Number | Address | tuple["Operand", ...] | str


@dataclass(frozen=True)
class Instruction:
    """One instruction; guard is (predicate, negated) or None."""

    guard: tuple[Register, bool] | None
    op: list[str]
    operands: list[Operand]
    text: str


@dataclass
class Program:
    """One entry point."""

    parameters: list[tuple[str, int]]  # name, bits
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(_operand(part) for part in text[1:-1].split(","))
    if text.startswith("["):
        match = _ADDRESS.fullmatch(text)
        if match is None:
            return text  # a tensor map with its coordinates
        base = _operand(match[1])
        assert isinstance(base, Register | Number)
        return Address(base, int(match[2] or "0", 0))
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return Number(int(text[2:], 16))
    if _NUMBER.fullmatch(text):
        return Number(int(text.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF)
    return Register(text)


def _split(text: str) -> list[str]:
    """Split operands at the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [p for p in (*parts, text[begin:]) if p.strip()]


def _instruction(statement: str) -> Instruction:
    guard, rest = None, statement
    if match := re.match(r"@(!?)(\S+)\s+(.*)", statement):
        guard, rest = (Register(match[2]), match[1] == "!"), match[3]
    opcode, _, operands = rest.partition(" ")
    return Instruction(guard, opcode.split("."), [_operand(p) for p in _split(operands)], statement)


class _Scopes:
    """Registers declared inside braces get a name of their own."""

    def __init__(self) -> None:
        self.stack: list[dict[str, str]] = [{}]
        self.opened = 0

    def open(self) -> None:
        self.stack.append({})
        self.opened += 1

    def declare(self, names: str) -> None:
        if len(self.stack) > 1:
            for name in names.split(","):
                self.stack[-1][name.strip()] = f"{name.strip()}@{self.opened}"

    def rename(self, statement: str) -> str:
        for scope in self.stack[1:]:
            if scope:
                names = "|".join(map(re.escape, sorted(scope, key=len, reverse=True)))
                pattern = rf"(?:(?<=^@)|(?<=^@!)|(?<![\w%$.@]))({names})(?![\w@])"
                statement = re.sub(pattern, lambda m, scope=scope: scope[m[1]], statement)
        return statement


def parse(ptx: str) -> Program:
    """Parse the one entry point of a PTX module."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*)", ptx, re.S)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    assert entry is not None and threads is not None, "expected a Triton kernel"
    parameters = [(m[2], BITS[m[1]]) for m in _PARAMETER.finditer(entry[2])]
    program = Program(parameters, int(threads[1]))
    body = entry[3][entry[3].index("{") + 1 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(loc|file|section|pragma)[^\n]*$", "", body, flags=re.M)
    scopes = _Scopes()
    for token in re.finditer(r"\s*(?:([\w$]+):(?!:)|([{}])|((?:[^;{}]|\{[^{};]*\})+);)", body):
        label, brace, statement = token.groups()
        if label:
            program.labels[label] = len(program.instructions)
        elif brace == "{":
            scopes.open()
        elif brace == "}":
            scopes.stack.pop()
            if not scopes.stack:
                break
        else:
            statement = " ".join(statement.split())
            if statement.startswith(".reg"):
                scopes.declare(statement.split(None, 2)[2])
            elif not statement.startswith("."):
                program.instructions.append(_instruction(scopes.rename(statement)))
    return program
