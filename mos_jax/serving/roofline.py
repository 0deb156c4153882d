"""What one decode step moves and computes, and how long that takes a device at least.

From sizes alone: a step takes no less than its bytes over the device's bandwidth, and no less than
its operations over its peak (the roofline of Williams, Waterman and Patterson, CACM 52(4), 2009).
Activations are left out: they are under a hundredth of the weights here, and stay on the chip.

Axis legend: B rows, T positions of a row's key-value cache, L blocks, e equivalent rank, r active
rank, h = d_in, o = d_out, H query heads, c head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mos_jax.adapters.adapter import require_integer
from mos_jax.adapters.factor_slots import DTYPES, check_dtype
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import Sites, SiteShape, select_sites
from mos_jax.errors import InputError, suggest
from mos_jax.models.config import SITES, DecoderConfig
from mos_jax.models.layout import weight_dtype
from mos_jax.serving.capacity import (
    CLAIMED_BUDGET_RATIO,
    base_bytes,
    cache_bytes,
    factor_bytes,
    in_gib,
    pool_bytes,
)

# A gather outside of the product that uses it reads the factors, writes them side by side, and the
# product reads them again.
GATHERED = 3


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator, by its maker's data sheet: peaks that no program reaches.

    Attributes:
      name: of it.
      memory: bytes.
      bandwidth: bytes of that memory a second.
      peak: dense operations a second in bf16.
      link: bytes a second from host memory, one way.
    """

    name: str
    memory: int
    bandwidth: float
    peak: float
    link: float


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # Data sheets of NVIDIA: A100 80 GB SXM (HBM2e, PCIe 4), H100 SXM (HBM3, PCIe 5).
        Device("a100-80gb", 80 * 2**30, 2.039e12, 312e12, 32e9),
        Device("h100-80gb", 80 * 2**30, 3.35e12, 989e12, 64e9),
    )
}


