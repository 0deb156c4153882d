"""The plan of one run on one slice: memory, work, time, and what helps where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mos_jax.errors import InputError
from mos_jax.planning.chips import SOURCE, Slice, find_slice
from mos_jax.planning.compiling import Program
from mos_jax.planning.estimate import ASSUMPTIONS, Estimate, estimate
from mos_jax.planning.outline import held_bytes, mesh_sizes
from mos_jax.planning.request import Request
from mos_jax.planning.resolving import place_on, spread

GIB = 2**30


class Compiles(Protocol):
    """What plans are compiled by: a `Compiler`."""

    def program(self, request: Request) -> Program:
        """The compiled step of `request`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one run on one slice.

    Attributes:
      request: what was asked.
      chips: the slice.
      held: bytes that each chip holds between steps, by the rules of placement.
      program: the compiled step; None where it was not compiled, since `held` is too much.
      usable: bytes of a chip that programs may have.
      estimate: of its time; None where it does not fit.
    """

    request: Request
    chips: Slice
    held: int
    program: Program | None
    usable: int
    estimate: Estimate | None

    @property
    def needed(self) -> int | None:
        """Bytes that a chip must have for it; where it was not compiled, at least so many.

        None where the compiler refuses it for something else than a chip's main memory.
        """
        return self.held if self.program is None else self.program.peak

    @property
    def excess(self) -> int | None:
        """Bytes by which it is too much for a chip's main memory, negative where it fits.

        None where the compiler refuses it for something else.
        """
        return None if self.needed is None else self.needed - self.usable

    @property
    def fits(self) -> bool:
        """Whether the compiler took it."""
        return self.program is not None and self.program.fits

    def verdict(self) -> str:
        """In words whether it fits, and by how much or by how much not, or why it is refused."""
        if self.needed is None or self.excess is None:
            assert self.program is not None
            said = (self.program.refusal or "").strip().partition("\n")[0]
            return f"refused, and not for a chip's main memory; the compiler says: {said}"
        of = f"{size_in_words(self.needed)} of {size_in_words(self.usable)} of a chip"
        if self.fits:
            return f"fits: {of}, {size_in_words(-self.excess)} free"
        least = "at least " if self.program is None else ""
        return f"does not fit: {least}{of}, {least}{size_in_words(self.excess)} too much"

    def in_words(self) -> str:
        """One line: the setting and the verdict."""
        request = self.request
        mesh = ", ".join(f"{name} {size}" for name, size in mesh_sizes(request).items())
        return f"{mesh}, {request.rows} rows, {request.config.base.remat}: {self.verdict()}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; bytes, operations and seconds are those of one chip and one step."""
        request, program = self.request, self.program
        found: dict[str, Any] = {
            "model": request.model.name,
            "adapter": {
                "method": request.config.adapter.method,
                **request.config.adapter.to_dict(),
            },
            "topology": self.chips.name,
            "chips": self.chips.count,
            "mesh": mesh_sizes(request),
            "rows": request.rows,
            "accumulation": request.config.training.accumulation,
            "width": request.width,
            "targets": request.targets,
            "dtype": request.config.base.dtype,
            "quantize": request.config.base.quantize,
            "remat": request.config.base.remat,
            "fits": self.fits,
            "verdict": self.verdict(),
            "bytes": {"usable": self.usable, "held": self.held, "needed": self.needed},
        }
        if program is not None:
            found["bytes"] |= {
                "arguments": program.arguments,
                "temporaries": program.temporaries,
                "code": program.code,
            }
            found["versions"] = program.versions
            found["compile_seconds"] = round(program.seconds, 1)
        if program is None or program.counts is None:
            return found
        counts = program.counts
        found |= {
            "flops": counts.flops,
            "memory_traffic": counts.bytes,
            "collectives": counts.by_kind(),
            "loops": counts.loops,
            "unknown_loops": list(counts.unknown_loops),
            "uncounted_calls": list(counts.uncounted),
        }
        if self.estimate is not None:
            slow, fast = self.estimate.tokens_per_second
            found["seconds"] = dataclasses.asdict(self.estimate) | {
                "least": self.estimate.least,
                "most": self.estimate.most,
            }
            found["tokens_per_second"] = {"at_most_time": slow, "at_least_time": fast}
            found["assumptions"] = [*ASSUMPTIONS, f"chip: {SOURCE}"]
        return found


def size_in_words(size: float) -> str:
    """Bytes as "15.75 GiB" or "3.2 MiB"."""
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def make_plan(request: Request, compiler: Compiles, compile_all: bool = True) -> Plan:
    """Plans one run.

    Args:
      request: the run.
      compiler: of its step.
      compile_all: whether a step is compiled whose arrays alone are too much; the compiler then
        says what it needs in all.
    """
    chips = find_slice(request.topology)
    held = held_bytes(request)
    if not compile_all and held > chips.chip.memory:
        return Plan(request, chips, held, None, chips.chip.memory, None)
    program = compiler.program(request)
    found = None
    if program.counts is not None:
        found = estimate(program.counts, chips.chip, request.tokens)
    return Plan(request, chips, held, program, program.usable, found)


def knobs(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes that make a step smaller, one at a time, each with its flag; the gentlest first.

    Only a quantised base changes the numbers: rows that become accumulated batches do not.
    """
    config, chips = request.config, find_slice(request.topology)
    if config.base.remat != "full":
        base = dataclasses.replace(config.base, remat="full")
        yield "--config.base.remat=full", _changed(request, base=base)
    shares = config.mesh.data * config.mesh.fsdp
    rows, times = config.data.batch_size, config.training.accumulation
    while rows % 2 == 0 and (rows // 2) % shares == 0:
        rows, times = rows // 2, times * 2
        yield (
            f"--config.data.batch_size={rows} --config.training.accumulation={times}",
            _changed(
                request,
                data=dataclasses.replace(config.data, batch_size=rows),
                training=dataclasses.replace(config.training, accumulation=times),
            ),
        )
    for name in ("int8", "nf4"):
        if config.base.quantize is None:
            base = dataclasses.replace(config.base, quantize=name)
            yield f"--config.base.quantize={name}", _changed(request, base=base)
    for shape in chips.chip.topologies:
        larger = find_slice(f"{chips.chip.name}:{shape}")
        if larger.count > chips.count:
            sizes = spread(config.data.batch_size, larger.count)
            placed = place_on(config, sizes, larger)
            yield (
                f"--topology={larger.name} --mesh={','.join(map(str, sizes))}",
                dataclasses.replace(request, config=placed, topology=larger.name),
            )


def advise(
    request: Request,
    compiler: Compiles,
    tries: int,
    told: Callable[[str, str], None] = lambda flags, words: None,
) -> list[tuple[str, Plan]]:
    """Tries the knobs of a step that does not fit until one makes it fit.

    Args:
      request: the step.
      compiler: of the changed steps.
      tries: how many to compile at most; those whose arrays alone are too much cost nothing.
      told: is called with each try's flags and verdict.

    Returns:
      Flags and plan of each try; the last one fits, if any does.
    """
    found: list[tuple[str, Plan]] = []
    compiled = 0
    for flags, changed in knobs(request):
        if compiled >= tries:
            break
        try:
            plan = make_plan(changed, compiler, compile_all=False)
        except InputError as error:  # such as widths that are not whole blocks of a scheme
            told(flags, str(error))
            continue
        compiled += plan.program is not None
        found.append((flags, plan))
        told(flags, plan.verdict())
        if plan.fits:
            break
    return found


def _changed(request: Request, **sections: Any) -> Request:
    return dataclasses.replace(request, config=dataclasses.replace(request.config, **sections))
