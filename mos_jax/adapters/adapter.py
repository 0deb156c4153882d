"""The contract of an adapter.

Every method is a function from a few trained arrays to the low-rank factors of all sites. As a
Flax NNX module its trained arrays are exactly its `nnx.Param`s; whatever else it holds (routing
tables, fixed scalars) is `Frozen`. It is used as a read-only pytree: build it, then `jax.jit`,
`jax.grad`, `jax.vmap` and `nnx.split`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters import patterns
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
      no_pattern: by name, a pattern that the method refuses, and why.
      rank_pattern: by regular expression, the rank of the sites whose module it matches the end
        of; the others have `rank`. See `patterns.py`.
      alpha_pattern: the same for alpha.
    """

    method: ClassVar[str]
    size_field: ClassVar[str] = "rank"
    no_pattern: ClassVar[Mapping[str, str]] = {}

    rank_pattern: Mapping[str, int] = dataclasses.field(default=patterns.NONE, kw_only=True)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default=patterns.NONE, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the patterns. Raises InputError."""
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = patterns.make_pattern(getattr(self, field), f"{self.method}: {field}")
            if pattern and field in self.no_pattern:
                raise InputError(f"{self.method}: no {field} here: {self.no_pattern[field]}")
            for key, value in pattern.items():
                if field == "rank_pattern":
                    require_integer(self.method, f"{field}[{key!r}]", value, 1)
                else:
                    require_positive(self.method, f"{field}[{key!r}]", value)
            object.__setattr__(self, field, pattern)

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
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: dict(v) if isinstance(v, Mapping) else v for name, v in fields}

    def site_ranks(self, sites: Sites) -> dict[str, tuple[int, ...]]:
        """The rank of every adapted block, by site type.

        Raises:
          InputError: if a key of `rank_pattern` matches none of the sites.
        """
        return self._by_block("rank", sites)

    def site_alphas(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """The alpha of every adapted block, by site type; for methods that have one.

        Raises:
          InputError: if a key of `alpha_pattern` matches none of the sites.
        """
        return self._by_block("alpha", sites)

    def _by_block(self, field: str, sites: Sites) -> dict[str, tuple[Any, ...]]:
        pattern, default = getattr(self, f"{field}_pattern"), getattr(self, field)
        where = f"{self.method}: {field}_pattern"
        return patterns.by_block(pattern, default, check_sites(sites), where)

    def site_scales(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        """The scale of every adapted block, by site type: 1 unless a method says otherwise.

        Raises:
          InputError: as `site_ranks` and `site_alphas` do.
        """
        return {name: (1.0,) * site.num_layers for name, site in check_sites(sites).items()}

    def _alpha_over_rank(self, sites: Sites) -> dict[str, tuple[float, ...]]:
        ranks, alphas = self.site_ranks(sites), self.site_alphas(sites)
        return {name: tuple(map(operator.truediv, alphas[name], ranks[name])) for name in ranks}

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
        # Tuples, since NNX keeps only hashable values outside its Variables.
        self._sites = tuple(check_sites(sites).items())
        self._ranks = tuple(config.site_ranks(sites).items())
        self._scales = tuple(config.site_scales(sites).items())

    @property
    def sites(self) -> dict[str, SiteShape]:
        """The adapted sites."""
        return dict(self._sites)

    @property
    def site_ranks(self) -> dict[str, tuple[int, ...]]:
        """The configured rank of every adapted block, by site type."""
        return dict(self._ranks)

    @property
    def site_scales(self) -> dict[str, tuple[float, ...]]:
        """The scale of every adapted block, by site type."""
        return dict(self._scales)

    def factors(self, layer: jax.Array | int | None = None) -> dict[str, LowRank]:
        """The low-rank factors of every site type.

        Args:
          layer: None for all adapted blocks (a [L, r, d_in], b [L, r, d_out], scale [L], fp32);
            or the index of one block of the model, which may be traced, for that block's own
            (a [r, d_in], b [r, d_out], scale []). A block that is not adapted has scale 0. r is
            the largest rank of the type; a block of a lower one ends in rows of zeros.

        Raises:
          InputError: if `layer` is a Python integer and the model cannot have that block.
        """
        return {name: self.site_factors(name, layer) for name in self.sites}

    @abc.abstractmethod
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """`factors` of the one site type `name`."""

    def count_trained(self) -> int:
        """Number of trained parameters, without the rows beyond a block's rank."""
        return sum(self.count_trained_by_site().values())

    def count_trained_by_site(self) -> dict[str, int]:
        """Number of trained parameters of each site type.

        What belongs to no single site type is counted under "shared", an entry that is there only
        when it is above 0.
        """
        counts = dict.fromkeys(self.sites, 0)
        for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            owner = next((part for part in reversed(path) if part in self.sites), "shared")
            array = variable.get_value()
            beyond = self.padded_rows(str(path[0]), str(path[-1]))
            size = array.size - (beyond and beyond * math.prod(array.shape[2:]))
            counts[owner] = counts.get(owner, 0) + size
        return counts

    def padded_rows(self, part: str, name: str) -> int:
        """Rows of the trained array `part/name`, [L, r, ...], beyond the ranks of the L blocks.

        They are counted over all blocks; 0 for an array of another form.
        """
        return 0

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
    site: SiteShape, layer: jax.Array | int | None, scale: float | Sequence[float]
) -> tuple[jax.Array | slice, jax.Array, tuple[int, ...] | None]:
    """What `site_factors(name, layer)` picks from arrays [L, ...].

    Args:
      site: the site type.
      layer: see `Adapter.factors`.
      scale: of all blocks, or of each.

    Returns:
      The index into the axis L, which is all of it when `layer` is None; the scale, fp32 [L] or
      [], 0 for a block that is not adapted; and `LowRank.layers`.

    Raises:
      InputError: as `local_layer` does.
    """
    if not isinstance(scale, Sequence):
        scale = (scale,) * site.num_layers
    one = not patterns.differ(scale)
    if layer is None:
        every = jnp.full(len(scale), scale[0], jnp.float32) if one else jnp.float32(scale)
        return slice(None), every, site.layers
    index, adapted = local_layer(site, layer)
    return index, adapted * (scale[0] if one else jnp.float32(scale)[index]), None


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
