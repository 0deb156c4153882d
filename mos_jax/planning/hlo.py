"""Compiled XLA programs as text, read into computations and instructions.

Only what counting needs: names, opcodes, shapes with their memory space, operands, and the rest of
an instruction as text. The text is that of `jax.stages.Compiled.as_text`, of any backend.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_SPACE = re.compile(r"S\((\d+)\)")
_REFERENCE = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of one array.

    Attributes:
      dtype: XLA's name of it.
      dims: its sizes.
      space: where the layout puts it; 0: the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of its entries, without what a tiled layout pads."""
        return math.ceil(self.size * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: in its computation.
      opcode: such as "fusion".
      arrays: what it returns; of a tuple, all its arrays in order.
      operands: names of its operands.
      text: what stands in the parentheses after the opcode.
      rest: what follows them: attributes and metadata.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The attribute `name=...` up to the next comma outside of brackets, or None."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        return None if found is None else _until(self.rest, found.end(), ",")

    def called(self, name: str) -> str | None:
        """The computation that the attribute `name` refers to, or None."""
        value = self.attribute(name)
        return None if value is None else value.removeprefix("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order.

    Attributes:
      name: of the computation.
      instructions: by name.
      root: name of the one whose value is returned.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, number: int) -> Instruction:
        """The parameter of this number."""
        return next(
            one
            for one in self.instructions.values()
            if one.opcode == "parameter" and one.text == str(number)
        )

    def users(self, name: str) -> Iterator[Instruction]:
        """Instructions that have `name` among their operands."""
        return (one for one in self.instructions.values() if name in one.operands)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str


def read_program(text: str) -> Program:
    """Reads the text of a compiled module. Raises ValueError if it holds no entry computation."""
    computations: dict[str, Computation] = {}
    entry = None
    name, root = "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line and line[0] not in " }":
            header = _HEADER.match(line)
            if header is not None:
                name, root, instructions = header[2], "", {}
                entry = name if header[1] else entry
        elif line.startswith("}"):
            if instructions:
                computations[name] = Computation(name, instructions, root)
            instructions = {}
        else:
            one = _read_instruction(line)
            if one is not None:
                instructions[one.name] = one
                root = one.name if line.lstrip().startswith("ROOT ") else root
    if entry is None or entry not in computations:
        raise ValueError("the text is no compiled HLO module: it has no entry computation")
    return Program(computations, entry)


def _read_instruction(line: str) -> Instruction | None:
    found = _NAMED.match(line)
    if found is None:
        return None
    line = _COMMENT.sub("", line[found.end() :])
    # A type is a tuple in parentheses or one array; neither has a space outside of brackets.
    kind = _until(line, 0, " ")
    opcode, _, after = line[len(kind) + 1 :].partition("(")
    inside = _until(after, 0, ")")
    return Instruction(
        found[2],
        opcode.strip(),
        read_arrays(kind),
        tuple(_REFERENCE.findall(inside)),
        inside,
        after[len(inside) + 1 :].removeprefix(", "),
    )


def read_arrays(kind: str) -> tuple[Array, ...]:
    """The arrays of a type as XLA writes it, of a nested tuple in order."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(kind):
        space = _SPACE.search(layout)
        dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        found.append(Array(dtype, dims, int(space[1]) if space else 0))
    return tuple(found)


def _until(text: str, start: int, end: str) -> str:
    """The text from `start` up to the first `end` outside of brackets and quotes, or all of it."""
    depth, quoted = 0, False
    for place in range(start, len(text)):
        c = text[place]
        if c == '"' and text[place - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif depth == 0 and c == end:
            return text[start:place]
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
    return text[start:]


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    # f32, bf16, s4, c64, f8e4m3fn: the first number is the width.
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0
