"""What one run of a compiled program does: operations, bytes, collectives.

The body of a loop counts as often as the loop runs, which XLA's own cost analysis does not do. All
numbers are those of one chip. Axis legend: none; shapes are the program's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from mos_jax.planning.hlo import Array, Computation, Instruction, Program
from mos_jax.planning.products import called_target, library_flops, product_flops

# Kinds of collectives by opcode; asynchronous ones are counted where they start.
COLLECTIVES = {
    opcode + start: opcode
    for opcode in (
        "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
        "ragged-all-to-all", "collective-broadcast",
    )
    for start in ("", "-start")
}  # fmt: skip
# These move no bytes of their own: names for what is there, or the end of what was counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota", "copy-done", "slice-done", "dynamic-slice-done",
    "async-done", "async-update",
} | {f"{kind}-done" for kind in set(COLLECTIVES.values())}  # fmt: skip
# Custom calls that stand for no work: begin or end of a collective, a view, a hint.
_MARKERS = ("AsyncCollective", "AllocateBuffer", "ConcatBitcast", "AssumeGather")
# Those that work on indices alone.
_NO_PRODUCTS = ("GatherScatterIndicesBitpacked",)
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: "all-gather", ...
      payload: bytes of the whole array on each chip: what an all-gather makes, what a
        reduce-scatter starts from.
      group: chips that take part in one of its groups.
      times: how often it runs in a step.
    """

    kind: str
    payload: int
    group: int
    times: int

    @property
    def received(self) -> int:
        """Bytes that each chip receives from others in a step, by the ring algorithms."""
        share = (self.group - 1) / self.group
        passes = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return round(self.times * self.payload * passes.get(self.kind, share))


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one run of a program does on each chip.

    Attributes:
      flops: operations of its matrix products, those included that XLA leaves to cuBLAS; others
        are not counted.
      bytes: read from and written to main memory.
      collectives: in the order of the program.
      loops: how often each loop's body runs, by name of the loop.
      unknown_loops: loops whose number of iterations the program does not say; counted once.
      cycles: the TPU compiler's own estimates for its fusions, added up; 0 where it gives none.
      uncounted: targets of custom calls whose operations are not in `flops`, each once.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    loops: dict[str, int]
    unknown_loops: tuple[str, ...]
    cycles: int = 0
    uncounted: tuple[str, ...] = ()

    def by_kind(self) -> dict[str, dict[str, int]]:
        """By kind of collective: `count` of a step, `payload` and `received` bytes in all."""
        found: dict[str, dict[str, int]] = {}
        for one in self.collectives:
            kind = found.setdefault(one.kind, {"count": 0, "payload": 0, "received": 0})
            kind["count"] += one.times
            kind["payload"] += one.times * one.payload
            kind["received"] += one.received
        return dict(sorted(found.items()))


def count_program(program: Program, devices: int) -> Counts:
    """Counts what one run of `program` does on each of `devices` chips."""
    counter = _Counter(program, devices)
    counter.run(program.computations[program.entry], 1)
    return Counts(
        counter.flops,
        counter.bytes,
        tuple(counter.collectives),
        counter.loops,
        tuple(counter.unknown),
        counter.cycles,
        tuple(counter.uncounted),
    )


