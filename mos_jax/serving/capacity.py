"""How many tenants fit beside one base, from sizes alone, with the arithmetic line by line.

Axis legend: L blocks, e equivalent rank, r active rank, l shards per vector, h = d_in, o = d_out,
K and c of the key-value cache: its heads and their width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from mos_jax.adapters.adapter import require_integer
from mos_jax.adapters.factor_slots import DTYPES, check_dtype
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.pools import SIDES
from mos_jax.adapters.sites import Sites, SiteShape, select_sites
from mos_jax.errors import InputError
from mos_jax.models.config import SITES, DecoderConfig
from mos_jax.models.layout import weight_dtype
from mos_jax.models.quantized import check_divides, find_scheme

# MoS is reported to match LoRA of eight times its trained parameters (Wang et al., ICLR 2025,
# arXiv 2410.00938). A claim of the paper, not a measurement of this library.
CLAIMED_BUDGET_RATIO = 8
INDEX_BYTES = 4
SCALE_BYTES = 4
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


@dataclasses.dataclass(frozen=True)
class Server:
    """What lies on a device beside the tenants.

    Attributes:
      memory: bytes of the device.
      dtype: of the base's weights, of the key-value cache, and of pools and factors at rest.
      quantize: how the weights of the base's sites are held: "int8", "nf4", or None for `dtype`.
      rows: B, requests at a time.
      tokens: T, positions of each row's key-value cache.
      reserve: share of the memory that is left for programs, activations and fragments.
    """

    memory: int
    dtype: str = "bfloat16"
    quantize: str | None = None
    rows: int = 32
    tokens: int = 2048
    reserve: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values. Raises InputError."""
        for name in ("memory", "rows", "tokens"):
            require_integer("capacity", name, getattr(self, name), 1)
        check_dtype(self.dtype)
        find_scheme(self.quantize)
        if not 0 <= self.reserve < 1:
            raise InputError(f"capacity: reserve must be from 0 to below 1, got {self.reserve!r}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How many tenants of one kind fit.

    Attributes:
      name: what they are called.
      why: what they are compared for.
      tenant_bytes: of one, in its slot.
      shared_bytes: once for all of them: slot 0 of zeros, routing tables, assembled factors.
      tenants: how many fit; 0 where not even the base does.
    """

    name: str
    why: str
    tenant_bytes: int
    shared_bytes: int
    tenants: int


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The whole account.

    Attributes:
      model: name of the base.
      server: what was asked.
      base_bytes: of the base's weights.
      cache_bytes: of the key-value cache.
      reserve_bytes: left for everything else.
      free_bytes: for tenants; 0 where the base, the cache and the reserve fill the memory.
      fits: by kind of tenant.
      lines: the arithmetic.
    """

    model: str
    server: Server
    base_bytes: int
    cache_bytes: int
    reserve_bytes: int
    free_bytes: int
    fits: tuple[Fit, ...]
    lines: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def parse_bytes(text: str) -> int:
    """Bytes of "80GiB", "16 GB", "1048576"; 1 GB is 10^9, 1 GiB is 2^30. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in _UNITS:
        raise InputError(f"{text!r} is no number of bytes; write for example 80GiB, 16GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def base_bytes(config: DecoderConfig, dtype: str, quantize: str | None = None) -> int:
    """Bytes of a base's weights as `load_base` holds them.

    Raises:
      InputError: for an unknown dtype or scheme, or widths that the scheme does not divide.
    """
    scheme, total = find_scheme(quantize), 0
    for name, shape in config.weight_shapes().items():
        if scheme is not None and name.removeprefix("blocks/") in SITES:
            check_divides(name, shape[-2])
            total += int(math.prod(shape) * scheme.bits) // 8
        else:
            total += math.prod(shape) * weight_dtype(name, dtype).itemsize
    return total


def cache_bytes(config: DecoderConfig, rows: int, tokens: int, dtype: str) -> int:
    """Bytes of a key-value cache of `rows` rows of `tokens` positions."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * DTYPES[dtype].itemsize * rows * tokens


def pool_bytes(config: MoSConfig, sites: Sites, dtype: str) -> tuple[int, int]:
    """Bytes of one MoS tenant in a `PoolSlab`, and of the routing tables that all share."""
    itemsize, ranks = DTYPES[dtype].itemsize, config.site_ranks(sites)
    pools = [pool for side in SIDES for pool in config.pools(sites, side, ranks)]
    trained = sum(math.prod(pool.shape) for pool in pools) * itemsize
    tables = sum(site.num_layers * max(ranks[name]) for name, site in sites.items())
    scalars = 0
    if config.rank_scaling or config.random_scaling == "trained":
        scalars = 4 * tables
    shared = 2 * tables * config.shards_per_vector * INDEX_BYTES
    shared += 4 * tables if config.random_scaling == "fixed" else 0
    return trained + scalars, shared


def factor_bytes(rank: int, sites: Sites, dtype: str) -> int:
    """Bytes of one tenant in a `FactorSlab` of this rank."""
    return sum(
        site.num_layers * (rank * (site.d_in + site.d_out) * DTYPES[dtype].itemsize + SCALE_BYTES)
        for site in sites.values()
    )


def capacity(
    config: DecoderConfig,
    server: Server,
    *,
    equivalent_rank: int = 2,
    rank: int | None = None,
    shards_per_vector: int = 2,
    cached: int | None = None,
    include: str | Sequence[str] = "all-linear",
) -> Capacity:
    """How many tenants of MoS and of LoRA fit beside a base.

    MoS of equivalent rank e and active rank r is compared with LoRA of rank r, which has the same
    active rank; with LoRA of rank 8 e, which the paper claims it matches; and with LoRA of rank e,
    which has the same budget. Tenants of all other methods are held as factors: each costs what
    LoRA of its rank does.

    Args:
      config: the base.
      server: memory, and what lies in it besides.
      equivalent_rank: e.
      rank: r; default 4 e.
      shards_per_vector: l.
      cached: tenants of MoS whose factors lie assembled beside the pools (`BankOptions.cached`);
        default one for each row, 0 where rows are assembled inside the scan.
      include: the adapted sites, as `select_sites` takes them.

    Raises:
      InputError: for settings that do not fit the base, or unknown names.
    """
    sites = select_sites(
        {name: SiteShape(*shape) for name, shape in config.site_shapes().items()}, include
    )
    e, r = equivalent_rank, 4 * equivalent_rank if rank is None else rank
    mos = MoSConfig(e, r, shards_per_vector)
    weights = base_bytes(config, server.dtype, server.quantize)
    cache = cache_bytes(config, server.rows, server.tokens, server.dtype)
    reserve = int(server.memory * server.reserve)
    free = max(server.memory - weights - cache - reserve, 0)
    one, tables = pool_bytes(mos, sites, server.dtype)
    cached = server.rows if cached is None else cached
    require_integer("capacity", "cached", cached, 0)
    # As everywhere, with a slot of zeros.
    assembled = (cached + 1) * factor_bytes(r, sites, server.dtype) if cached else 0
    claim = CLAIMED_BUDGET_RATIO * e
    kinds: list[tuple[str, str, int, int]] = [
        (f"MoS e={e} r={r}", "pools in the bank", one, tables + assembled),
        (f"LoRA r={r}", "equal active rank", factor_bytes(r, sites, server.dtype), 0),
        (
            f"LoRA r={claim}",
            f"equal quality, as the paper claims ({CLAIMED_BUDGET_RATIO} x budget)",
            factor_bytes(claim, sites, server.dtype),
            0,
        ),
        (f"LoRA r={e}", "equal budget", factor_bytes(e, sites, server.dtype), 0),
    ]
    fits = tuple(
        # Slot 0, of zeros, is as large as a tenant.
        Fit(name, why, size, size + shared, max((free - size - shared) // size, 0))
        for name, why, size, shared in kinds
    )
    lines = _account(config, server, weights, cache, reserve, free)
    lines += _account_tenants(sites, server, mos, fits, one, tables, cached)
    return Capacity(config.name, server, weights, cache, reserve, free, fits, tuple(lines))


def _account(
    config: DecoderConfig, server: Server, weights: int, cache: int, reserve: int, free: int
) -> list[str]:
    size = DTYPES[server.dtype].itemsize
    held = f"sites in {server.quantize}, the rest in" if server.quantize else "in"
    left = server.memory - weights - cache - reserve
    lines = [
        f"memory             {server.memory:>16,}  {in_gib(server.memory)}",
        f"- base             {weights:>16,}  {config.name}: {config.num_parameters:,} weights "
        f"{held} {server.dtype}, norms in float32",
        f"- key-value cache  {cache:>16,}  2 x {config.num_layers} layers x {config.num_kv_heads} "
        f"heads x {config.head_dim} x {size} bytes x {server.rows} rows x {server.tokens} tokens",
        f"- reserve          {reserve:>16,}  {server.reserve:.0%} for programs, activations, gaps",
        f"= for tenants      {free:>16,}  {in_gib(free)}",
    ]
    if left < 0:
        lines.append(f"  short by         {-left:>16,}  fewer rows or tokens, or quantize the base")
    return lines


def _account_tenants(
    sites: Sites,
    server: Server,
    mos: MoSConfig,
    fits: Sequence[Fit],
    one: int,
    tables: int,
    cached: int,
) -> list[str]:
    size = DTYPES[server.dtype].itemsize
    widths = sum(site.num_layers * (site.d_in + site.d_out) for site in sites.values())
    depth = sum(site.num_layers for site in sites.values())
    trained = sum(count_parameters(mos, sites).values())
    lora = sum(count_parameters(LoRAConfig(rank=1), sites).values())
    assert trained == mos.equivalent_rank * widths
    assert lora == widths
    lines = [
        f"one rank of all sites: {widths:,} entries, L (h + o) summed over {len(sites)} site types",
        f"MoS tenant:  e {mos.equivalent_rank} x {widths:,} x {size} bytes = {one:,}; routing once "
        f"for all: 2 x {depth} sites x r {mos.rank} x l {mos.shards_per_vector} x {INDEX_BYTES} "
        f"bytes = {tables:,}",
        f"  and the factors of {cached} tenants, assembled: "
        + (
            f"({cached} + 1 of zeros) x LoRA tenant of r {mos.rank} = "
            f"{fits[0].shared_bytes - one - tables:,}"
            if cached
            else "none"
        ),
        f"LoRA tenant: r x {widths:,} x {size} bytes + {depth} scales x {SCALE_BYTES} bytes",
    ]
    for fit in fits:
        lines.append(
            f"{fit.name:<14} ({fit.why}): ({fit.shared_bytes:,} once, a slot of "
            f"zeros included) then {fit.tenant_bytes:,} each -> {fit.tenants:,} tenants"
        )
    return lines


def in_gib(size: float) -> str:
    """Bytes in words: "74.51 GiB", "3.20 MiB"."""
    for unit, base in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= base:
            return f"{size / base:,.2f} {unit}"
    return f"{size:,.0f} bytes"
