"""Sizes of a bank of tenants."""

from __future__ import annotations

import dataclasses

from mos_jax.adapters.adapter import require_integer
from mos_jax.adapters.factor_slots import check_dtype
from mos_jax.errors import InputError

ASSEMBLY = ("inside", "cached")


@dataclasses.dataclass(frozen=True)
class BankOptions:
    """Sizes of a `TenantBank`.

    Attributes:
      slots: tenants on the device, of each slab.
      dtype: "float32" or "bfloat16", of pools and factors at rest.
      assembly: where rows of MoS get their factors: "cached", from a cache of assembled factors,
        which a tenant enters when a row first uses it; or "inside" the scan, straight from the
        pools, at every step.
      cached: tenants in that cache, at least as many as a batch can have.
      host_bytes: of checked arrays in host memory.
      factor_rank: the least rank of the slab of factors; above what the registered tenants need, it
        leaves room for later ones. With 0 there is such a slab only if one of them needs it.
      max_slabs: of the kinds of MoS; a tenant of a further kind is refused.
    """

    slots: int = 8
    dtype: str = "float32"
    assembly: str = "cached"
    cached: int = 8
    host_bytes: int = 1 << 30
    factor_rank: int = 0
    max_slabs: int = 4

    def __post_init__(self) -> None:
        """Checks the values. Raises InputError."""
        for name, least in (
            ("slots", 1),
            ("cached", 1),
            ("host_bytes", 0),
            ("factor_rank", 0),
            ("max_slabs", 0),
        ):
            require_integer("bank", name, getattr(self, name), least)
        check_dtype(self.dtype)
        if self.assembly not in ASSEMBLY:
            raise InputError(f"bank: assembly must be 'inside' or 'cached', got {self.assembly!r}")