def find_device(name: str) -> Device:
    """The entry of `DEVICES`. Raises InputError if there is none."""
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}: {suggest(name, DEVICES)}")
    return DEVICES[name]


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step of B rows.

    Attributes:
      rows: B.
      base: bytes of the base's weights that are read, once for all rows.
      cache: bytes of keys and values, read and written.
      adapters: bytes of the rows' adapters that are moved.
      flops: operations, an addition and a multiplication being two.
    """

    rows: int
    base: int
    cache: int
    adapters: int
    flops: int

    @property
    def nbytes(self) -> int:
        """All bytes moved."""
        return self.base + self.cache + self.adapters

    def seconds(self, device: Device) -> float:
        """The least time on a device."""
        return max(self.nbytes / device.bandwidth, self.flops / device.peak)

    def bound(self, device: Device) -> str:
        """What sets it: "memory" or "compute"."""
        memory = self.nbytes / device.bandwidth >= self.flops / device.peak
        return "memory" if memory else "compute"

    def tokens_per_second(self, device: Device) -> float:
        """The most tokens of all rows together."""
        return self.rows / self.seconds(device)


@dataclasses.dataclass(frozen=True)
class Form:
    """How the tenants of a batch are held and read.

    Attributes:
      name: of it.
      held: bytes of one tenant on the device.
      moved: bytes that a row of a tenant of its own moves at a step.
      rank: r; 0 for the bare base.
      assembled: bytes for each row beside the tenants, and for the zeros: assembled factors.
    """

    name: str
    held: int
    moved: int
    rank: int
    assembled: int = 0


def tenant_forms(mos: MoSConfig, sites: Sites, dtype: str) -> tuple[Form, ...]:
    """The bare base; MoS, read in three ways; LoRA of r, and of the rank that MoS claims to match.

    "once" is a kernel that reads a row's assembled factors as it multiplies, "gathered" what XLA
    makes of a gather before the product, and "from pools" a kernel that reads each shard of the
    tenant's pools once and finds it on the chip when it is used again.
    """
    rank, e = mos.rank, mos.equivalent_rank
    assert rank is not None
    pools, factors = pool_bytes(mos, sites, dtype)[0], factor_bytes(rank, sites, dtype)
    claim = CLAIMED_BUDGET_RATIO * e
    wide = factor_bytes(claim, sites, dtype)
    return (
        Form("bare base", 0, 0, 0),
        Form(f"MoS e={e} r={rank}, from pools", pools, pools, rank),
        Form(f"MoS e={e} r={rank}, once", pools, factors, rank, factors),
        Form(f"MoS e={e} r={rank}, gathered", pools, GATHERED * factors, rank, factors),
        Form(f"LoRA r={rank}, once", factors, factors, rank),
        Form(f"LoRA r={claim}, once", wide, wide, claim),
    )


def step_of(
    config: DecoderConfig,
    form: Form,
    rows: int,
    tokens: int,
    *,
    sites: Sites | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> Step:
    """The decode step of `rows` rows, each of a tenant of its own.

    Args:
      config: the base.
      form: how tenants are held and read.
      rows: B.
      tokens: T, positions that a row's query sees.
      sites: those that are adapted; default all.
      dtype: of the base and the key-value cache.
      quantize: how the weights of the base's sites are held, as for `base_bytes`.

    Raises:
      InputError: for numbers below 1, or an unknown dtype or scheme.
    """
    for name, value in (("rows", rows), ("tokens", tokens)):
        require_integer("roofline", name, value, 1)
    check_dtype(dtype)
    shapes = config.weight_shapes()
    base = base_bytes(config, dtype, quantize)
    if not config.tied_embeddings:
        # Of the embedding a row is read for each token; where it is the head, all of it is.
        base -= math.prod(shapes["embed"]) * weight_dtype("embed", dtype).itemsize
    base += rows * config.d_model * DTYPES[dtype].itemsize
    cache = cache_bytes(config, rows, tokens, dtype) + cache_bytes(config, rows, 1, dtype)
    products = sum(math.prod(shapes[f"blocks/{name}"]) for name in SITES)
    products += config.d_model * config.vocab_size
    # Scores, and the sum of values by them.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens
    adapter = form.rank * widths_of(_all_sites(config) if sites is None else sites)
    flops = 2 * rows * (products + attention + adapter)
    return Step(rows, base, cache, rows * form.moved, flops)


def widths_of(sites: Sites) -> int:
    """Entries of one rank of all sites: L (h + o), summed over site types."""
    return sum(site.num_layers * (site.d_in + site.d_out) for site in sites.values())


def _all_sites(config: DecoderConfig) -> dict[str, SiteShape]:
    return {name: SiteShape(*shape) for name, shape in config.site_shapes().items()}


def rows_that_fit(
    config: DecoderConfig,
    device: Device,
    form: Form,
    tenants: int,
    tokens: int,
    reserve: float,
    dtype: str = "bfloat16",
) -> int:
    """Rows of `tokens` positions that fit beside the base and a number of tenants.

    Args:
      config: the base.
      device: what has the memory.
      form: how tenants are held.
      tenants: on the device.
      tokens: positions of each row's key-value cache.
      reserve: share of the memory that is left for programs and activations.
      dtype: of the base and the cache.
    """
    free = device.memory - int(device.memory * reserve) - base_bytes(config, dtype)
    free -= tenants * form.held + form.assembled
    return max(free // (cache_bytes(config, 1, tokens, dtype) + form.assembled), 0)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The account of one base on one device.

    Attributes:
      model: name of the base.
      device: what it runs on.
      tokens: T.
      tenants: how many lie on the device where it is asked what fits beside them.
      forms: of tenants.
      steps: by the name of a form, a step for each number of rows.
      fitting: by the name of a form, rows that fit beside all tenants.
      lines: the arithmetic.
    """

    model: str
    device: Device
    tokens: int
    tenants: int
    forms: tuple[Form, ...]
    steps: Mapping[str, tuple[Step, ...]]
    fitting: Mapping[str, int]
    lines: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def roofline(
    config: DecoderConfig,
    device: Device,
    mos: MoSConfig,
    *,
    rows: Sequence[int] = (1, 8, 32, 64, 128),
    tokens: int = 1024,
    tenants: int = 2000,
    reserve: float = 0.1,
    include: str | Sequence[str] = "all-linear",
    dtype: str = "bfloat16",
) -> Roofline:
    """Steps of all forms of tenants, and what fits beside `tenants` of them.

    Raises:
      InputError: for settings that do not fit the base, or unknown names.
    """
    require_integer("roofline", "tenants", tenants, 1)
    sites = select_sites(_all_sites(config), include)
    forms = tenant_forms(mos, sites, dtype)
    steps = {
        form.name: tuple(
            step_of(config, form, count, tokens, sites=sites, dtype=dtype) for count in rows
        )
        for form in forms
    }
    fitting = {
        form.name: rows_that_fit(config, device, form, tenants, tokens, reserve, dtype)
        for form in forms
    }
    lines = _account(config, device, forms[2], steps[forms[2].name], sites, tokens, dtype)
    lines += _table(device, forms, steps, rows)
    lines += _residence(device, forms, tenants, tokens, fitting)
    base = in_gib(base_bytes(config, dtype))
    lines.append(f"  ({in_gib(device.memory)} less {reserve:.0%} reserve, less the base of {base})")
    return Roofline(config.name, device, tokens, tenants, forms, steps, fitting, tuple(lines))


