"""Low-rank factors of several adapters in numbered slots, in arrays of fixed shape.

Slot 0 holds zeros and stays so: it is the base. What `AdapterBank` and the tenants of a server have
in common; names, and which slot is whose, are theirs.

Axis legend: L adapted blocks, K slots, the base's included, B rows of a batch, r the largest rank
at a site, h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mos_jax.adapters.adapter import local_layer, require_integer
from mos_jax.adapters.bits import as_bits, dtype_at_rest, from_bits
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BankFactors:
    """The factors of some slots of a bank: what `base.model` and `generate` take as factors.

    A pytree: hand it to `jax.jit` as an argument, never as a closure. Another choice of slots of
    the same number of rows then runs the same program.

    Attributes:
      bank: by site type, a [L, K, r, h], b [L, K, r, o], scale fp32 [L, K]; bfloat16 as its bits,
        see `bits.py`.
      slots: int32 [B], the slot of each row; or [], one slot for all rows.
    """

    bank: dict[str, LowRank]
    slots: jax.Array

    @strict
    def __call__(self, layer: jax.Array | int) -> dict[str, LowRank]:
        """Block `layer`'s factors: a [B, r, h], b [B, r, o], scale [B], or all without the B."""
        chosen = {}
        for name, f in self.bank.items():
            site = SiteShape(f.a.shape[0], f.a.shape[-1], f.b.shape[-1], f.layers)
            index, adapted = local_layer(site, layer)
            a, b, scale = (self._pick(array, index) for array in (f.a, f.b, f.scale))
            chosen[name] = LowRank(a, b, adapted * scale)
        return chosen

    def _pick(self, array: jax.Array, index: jax.Array) -> jax.Array:
        # One gather from the whole bank: no block of it is copied first.
        return from_bits(array.at[index, self.slots].get(mode="promise_in_bounds"))


