"""One decode step of a batch: bare, with one tenant, and with a different one in each row."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoS, MoSConfig
from mos_jax.adapters.sites import Sites
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder, FactorsSource
from mos_jax.models.kv_cache import Cache
from mos_jax.models.layout import weight_dtype
from mos_jax.serving.assembled import AssembledCache
from mos_jax.serving.slabs import FactorSlab, PoolSlab, Slab

POSITIONS = 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one form of a decode step costs.

    Attributes:
      name: of the form.
      bank_bytes: on the device, for the tenants and the zeros.
      flops: of the compiled step, as XLA counts them: one layer of the scan, and the head.
      accessed: bytes read and written, counted the same way.
      temporary: bytes of the largest moment beside arguments and results.
      ratio: median over rounds of its time over that of the bare base in the same round.
      milliseconds: the fastest step.
    """

    name: str
    bank_bytes: int
    flops: float
    accessed: float
    temporary: int
    ratio: float
    milliseconds: float


@jax.jit
def _step(model: Decoder, tokens: jax.Array, cache: Cache, factors: FactorsSource) -> jax.Array:
    positions = jnp.full(tokens.shape[0], POSITIONS - 1, jnp.int32)
    hidden, _ = model.extend(tokens, positions, cache, factors)
    return model.logits(hidden)


def random_base(config: DecoderConfig, dtype: str, seed: int = 0) -> Decoder:
    """A decoder of these sizes with random weights: a step's cost does not depend on them."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in config.weight_shapes().items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        weights[name] = jnp.asarray(np.abs(values) if name.endswith("norm") else values).astype(
            weight_dtype(name, dtype)
        )
    return Decoder(config, weights)


def random_tenants(config: AdapterConfig, sites: Sites, count: int) -> list[Adapter]:
    """Tenants whose trained arrays are random, so that none is the base."""
    adapter = create_adapter(config, sites, jax.random.key(0))
    graphdef, *states = nnx.split(adapter, nnx.Param, ...)
    trained, frozen = states
    rng = np.random.default_rng(1)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02))

    return [nnx.merge(graphdef, jax.tree.map(drawn, trained), frozen) for _ in range(count)]


def forms(
    model: Decoder, mos: MoSConfig, rows: int, dtype: str
) -> list[tuple[str, int, FactorsSource]]:
    """By name, bytes of the bank and the factors of each form."""
    sites, every = model.sites, np.arange(1, rows + 1)
    tenants = random_tenants(mos, sites, rows)
    first = tenants[0]
    assert isinstance(first, MoS)
    slab = PoolSlab(first, rows, dtype)
    for slot, tenant in enumerate(tenants, 1):
        assert isinstance(tenant, MoS)
        slab.write(slot, slab.entry_of(tenant))
    rank = mos.rank
    assert rank is not None
    loras = FactorSlab(sites, rows, dict.fromkeys(sites, rank), dtype)
    for slot, lora in enumerate(random_tenants(LoRAConfig(rank), sites, rows), 1):
        loras.write(slot, loras.entry("lora", lora.factors()))
    names = [str(slot) for slot in every]
    cache = AssembledCache(sites, [slab], rows, dtype)
    places: dict[str, tuple[Slab, int]] = {str(slot): (slab, int(slot)) for slot in every}
    cached = cache.for_rows(names, places)
    one = jax.tree.map(lambda leaf: leaf.astype(dtype), tenants[0].factors())
    one = {n: dataclasses.replace(f, scale=f.scale.astype(jnp.float32)) for n, f in one.items()}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    e = mos.equivalent_rank
    return [
        ("bare base", 0, None),
        (f"one unmerged MoS, e={e} r={rank}", held, one),
        ("MoS, all different: inside the scan", slab.nbytes, slab.rows(every)),
        ("MoS, one for all rows: inside the scan", slab.nbytes, slab.rows(np.ones_like(every))),
        ("MoS, all different: cached", slab.nbytes + cache.nbytes, cached),
        (f"LoRA r={rank}, all different: factors", loras.nbytes, loras.rows(every)),
    ]


def measure(
    config: DecoderConfig,
    mos: MoSConfig,
    rows: int,
    dtype: str,
    rounds: int,
    say: Callable[[str], None],
) -> list[Measured]:
    """Measures all forms; times of a round are taken side by side, in turn.

    Args:
      config: the base's sizes.
      mos: the tenants' configuration.
      rows: of the batch.
      dtype: of base, cache and bank.
      rounds: how often each form is timed.
      say: told of the progress.
    """
    model = random_base(config, dtype)
    cache = model.empty_cache(rows, POSITIONS)
    tokens = jnp.ones((rows, 1), jnp.int32)
    chosen = forms(model, mos, rows, dtype)
    compiled = []
    for name, _, factors in chosen:
        compiled.append(_step.lower(model, tokens, cache, factors).compile())
        say(f"compiled: {name}")
    times: list[list[float]] = [[] for _ in chosen]
    for _ in range(rounds + 1):
        for form, (_, _, factors) in enumerate(chosen):
            start = time.perf_counter()
            jax.block_until_ready(compiled[form](model, tokens, cache, factors))
            times[form].append(time.perf_counter() - start)
    measured = []
    for form, (name, held, _) in enumerate(chosen):
        cost: Any = compiled[form].cost_analysis()
        memory: Any = compiled[form].memory_analysis()
        ratios = [own / bare for own, bare in zip(times[form][1:], times[0][1:], strict=True)]
        measured.append(
            Measured(
                name,
                held,
                float(cost["flops"]),
                float(cost["bytes accessed"]),
                int(memory.temp_size_in_bytes),
                statistics.median(ratios),
                1000 * min(times[form][1:]),
            )
        )
    return measured


def table(measured: Sequence[Measured]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| form | bank, MB | MFLOP | MB accessed | MB temporary | time / bare | fastest, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for m in measured:
        lines.append(
            f"| {m.name} | {m.bank_bytes / 1e6:.2f} | {m.flops / 1e6:.1f} | "
            f"{m.accessed / 1e6:.1f} | {m.temporary / 1e6:.2f} | {m.ratio:.2f} | "
            f"{m.milliseconds:.1f} |"
        )
    return "\n".join(lines)
