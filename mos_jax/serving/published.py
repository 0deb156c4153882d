"""S-LoRA's published measurement, beside what its device would allow at most.

Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv 2311.03285: Llama-7B in
fp16 on an A100 of 80 GB, adapters of rank 8 on the four projections of attention (setting S1), all
held in host memory; requests with prompts and answers of 8 to 512 tokens each, uniformly, offered
at 10 a second. The figures are those of its repository (S-LoRA/S-LoRA, benchmarks/paper/synthetic/
slora/synthetic_num_adapters_a100-80_S1_slora_table.jsonl), which the paper rounds.
"""

from __future__ import annotations

import dataclasses

from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape, select_sites
from mos_jax.models.known import known_config
from mos_jax.serving.capacity import base_bytes, in_gib, pool_bytes
from mos_jax.serving.roofline import find_device, rows_that_fit, step_of, tenant_forms

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8
SHORTEST, LONGEST = 8, 512


@dataclasses.dataclass(frozen=True)
class Measured:
    """S-LoRA with some number of adapters.

    Attributes:
      adapters: known to the server.
      requests: answered a second.
      latency: seconds from request to the end of its answer, mean.
      first_token: seconds to the first token, mean.
    """

    adapters: int
    requests: float
    latency: float
    first_token: float


S_LORA = (
    Measured(5, 8.046, 20.84, 0.599),
    Measured(100, 7.992, 21.61, 0.619),
    Measured(1000, 7.641, 25.93, 1.898),
    Measured(2000, 7.607, 26.22, 2.019),
)


def compare_s_lora(equivalent_rank: int = 2, reserve: float = 0.1) -> list[str]:
    """What MoS tenants of the same active rank on the same sites would come to there, as lines.

    Args:
      equivalent_rank: e of MoS; its active rank is S-LoRA's.
      reserve: share of the memory left for programs and activations.
    """
    config, device = known_config("llama2-7b"), find_device("a100-80gb")
    every = {name: SiteShape(*shape) for name, shape in config.site_shapes().items()}
    sites = select_sites(every, ATTENTION)
    mos = MoSConfig(equivalent_rank, RANK, shards_per_vector=2)
    bare, _, _, gathered, lora, _ = tenant_forms(mos, sites, "bfloat16")
    pools, tables = pool_bytes(mos, sites, "bfloat16")
    mean = (SHORTEST + LONGEST) / 2
    most = S_LORA[-1]
    tokens, flight = most.requests * mean, most.requests * most.latency
    # A row that is being decoded has its prompt, and on average half of its answer.
    seen = round(1.5 * mean)
    rows = round(flight)
    free = device.memory - int(reserve * device.memory) - base_bytes(config, "bfloat16")
    lines = [
        f"S-LoRA, {most.adapters:,} adapters of rank {RANK} on q, k, v and o, A100 80 GB: "
        f"{most.requests:.2f} requests/s, {most.latency:.1f} s each, first token after "
        f"{most.first_token:.2f} s",
        f"  answers of {mean:.0f} tokens on average -> {tokens:,.0f} tokens/s; "
        f"{most.requests:.2f} x {most.latency:.1f} = {flight:.0f} requests in the server at a "
        "time, those that wait included",
        f"  with {S_LORA[0].adapters} adapters {S_LORA[0].requests:.2f} requests/s, first token "
        f"after {S_LORA[0].first_token:.2f} s: {1 - most.requests / S_LORA[0].requests:.1%} less "
        f"throughput and {most.first_token / S_LORA[0].first_token:.1f} times the wait from "
        f"{most.adapters / S_LORA[0].adapters:.0f} times the adapters",
        f"One adapter: LoRA {lora.held:,} bytes, MoS e={equivalent_rank} r={RANK} {pools:,} "
        f"(tables of {tables:,} once for all)",
    ]
    for name, form in (("LoRA", lora), (f"MoS e={equivalent_rank}", gathered)):
        total = most.adapters * form.held
        fits = rows_that_fit(config, device, form, most.adapters, seen, reserve)
        lines.append(
            f"  {most.adapters:,} of {name}: {in_gib(total)} of the {in_gib(free)} beside the base "
            f"and {reserve:.0%} reserve; the rest holds {fits:,} rows of {seen} positions"
            + (", with their factors" if form.assembled else "")
        )
    lines.append(
        f"A step of {rows} rows of {seen} positions (a prompt and half an answer), all of "
        f"different tenants, at "
        f"{device.bandwidth / 1e12:.3f} TB/s:"
    )
    for name, way in (("bare base", bare), ("read once", lora), ("gathered", gathered)):
        step = step_of(config, way, rows, seen, sites=sites)
        most_tokens = step.tokens_per_second(device)
        lines.append(
            f"  {name:<10} {step.base:,} base + {step.cache:,} cache + {step.adapters:,} "
            f"adapters = {1e3 * step.seconds(device):.1f} ms -> at most {most_tokens:,.0f} "
            f"tokens/s, of which S-LoRA's {tokens:,.0f} are {tokens / most_tokens:.0%}"
        )
    brought = 1e3 / device.link
    lines.append(
        f"An adapter that is not on the device comes at {device.link / 1e9:.0f} GB/s: LoRA "
        f"{lora.held * brought:.2f} ms, MoS {pools * brought:.2f} ms; {most.adapters:,} MoS "
        "tenants lie there and need not come"
    )
    return lines