def _account(
    config: DecoderConfig,
    device: Device,
    form: Form,
    steps: Sequence[Step],
    sites: Sites,
    tokens: int,
    dtype: str,
) -> list[str]:
    """The bytes of one row's step, term by term."""
    size, step = DTYPES[dtype].itemsize, steps[-1]
    token = cache_bytes(config, 1, 1, dtype)
    return [
        f"{device.name}: {in_gib(device.memory)}, {device.bandwidth / 1e12:.3f} TB/s, "
        f"{device.peak / 1e12:.0f} TFLOP/s in bf16 -> a byte is worth "
        f"{device.peak / device.bandwidth:.0f} operations",
        f"a step of {step.rows} rows of {config.name} in {dtype}, {tokens} positions each:",
        f"  base      {step.base:>16,}  all weights once"
        + (", and a row of the embedding for each token" if not config.tied_embeddings else ""),
        f"  cache     {step.cache:>16,}  {step.rows} rows x ({tokens} read + 1 written) x "
        f"{token:,} bytes a position",
        f"  adapters  {step.adapters:>16,}  {step.rows} rows x {form.moved:,} ({form.name}: "
        f"r {form.rank} x {widths_of(sites):,} x {size} bytes, and scales)",
        f"  together  {step.nbytes:>16,}  / {device.bandwidth:.4g} = "
        f"{1e3 * step.nbytes / device.bandwidth:.2f} ms",
        f"  FLOP      {step.flops:>16,}  / {device.peak:.4g} = "
        f"{1e3 * step.flops / device.peak:.2f} ms -> bound by {step.bound(device)}",
    ]


def _table(
    device: Device, forms: Sequence[Form], steps: Mapping[str, Sequence[Step]], rows: Sequence[int]
) -> list[str]:
    width = max(len(form.name) for form in forms)
    bare = steps[forms[0].name]
    lines = [
        "tokens/s at most, all rows together, and the share of the bare base's:",
        f"  {'rows':<{width}}" + "".join(f"{count:>15,}" for count in rows),
    ]
    for form in forms:
        cells = (
            f"{one.tokens_per_second(device):>9,.0f} "
            f"{one.tokens_per_second(device) / base.tokens_per_second(device):>5.3f}"
            for one, base in zip(steps[form.name], bare, strict=True)
        )
        lines.append(f"  {form.name:<{width}}" + "".join(cells))
    return lines


def _residence(
    device: Device,
    forms: Sequence[Form],
    tenants: int,
    tokens: int,
    fitting: Mapping[str, int],
) -> list[str]:
    width = max(len(form.name) for form in forms)
    lines = [f"{tenants:,} tenants on the device, and rows of {tokens:,} positions beside them:"]
    for form in forms[1:]:
        fits = fitting[form.name]
        brought = 1e3 * form.held / device.link
        lines.append(
            f"  {form.name:<{width}}  {tenants:,} x {form.held:,} = "
            f"{in_gib(tenants * form.held):>10}: {f'{fits:,} rows' if fits else 'do not fit':>10}; "
            f"one from host memory: {brought:.2f} ms at {device.link / 1e9:.0f} GB/s"
        )
    return lines
