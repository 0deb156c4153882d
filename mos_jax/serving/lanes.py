"""A tenant that is known, and a slab with the slots of those that are on the device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mos_jax.serving.kinds import Kind
from mos_jax.serving.slabs import FactorSlab, Slab
from mos_jax.serving.slots import Slots


@dataclasses.dataclass(frozen=True)
class Tenant:
    """A known tenant: its name, its folder, its kind, and the key of its slab."""

    name: str
    folder: Path
    kind: Kind
    slab: str


@dataclasses.dataclass
class Lane:
    """A slab and who has its slots."""

    slab: Slab
    slots: Slots

    def summary(self) -> dict[str, Any]:
        """Sizes and counts as JSON values."""
        return {
            "form": "factors" if isinstance(self.slab, FactorSlab) else "pools",
            "slots": self.slots.count,
            "resident": self.slots.resident,
            "in_use": self.slots.in_use,
            "evictions": self.slots.evictions,
            "bytes": self.slab.nbytes,
            "slot_bytes": self.slab.slot_bytes,
        }