class FactorSlots:
    """Slots 1 to `slots`, each with room for the factors of one adapter.

    Attributes:
      sites: what adapters in it may change.
      slots: how many adapters it holds.
      rank: by site type, the largest rank that fits.
      dtype: "float32" or "bfloat16", of the factors at rest; scales are fp32.
      factors: by site type, a [L, K, r, h], b [L, K, r, o], scale fp32 [L, K]; bfloat16 as its
        bits, see `bits.py`.
    """

    def __init__(
        self, sites: Sites, *, slots: int, rank: int | Mapping[str, int], dtype: str = "float32"
    ):
        """Allocates them, empty.

        Raises:
          InputError: for malformed sites, an unknown dtype, or numbers that are not positive.
        """
        self.sites = check_sites(sites)
        require_integer("bank", "slots", slots, 1)
        check_dtype(dtype)
        ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(self.sites, rank)
        if set(ranks) != set(self.sites):
            raise InputError(
                f"bank: rank names {', '.join(sorted(ranks))}, the sites are "
                f"{', '.join(sorted(self.sites))}"
            )
        for name, value in ranks.items():
            require_integer("bank", f"rank of {name!r}", value, 1)
        self.slots, self.dtype = slots, dtype
        self.rank = {name: ranks[name] for name in self.sites}
        held = dtype_at_rest(DTYPES[dtype])
        self.factors = {
            name: LowRank(
                jnp.zeros((site.num_layers, slots + 1, self.rank[name], site.d_in), held),
                jnp.zeros((site.num_layers, slots + 1, self.rank[name], site.d_out), held),
                jnp.zeros((site.num_layers, slots + 1), jnp.float32),
                site.layers,
            )
            for name, site in self.sites.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes on the device, all slots and the base's zeros."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.factors))

    def rows(self, slots: np.ndarray) -> BankFactors:
        """The factors for rows of these slots, int32 [B]; or [], one slot for all rows."""
        return BankFactors(self.factors, jax.device_put(slots.astype(np.int32)))

    def write(self, slot: int, entry: dict[str, LowRank]) -> None:
        """Overwrites a slot where it lies with what `padded` gave."""
        self.factors = write_slot(self.factors, jax.device_put(np.int32(slot)), entry)

    def padded(self, name: str, factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """One slot's arrays on the host, as at rest: a [L, r, h], b [L, r, o], scale [L] by site.

        Padding is NumPy's work, so that nothing is compiled for a new rank.

        Raises:
          InputError: for factors that do not fit or are not finite in the dtype; `name` is whose.
        """
        for site_name in factors:
            if site_name not in self.sites:
                raise InputError(
                    f"{name!r} adapts {site_name!r}, which the bank has not; "
                    f"{suggest(site_name, self.sites)}"
                )
        dtype, entry = DTYPES[self.dtype], {}
        for site_name, site in self.sites.items():
            rank = self.rank[site_name]
            a = np.zeros((site.num_layers, rank, site.d_in), dtype)
            b = np.zeros((site.num_layers, rank, site.d_out), dtype)
            scale = np.zeros(site.num_layers, np.float32)
            if site_name in factors:
                f = factors[site_name]
                own = f"{name!r} at {site_name!r}"
                _check_shapes(own, f, site)
                if f.rank > rank:
                    raise InputError(
                        f"{own} has rank {f.rank}, the bank {rank}; take resized(rank={f.rank})"
                    )
                rows = positions(site, f.layers)
                a[rows, : f.rank], b[rows, : f.rank], scale[rows] = f.a, f.b, f.scale
                if not all(np.isfinite(array).all() for array in (a, b, scale)):
                    raise InputError(f"{own} holds values that are not finite in {self.dtype}")
            a, b = as_bits(a), as_bits(b)
            entry[site_name] = LowRank(a, b, scale, site.layers)  # type: ignore[arg-type]
        return entry


def set_slot(
    whole: dict[str, LowRank], slot: jax.Array, entry: dict[str, LowRank]
) -> dict[str, LowRank]:
    """Slots [L, K, ...] with `entry` [L, ...] in one of them."""
    return jax.tree.map(lambda x, new: x.at[:, slot].set(new), whole, entry)


@functools.partial(jax.jit, donate_argnums=0)
def write_slot(
    bank: dict[str, LowRank], slot: jax.Array, entry: dict[str, LowRank]
) -> dict[str, LowRank]:
    """The bank with `entry` in `slot`, in the bank's own memory."""
    return set_slot(bank, slot, entry)


def check_dtype(dtype: str) -> None:
    """Raises InputError unless a bank can hold factors of this dtype."""
    if dtype not in DTYPES:
        raise InputError(f"bank: unknown dtype {dtype!r}; {suggest(str(dtype), DTYPES)}")


def _check_shapes(own: str, f: LowRank, site: SiteShape) -> None:
    bank = tuple(range(site.num_layers)) if site.layers is None else site.layers
    blocks = bank if f.layers is None else f.layers
    if f.layers is None and site.layers is not None:
        raise InputError(f"{own} adapts all blocks, the bank has {list(bank)} only")
    others = sorted(set(blocks) - set(bank))
    if others:
        raise InputError(f"{own} adapts the blocks {others}, the bank has {list(bank)}")
    wanted = (len(blocks), f.rank, site.d_in), (len(blocks), f.rank, site.d_out), (len(blocks),)
    if (f.a.shape, f.b.shape, f.scale.shape) != wanted:
        raise InputError(
            f"{own} must have a {list(wanted[0])}, b {list(wanted[1])} and scale "
            f"{list(wanted[2])}, got {list(f.a.shape)}, {list(f.b.shape)} and "
            f"{list(f.scale.shape)}"
        )


def positions(site: SiteShape, layers: tuple[int, ...] | None) -> list[int]:
    """Where an adapter's blocks stand among the bank's."""
    if layers is None:
        return list(range(site.num_layers))
    return list(layers) if site.layers is None else [site.layers.index(k) for k in layers]