class _Counter:
    def __init__(self, program: Program, devices: int) -> None:
        self._program, self._devices = program, devices
        self.flops, self.bytes, self.cycles = 0.0, 0.0, 0
        self.collectives: list[Collective] = []
        self.loops: dict[str, int] = {}
        self.unknown: list[str] = []
        self.uncounted: dict[str, None] = {}

    def run(self, computation: Computation, times: int) -> None:
        """Adds what `times` runs of a computation do."""
        # Pieces of one collective that runs beside several fusions share the name of a chain.
        chains: set[str] = set()
        for one in computation.instructions.values():
            if one.opcode == "while":
                trips = self._trips(one)
                self._run_called(one, "body", times * trips)
                self._run_called(one, "condition", times * trips)
            elif one.opcode == "conditional":
                self._run_branches(one, times)
            elif one.opcode == "call":
                self._run_called(one, "to_apply", times)
            elif one.opcode == "async-start":
                self._run_called(one, "calls", times)
            else:
                self.bytes += times * self._traffic(computation, one)
                if stated := re.search(r'"estimated_cycles":"(\d+)"', one.rest):
                    self.cycles += times * int(stated[1])
                for place, inner in self._with_fused(computation, one):
                    self.flops += times * self._flops(place, inner)
                    if inner.opcode in COLLECTIVES:
                        self._add_collective(place, inner, times, chains)

    def _flops(self, place: Computation, one: Instruction) -> float:
        if one.opcode != "custom-call":
            return product_flops(place, one)
        target = called_target(one)
        found = library_flops(place, one)
        if found is None and not target.startswith((*_MARKERS, *_NO_PRODUCTS)):
            self.uncounted[target] = None
        return found or 0.0

    def _run_called(self, one: Instruction, attribute: str, times: int) -> None:
        called = one.called(attribute)
        if called in self._program.computations:
            self.run(self._program.computations[called], times)

    def _run_branches(self, one: Instruction, times: int) -> None:
        """Counts all branches, though one of them runs: an upper bound."""
        named = one.attribute("branch_computations") or ""
        branches = re.findall(r"%([\w.\-]+)", named)
        branches += [one.called(f"{side}_computation") or "" for side in ("true", "false")]
        for name in branches:
            if name in self._program.computations:
                self.run(self._program.computations[name], times)

    def _trips(self, loop: Instruction) -> int:
        stated = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
        trips = int(stated[1]) if stated else self._bound(loop)
        if trips is None:
            self.unknown.append(loop.name)
        self.loops[loop.name] = 1 if trips is None else trips
        return self.loops[loop.name]

    def _bound(self, loop: Instruction) -> int | None:
        """What a loop that counts from 0 is compared with: `i < n`, as scans are compiled."""
        condition = self._program.computations.get(loop.called("condition") or "")
        if condition is None:
            return None
        bounds = [
            int(one.text)
            for _, user in self._compares(condition)
            for operand in user.operands
            for one in (condition.instructions.get(operand),)
            if one is not None and one.opcode == "constant" and one.text.isdigit()
        ]
        return bounds[0] if len(bounds) == 1 else None

    def _compares(self, condition: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for one in condition.instructions.values():
            if one.opcode == "compare" and one.attribute("direction") == "LT":
                yield condition, one
            elif one.opcode == "fusion" and any(
                inner.opcode == "compare" and inner.attribute("direction") == "LT"
                for _, inner in self._with_fused(condition, one)
            ):
                yield condition, one

    def _with_fused(
        self, computation: Computation, one: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        """An instruction and, of a fusion, all that is fused, each with its computation."""
        yield computation, one
        fused = self._fused(one)
        if fused is not None:
            for inner in fused.instructions.values():
                yield from self._with_fused(fused, inner)

    def _fused(self, one: Instruction) -> Computation | None:
        if one.opcode != "fusion":
            return None
        return self._program.computations.get(one.called("calls") or "")

    def _add_collective(
        self, place: Computation, one: Instruction, times: int, chains: set[str]
    ) -> None:
        chain = re.search(r'chain_id="([^"]*)"', one.rest)
        if chain is not None:
            if chain[1] in chains:
                return
            chains.add(chain[1])
        kind = COLLECTIVES[one.opcode]
        given = sum(a.bytes for a in _operand_arrays(place, one))
        made = sum(a.bytes for a in one.arrays)
        if one.opcode == "all-gather-start":
            made -= given  # it returns its operands beside its results
        elif one.opcode == "collective-permute-start":
            made = given
        payload = given if kind == "reduce-scatter" else made
        # The TPU compiler's form of a reduce-scatter: an all-reduce of which a part is cut out.
        if kind == "all-reduce" and "all-reduce-scatter" in place.name:
            kind = "reduce-scatter"
        group = group_size(one, self._devices)
        self.collectives.append(Collective(kind, payload, group, times))
        read = sum(a.bytes for a in _main(tuple(_operand_arrays(place, one))))
        written = made if one.arrays[-1].space == 0 else 0
        self.bytes += times * (read + written)

    def _traffic(self, computation: Computation, one: Instruction) -> float:
        """Bytes that one instruction outside of fusions reads from and writes to main memory."""
        if one.opcode in _FREE or one.opcode in COLLECTIVES or _is_marker(one):
            return 0.0
        operands = [computation.instructions.get(name) for name in one.operands]
        fused = self._fused(one)
        if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # Returns target, source and a flag, in an order that differs; a slice reads its size.
            moved = sorted((a for a in one.arrays if a.size), key=lambda a: a.bytes)[-2:]
            least = min(a.bytes for a in moved)
            return float(sum(least for a in moved if a.space == 0))
        read = 0
        for number, operand in enumerate(operands):
            if operand is None:
                continue
            for array in _main(operand.arrays):
                if fused is not None and len(operand.arrays) == 1:
                    parameter = fused.parameter(number).name
                    read += min(array.bytes, self._read(fused, parameter, array.bytes))
                elif one.opcode in _SLICES and number == 0:
                    read += sum(a.bytes for a in one.arrays)
                elif one.opcode in _UPDATES and number == 0:
                    read += 0
                else:
                    read += array.bytes
        if fused is not None:
            return float(read + self._written(fused, fused.root, one.arrays))
        if one.opcode in _UPDATES:
            update = operands[1] if one.opcode == "dynamic-update-slice" else operands[-1]
            arrays = () if update is None else update.arrays
            return float(read + sum(a.bytes for a in arrays if one.arrays[0].space == 0))
        # Behind the product of a library is the room that it works in.
        made = one.arrays if library_flops(computation, one) is None else one.arrays[:1]
        return float(read + sum(a.bytes for a in _main(made)))

    def _read(self, place: Computation, name: str, whole: int) -> int:
        """Bytes of `name`, an array in a fused computation, that the computation reads."""
        total = 0
        for user in place.users(name):
            if user.opcode in ("bitcast", "reshape"):
                total += self._read(place, user.name, whole)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += sum(a.bytes for a in user.arrays)
            elif user.opcode in _UPDATES and user.operands[0] == name:
                total += 0  # written in place
            elif user.opcode in COLLECTIVES or user.opcode == "tuple" or _is_marker(user):
                total += 0
            elif (inner := self._fused(user)) is not None:
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read(inner, inner.parameter(number).name, whole)
            else:
                return whole
        return min(total, whole)

    def _written(self, place: Computation, name: str, arrays: tuple[Array, ...]) -> int:
        """Bytes of `arrays`, the value of `name`, that its computation writes to main memory."""
        one = place.instructions[name]
        if one.opcode == "tuple" and len(one.operands) == len(arrays):
            pairs = zip(one.operands, arrays, strict=True)
            return sum(self._written(place, operand, (a,)) for operand, a in pairs)
        if one.opcode in COLLECTIVES or one.opcode == "parameter" or _is_marker(one):
            return 0
        if one.opcode in ("bitcast", "reshape", "get-tuple-element") and len(arrays) == 1:
            return self._written(place, one.operands[0], arrays)
        if one.opcode == "dynamic-update-slice":
            update = place.instructions[one.operands[1]]
            return sum(a.bytes for a in update.arrays) if arrays[0].space == 0 else 0
        if one.opcode == "scatter" and len(arrays) == 1:
            # In place, if what it goes into is there already and not made here as well.
            into, update = (place.instructions[one.operands[i]] for i in (0, -1))
            if into.opcode == "parameter":
                return sum(a.bytes for a in update.arrays) if arrays[0].space == 0 else 0
        inner = self._fused(one)
        if inner is not None and len(one.arrays) == len(arrays):
            return self._written(inner, inner.root, arrays)
        return sum(a.bytes for a in _main(arrays))


def _main(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a for a in arrays if a.space == 0)


def _is_marker(one: Instruction) -> bool:
    """Whether a custom call stands for no work; see `_MARKERS`."""
    return one.opcode == "custom-call" and called_target(one).startswith(_MARKERS)


def _operand_arrays(place: Computation, one: Instruction) -> list[Array]:
    known = (place.instructions.get(name) for name in one.operands)
    return [array for operand in known if operand is not None for array in operand.arrays]


def group_size(one: Instruction, devices: int) -> int:
    """Chips in one group of a collective; of a permutation, all."""
    groups = one.attribute("replica_groups")
    if groups is None or groups == "{}":
        return devices
    if groups.startswith("{{"):
        return groups[2:].partition("}")[0].count(",") + 1
    if groups.startswith("mesh"):
        # mesh['x'=8,'y'=1] {'x'}: the product of the axes that are named after it.
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups)}
        named = groups.partition("]")[2]
        size = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named):
            size *= int(part) if part else sizes[name]
        return size
    # [groups,size]<=[devices]...
    return int(re.findall(r"\d+", groups.partition("]")[0])[-1])
