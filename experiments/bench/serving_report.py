"""The benchmark of serving as a page of tables, each beside what it was held to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.bench.rounds import spread
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.models.base import load_base
from mos_jax.models.config import DecoderConfig
from mos_jax.serving.capacity import factor_bytes, pool_bytes
from mos_jax.serving.roofline import Form, step_of

Found = dict[str, Any]
BARE, ONE, ALL = "bare base", "MoS, one tenant", "MoS, all different"


def rates(found: Found, name: str, by: str = "seconds") -> list[float]:
    """Tokens for each second of a contestant, by round; `by` may be "processor" as well."""
    # A round of the short form may be shorter than the clock of processor time ticks.
    return [one[name]["tokens"] / max(one[name][by], 1e-3) for one in found["rounds"]]


def ratios(found: Found, above: str, below: str, by: str = "seconds") -> list[float]:
    """Of the tokens for each second, within each round."""
    pairs = zip(rates(found, above, by), rates(found, below, by), strict=True)
    return [a / b for a, b in pairs]


def within(values: Sequence[float], digits: int = 2) -> str:
    """Median (smallest to largest)."""
    s = spread(values)
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def others(found: Found) -> float:
    """The share of the machine that other programs took, median of all runs."""
    return statistics.median(
        one["others"] or 0.0 for made in found["rounds"] for one in made.values()
    )


def _head(found: Found, title: str) -> list[str]:
    machine = found["machine"]
    return [
        f"## {title}",
        "",
        f"{machine['date'][:10]}; {machine['threads']} threads of {machine['cores']} cores of "
        f"{machine['processor']}; load {machine['load_before'][0]:.1f} when it began, other "
        f"programs took {others(found):.0%} of the processors (median of all runs); "
        f"{len(found['rounds'])} rounds; jax {machine['versions']['jax']}.",
        "",
    ]


def verdict(value: float, bound: float, at_least: bool = True) -> str:
    """In words."""
    met = value >= bound if at_least else value <= bound
    return f"{'met' if met else 'missed'} ({'at least' if at_least else 'at most'} {bound:g})"


def batch_tables(found: Found) -> list[str]:
    """One batch of 8 rows: who is in it."""
    names = list(found["facts"])
    lines = _head(found, "A batch of 8 rows")
    lines += [
        "| | tokens/s | a processor second | to bare base, clock | to bare base, processor | "
        "bank, bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        lines.append(
            f"| {name} | {within(rates(found, name), 1)} | "
            f"{within(rates(found, name, 'processor'), 1)} | "
            f"{within(ratios(found, name, BARE))} | "
            f"{within(ratios(found, name, BARE, 'processor'))} | "
            f"{found['facts'][name]['bank_bytes']:,} |"
        )
    lines += ["", "| required | clock | processor | |", "|---|---:|---:|---|"]
    for above, below, bound in ((ALL, ONE, 0.9), (ALL, BARE, 0.8)):
        clock, processor = (ratios(found, above, below, by) for by in ("seconds", "processor"))
        lines.append(
            f"| {above}, to {below} | {within(clock)} | {within(processor)} | "
            f"{verdict(statistics.median(processor or clock), bound)} by processor time |"
        )
    return [*lines, ""]


def rows_table(found: Found, config: DecoderConfig, mos: MoSConfig, positions: int) -> list[str]:
    """1 to 64 rows, beside the bytes that a step moves."""
    sites = {name: SiteShape(*shape) for name, shape in config.site_shapes().items()}
    dtype, rank = found["sizes"]["dtype"], mos.rank
    assert rank is not None
    factors = factor_bytes(rank, sites, dtype)
    lines = _head(found, "1 to 64 rows")
    lines += [
        "| rows | bare base, tokens/s | one tenant, to bare | all different, to bare | "
        "all different, to one | base and cache, MB | factors, MB | predicted, to bare |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows in found["sizes"]["rows"]:
        bare, one, different = (f"{name}, {rows}" for name in (BARE, ONE, ALL))
        step = step_of(config, Form("read once", 0, factors, rank), rows, positions,
                       dtype="float32")  # fmt: skip
        plain = step.base + step.cache
        lines.append(
            f"| {rows} | {within(rates(found, bare), 1)} | "
            f"{within(ratios(found, one, bare, 'processor'))} | "
            f"{within(ratios(found, different, bare, 'processor'))} | "
            f"{within(ratios(found, different, one, 'processor'))} | {plain / 1e6:,.1f} | "
            f"{step.adapters / 1e6:,.1f} | {plain / step.nbytes:.2f} |"
        )
    return [
        *lines,
        "",
        "Ratios are of tokens for each processor second. Predicted is the share that the base and "
        f"the keys and values of {positions} positions have in the bytes of a step that reads "
        "each row's factors once: what it would be if bytes were all.",
        "",
    ]


def tenants_table(found: Found, mos: MoSConfig, sites: dict[str, SiteShape]) -> list[str]:
    """Zipf traffic of 1 to 1,000 tenants."""
    dtype, rank = found["sizes"]["dtype"], mos.rank
    assert rank is not None
    lines = _head(found, "1 to 1,000 tenants")
    lines += [
        "| tenants | on the device | bank, bytes | a tenant | tokens/s | a processor second | "
        "first token, ms | 95 of 100 | swaps a round |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, facts in found["facts"].items():
        first = [1e3 * one[name]["first_token"]["median"] for one in found["rounds"]]
        late = [1e3 * one[name]["first_token"]["p95"] for one in found["rounds"]]
        swaps = [one[name]["placed"] for one in found["rounds"]]
        lines.append(
            f"| {name} | {facts['slots']:,} | {facts['bank_bytes']:,} | {facts['slot_bytes']:,} | "
            f"{within(rates(found, name), 1)} | {within(rates(found, name, 'processor'), 1)} | "
            f"{statistics.median(first):,.0f} | {statistics.median(late):,.0f} | "
            f"{statistics.median(swaps):g} |"
        )
    most = max(found["sizes"]["tenants"])
    held = found["facts"][f"MoS, {most}"]["bank_bytes"]
    lora = factor_bytes(rank, sites, dtype)
    share = mos.equivalent_rank / rank
    bound = 1.1 * most * share * lora
    lines += [
        "",
        f"{most:,} tenants of MoS and all that is beside them (the zeros, the tables, the "
        f"assembled factors of {8} rows): {held:,} bytes. LoRA of the same active rank has "
        f"{lora:,} bytes a tenant; 1.1 x {most:,} x {mos.equivalent_rank}/{rank} x {lora:,} = "
        f"{bound:,.0f}: {verdict(held / (most * share * lora), 1.1, at_least=False)}, it is "
        f"{held / (most * share * lora):.3f}. Pools alone are {pool_bytes(mos, sites, dtype)[0]:,} "
        "bytes a tenant.",
        "",
    ]
    return lines


def swap_table(found: Found) -> list[str]:
    """Loading and swapping."""
    lines = _head(found, "Loading and swapping")
    lines += [
        "| kind, from | read and checked, ms | swap, ms | slowest of a round, ms |",
        "|---|---:|---:|---:|",
    ]
    for name in found["facts"]:
        read, swap, most = (
            [1e3 * one[name][key] for one in found["rounds"]]
            for key in ("read", "swap", "swap_most")
        )
        lines.append(f"| {name} | {within(read, 1)} | {within(swap, 1)} | {within(most, 1)} |")
    swaps = [1e3 * one["mos, host"]["swap"] for one in found["rounds"]]
    lines += [
        "",
        "Reading is done beside the decoder. A swap is what the decoder waits for: the write of a "
        "tenant into the slot of another, and its factors for its first row. Required under 10 ms "
        f"for MoS: {verdict(statistics.median(swaps), 10, at_least=False)}, by the clock.",
        "",
    ]
    return lines


def peft_table(found: Found) -> list[str]:
    """Beside PEFT."""
    lines = _head(found, "Beside PEFT's mixed batch")
    lines += ["| | tokens/s | a processor second |", "|---|---:|---:|"]
    for name in found["facts"]:
        lines.append(
            f"| {name} | {within(rates(found, name), 1)} | "
            f"{within(rates(found, name, 'processor'), 1)} |"
        )
    theirs = "peft, all different"
    clock, processor = (ratios(found, ALL, theirs, by) for by in ("seconds", "processor"))
    lines += [
        "",
        "8 prompts, 8 adapters, the same weights; PEFT in transformers' `generate` with "
        "`adapter_names`, greedy, with a key-value cache, fp32. The engine's tokens/s over PEFT's: "
        f"{within(clock, 1)} by the clock, {within(processor, 1)} by processor time. At least 3: "
        f"{verdict(min(map(statistics.median, (clock, processor))), 3)}.",
        "",
        "torch's threads wait for each other by spinning: where other programs run, that costs it "
        "time by both measures.",
        "",
    ]
    return lines


def page(parts: dict[str, Found], command: str) -> str:
    """All that was measured, as Markdown."""
    some = next(iter(parts.values()))
    sizes = some["sizes"]
    mos = MoSConfig(
        sizes["mos"]["equivalent_rank"], sizes["mos"]["rank"], sizes["mos"]["shards_per_vector"]
    )
    config = load_base(sizes["base"], "float32").config
    sites = {name: SiteShape(*shape) for name, shape in config.site_shapes().items()}
    lines = [
        "# Serving, measured",
        "",
        f"{sizes['base']} in fp32 on CPU, banks in {sizes['dtype']}; MoS of e = "
        f"{mos.equivalent_rank}, r = {mos.rank}, l = {mos.shards_per_vector} on all linear "
        f"layers, random weights. Prompts of 16 tokens, answers of {sizes['answer']} tokens in a "
        f"batch of 8, of {sizes['peft_answer']} beside PEFT, of {sizes['short_answer']} "
        "elsewhere; greedy, prefill included. Contestants of a part take turns in rounds; ratios "
        "are taken within a round. Processor seconds count all threads of the process, and say "
        "more than the clock where other programs run.",
        "",
        f"    {command}",
        "",
    ]
    if "batch" in parts:
        lines += batch_tables(parts["batch"])
    if "rows" in parts:
        lines += rows_table(parts["rows"], config, mos, 16 + sizes["short_answer"] // 2)
    if "tenants" in parts:
        lines += tenants_table(parts["tenants"], mos, sites)
        lines += ["![Tokens a second and memory against the number of tenants](serving.png)", ""]
    if "swap" in parts:
        lines += swap_table(parts["swap"])
    if "peft" in parts:
        lines += peft_table(parts["peft"])
    return "\n".join(lines)
