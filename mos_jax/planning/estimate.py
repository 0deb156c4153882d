"""How long a step takes at best, from what it does and what a chip can do (a roofline).

The roofline model: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import dataclasses

from mos_jax.planning.chips import Chip
from mos_jax.planning.counting import Counts

ASSUMPTIONS = (
    "matrix products at the published bf16 peak; other operations take no time",
    "main memory at its published bandwidth; arrays as large as their entries, without padding",
    "every collective by ring, over the links of one axis of the torus, both directions at once",
    "between all three at once (the least) and one after the other (the most)",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, on every chip.

    Attributes:
      compute: of its matrix products.
      memory: of its traffic with main memory.
      links: of its collectives.
      compiler: by the TPU compiler's own estimate of its fusions in cycles, collectives that are
        waited for left out; None where it gives none or the chip's clock is not known.
      tokens: of a step, on all chips, padding included.
    """

    compute: float
    memory: float
    links: float
    compiler: float | None
    tokens: int

    @property
    def least(self) -> float:
        """Seconds if all three overlap entirely."""
        return max(self.compute, self.memory, self.links)

    @property
    def most(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.memory + self.links

    @property
    def bound(self) -> str:
        """What the least time is that of."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """At the most and at the least time: the fewest and the most tokens a second."""
        return self.tokens / self.most, self.tokens / self.least


def estimate(counts: Counts, chip: Chip, tokens: int) -> Estimate:
    """The roofline of a step of `tokens` tokens that does `counts` on each chip."""
    received = sum(one.received for one in counts.collectives)
    timed = counts.cycles and chip.clock
    return Estimate(
        counts.flops / chip.flops,
        counts.bytes / chip.memory_bandwidth,
        received / chip.axis_bandwidth,
        counts.cycles / chip.clock if timed else None,
        tokens,
    )
