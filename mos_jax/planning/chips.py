"""TPU chips and the shapes they come in."""

from __future__ import annotations

import dataclasses
import math

from mos_jax.errors import InputError, suggest

# Where the numbers below are from.
SOURCE = "Google Cloud TPU documentation, pages TPU v5e, TPU v5p and TPU v6e, read on 2026-11-24"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Bandwidths are of one chip, peaks as published.

    Attributes:
      name: as a topology's name begins.
      memory: bytes of HBM that the data sheet states; a program may use a little less.
      flops: bf16 operations a second.
      memory_bandwidth: bytes a second from and to HBM.
      link_bandwidth: bytes a second over all links of a chip, both directions together.
      axes: dimensions of its torus; each has two links of a chip.
      clock: cycles a second, from its peak and the number of its matrix units (of 128 x 128; 4 in
        v5e, 8 in v5p); 0: not known.
      topologies: shapes that are offered, ascending.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    axes: int
    clock: float
    topologies: tuple[str, ...]

    @property
    def axis_bandwidth(self) -> float:
        """Bytes a second that a chip receives over the two links of one axis of the torus."""
        return self.link_bandwidth / self.axes / 2


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * 2**30, 197e12, 819e9, 400e9, 2, 1.50e9, _FLAT),
        Chip("v5p", 95 * 2**30, 459e12, 2765e9, 1200e9, 3, 1.75e9, _CUBES),
        Chip("v6e", 32 * 2**30, 918e12, 1638e9, 800e9, 2, 0.0, _FLAT),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are wired together.

    Attributes:
      name: "v5e:4x4".
      chip: of which kind.
      shape: chips along each axis of the torus.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def find_slice(name: str) -> Slice:
    """The slice called `name`.

    Raises:
      InputError: if there is none; with those that there are.
    """
    kind, colon, shape = name.partition(":")
    if kind not in CHIPS:
        every = "; ".join(f"{chip.name}:{_listed(chip)}" for chip in CHIPS.values())
        raise InputError(f"unknown topology {name!r}; there are {every}")
    chip = CHIPS[kind]
    if not colon or shape not in chip.topologies:
        known = suggest(name, [f"{kind}:{one}" for one in chip.topologies])
        raise InputError(f"unknown topology {name!r}; {known}")
    return Slice(name, chip, tuple(int(size) for size in shape.split("x")))


def _listed(chip: Chip) -> str:
    return f"{{{','.join(chip.topologies)}}}"
