"""The contract of an adapter.

Every method is a function from a few trained arrays to the low-rank factors of all sites. As a
Flax NNX module its trained arrays are exactly its `nnx.Param`s; whatever else it holds (routing
tables, fixed scalars) is `Frozen`. It is used as a read-only pytree: build it, then `jax.jit`,
`jax.grad`, `jax.vmap` and `nnx.split`.
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape, check_sites
from mos_jax.errors import InputError, suggest


class Frozen(nnx.Variable):
    """An array that belongs to an adapter or a base and is never trained."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig(abc.ABC):
    """What all methods' configurations can do. Subclasses are frozen dataclasses.

    Attributes:
      method: the method's name.
      size_field: the field that decides how much is trained; see `budget.fit`.
    """

    method: ClassVar[str]
    size_field: ClassVar[str] = "rank"

    @abc.abstractmethod
    def build(self, sites: Sites, key: jax.Array) -> Adapter:
        """Builds the adapter for `sites`; `key` seeds what trains, and nothing else.

        Raises:
          InputError: if the configuration does not fit the sites, with the numbers.
        """

    def rate_ratios(self) -> Mapping[str, float]:
        """Learning rates of parts of the adapter, as multiples of the run's; parts left out have 1.

        A part is the first word of an array's path (`"pool_b"` of `"pool_b/q_proj"`).
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Builds the configuration from its fields.

        Raises:
          InputError: for an unknown field (with the nearest name) or a value that is refused.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(f"{cls.method}: unknown field {name!r}; {suggest(name, known)}")
        return cls(**fields)


class Adapter(nnx.Module):
    """Base class of all methods.

    Attributes:
      config: the configuration it was built from, with open fields resolved.
    """

    config: AdapterConfig

    def __init__(self, config: AdapterConfig, sites: Sites):
        self.config = config
        # A tuple, since NNX keeps only hashable values outside its Variables.
        self._sites = tuple(check_sites(sites).items())

    @property
    def sites(self) -> dict[str, SiteShape]:
        """The adapted sites."""
        return dict(self._sites)

    def factors(self, layer: jax.Array | int | None = None) -> dict[str, LowRank]:
        """The low-rank factors of every site type.

        Args:
          layer: None for all adapted blocks (a [L, r, d_in], b [L, r, d_out], scale [L], fp32);
            or the index of one block of the model, which may be traced, for that block's own
            (a [r, d_in], b [r, d_out], scale []). A block that is not adapted has scale 0.

        Raises:
          InputError: if `layer` is a Python integer and the model cannot have that block.
        """
        return {name: self.site_factors(name, layer) for name in self.sites}

    @abc.abstractmethod
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """`factors` of the one site type `name`."""

    def count_trained(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def count_trained_by_site(self) -> dict[str, int]:
        """Number of trained parameters of each site type.

        What belongs to no single site type is counted under "shared", an entry that is there only
        when it is above 0.
        """
        counts = dict.fromkeys(self.sites, 0)
        for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            owner = next((part for part in reversed(path) if part in self.sites), "shared")
            counts[owner] = counts.get(owner, 0) + variable.get_value().size
        return counts

    def count_served(self) -> int:
        """Number of values that one tenant adds to a server once training is done.

        The trained ones, unless a method needs only a part of them to assemble its factors. What
        tenants of one configuration share (routing tables, frozen projections) is not counted.
        """
        return self.count_trained()

    def tables(self) -> dict[str, np.ndarray]:
        """All index tables on the host, by the path of their array; they enter the checksum."""
        return {}

    def check(self) -> None:
        """Checks the frozen arrays against the configuration. Raises InputError."""

    def summary(self) -> dict[str, Any]:
        """Facts worth reporting beside a run; methods add their own.

        `trained_parameters`; `stored_bytes`, of all arrays as they lie on disk; `served_bytes`, of
        what one tenant adds to a server in fp32, see `count_served`.
        """
        return {
            "method": self.config.method,
            "trained_parameters": self.count_trained(),
            "stored_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(self))),
            "served_bytes": 4 * self.count_served(),
        }


def local_layer(site: SiteShape, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Where block `layer` of the model stands among the adapted ones.

    Returns:
      Its position, int32 [] (0 when the block is not adapted), and fp32 [] 1 or 0: adapted or not.

    Raises:
      InputError: if `layer` is a Python integer below 0 or, where all blocks are adapted, beyond
        the last. An array may be traced and is taken as it is.
    """
    if isinstance(layer, int) and (layer < 0 or (site.layers is None and layer >= site.num_layers)):
        known = f"from 0 to {site.num_layers - 1}" if site.layers is None else "from 0"
        raise InputError(f"block {layer} does not exist; blocks are counted {known}")
    index = jnp.asarray(layer, jnp.int32)
    if site.layers is None:
        return index, jnp.float32(1)
    here = jnp.asarray(site.layers, jnp.int32) == index
    return jnp.argmax(here).astype(jnp.int32), jnp.any(here).astype(jnp.float32)


def choose_blocks(
    site: SiteShape, layer: jax.Array | int | None, scale: float
) -> tuple[jax.Array | slice, jax.Array, tuple[int, ...] | None]:
    """What `site_factors(name, layer)` picks from arrays [L, ...] when `scale` is that of a site.

    Returns:
      The index into the axis L, which is all of it when `layer` is None; the scale, fp32 [L] or
      [], 0 for a block that is not adapted; and `LowRank.layers`.

    Raises:
      InputError: as `local_layer` does.
    """
    if layer is None:
        return slice(None), jnp.full((site.num_layers,), scale, jnp.float32), site.layers
    index, adapted = local_layer(site, layer)
    return index, adapted * scale, None


def site_key(key: jax.Array, name: str, part: str) -> jax.Array:
    """A key for one array of one site type, whatever other types are adapted."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(f"{name}/{part}".encode())))


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """fp32 U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PEFT's Kaiming-uniform (a = sqrt 5) for LoRA A."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def require_bool(owner: str, name: str, value: Any) -> None:
    """Raises InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{owner}: {name} must be True or False, got {value!r}")


def require_integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Raises InputError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{owner}: {name} must be an integer >= {minimum}, got {value!r}")


def require_finite(owner: str, name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number that is finite in fp32."""
    if not _is_finite(value):
        raise InputError(f"{owner}: {name} must be a finite number, got {value!r}")


def require_positive(owner: str, name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number above 0 that is finite in fp32."""
    if not _is_finite(value) or value <= 0:
        raise InputError(f"{owner}: {name} must be a finite number above 0, got {value!r}")


def _is_finite(value: Any) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and abs(value) <= float(np.finfo(np.float32).max)
