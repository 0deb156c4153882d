"""VB-LoRA, low-rank factors from one vector bank (Li et al., NeurIPS 2024, arXiv 2405.15179).

Every rank vector of every A and B is cut into sub-vectors of length b. Each sub-vector is a mixture
of k vectors of one bank [H, b] that serves the whole model: the k largest of its own H logits pick
them, and the softmax over those k weighs them.

Axis legend: L blocks, r rank, H vectors in the bank, b length of each, k picked for a sub-vector,
h = d_in, o = d_out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mos_jax.adapters.adapter import (
    Adapter,
    AdapterConfig,
    choose_blocks,
    require_integer,
    require_positive,
    site_key,
)
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import keep_ranks, missing_rows, zero_tails
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError

BANK_BOUND = 0.02
# The paper writes N(0, 0.01), a variance; the authors' code in PEFT has this standard deviation.
LOGITS_STD = 0.1


@dataclasses.dataclass(frozen=True)
class VBLoRAConfig(AdapterConfig):
    """Configuration of VB-LoRA (arXiv 2405.15179). The scale is 1.

    Attributes:
      rank: r, rank vectors of every site that `rank_pattern` does not name.
      num_vectors: H, vectors in the bank. Each sub-vector trains H logits, so that this decides
        the trained parameters far more than the stored ones.
      vector_length: b; divides every adapted width. The paper uses 256 on LLaMA 2; 64 divides the
        widths of SmolLM2-135M too, as do 96 and 192.
      top_k: k, vectors that a sub-vector is mixed from.
      logits_rate_ratio: learning rate of the logits as a multiple of the bank's; the paper trains
        them at 1e-2 and 1e-3.
    """

    method: ClassVar[str] = "vb_lora"
    size_field: ClassVar[str] = "num_vectors"
    no_pattern: ClassVar[Mapping[str, str]] = {
        "alpha_pattern": "VB-LoRA has no alpha; the scale is 1 and the bank sets the size"
    }

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 64
    top_k: int = 2
    logits_rate_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Checks the fields. Raises InputError."""
        super().__post_init__()
        for field in ("rank", "num_vectors", "vector_length", "top_k"):
            require_integer("vb_lora", field, getattr(self, field), 1)
        require_positive("vb_lora", "logits_rate_ratio", self.logits_rate_ratio)
        if self.top_k > self.num_vectors:
            raise InputError(
                f"vb_lora: top_k={self.top_k} must be at most num_vectors={self.num_vectors}"
            )

    def rate_ratios(self) -> Mapping[str, float]:
        """See base class."""
        return {"logits_a": self.logits_rate_ratio, "logits_b": self.logits_rate_ratio}

    def check_widths(self, sites: Sites) -> None:
        """Raises InputError if b does not divide a width."""
        for name, site in check_sites(sites).items():
            for width in ("d_in", "d_out"):
                if getattr(site, width) % self.vector_length:
                    raise InputError(
                        f"vb_lora: vector_length={self.vector_length} does not divide "
                        f"{width}={getattr(site, width)} of {name!r}"
                    )

    def build(self, sites: Sites, key: jax.Array) -> VBLoRA:
        """See base class."""
        return VBLoRA(self, sites, key)


@strict
def admix(bank: jax.Array, logits: jax.Array, top_k: int) -> jax.Array:
    """Mixes rank vectors from the bank (the paper's top-k admixture module).

    The gradient reaches the logits of the picked vectors and no others; the choice itself has none.

    Args:
      bank: fp32 [H, b].
      logits: fp32 [..., n, H], of the n sub-vectors of a vector; any leading axes.
      top_k: k.

    Returns:
      fp32 [..., n * b].
    """
    picked, rows = jax.lax.top_k(logits, top_k)
    weights = jax.nn.softmax(picked, axis=-1)
    vectors = bank.at[rows].get(mode="promise_in_bounds")
    mixed = jnp.sum(weights[..., None] * vectors, axis=-2)
    return mixed.reshape(*logits.shape[:-2], logits.shape[-2] * bank.shape[1])


class VBLoRA(Adapter):
    """The bank of the whole model, and logits by site type; VB-LoRA (arXiv 2405.15179).

    A and B are drawn from one bank, so neither can be zero while the other is not: step 0 is near
    the base, not the base itself.

    Attributes:
      bank: nnx.Param fp32 [H, b], U(-0.02, 0.02); belongs to no site type.
      logits_a: nnx.Param fp32 [L, r, h / b, H], normal with standard deviation 0.1, and zero in
        the rows beyond a block's rank.
      logits_b: nnx.Param fp32 [L, r, o / b, H], likewise.
    """

    config: VBLoRAConfig

    def __init__(self, config: VBLoRAConfig, sites: Sites, key: jax.Array):
        config.check_widths(sites)
        super().__init__(config, sites)
        # No site type has an empty name, so this key is no site's.
        bank_key, shape = site_key(key, "", "bank"), (config.num_vectors, config.vector_length)
        self.bank = nnx.Param(
            jax.random.uniform(bank_key, shape, jnp.float32, -BANK_BOUND, BANK_BOUND)
        )
        self.logits_a: nnx.Dict = nnx.Dict()
        self.logits_b: nnx.Dict = nnx.Dict()
        for name, site in self.sites.items():
            for part, logits, width in (
                ("logits_a", self.logits_a, site.d_in),
                ("logits_b", self.logits_b, site.d_out),
            ):
                pieces = width // config.vector_length
                ranks = self.site_ranks[name]
                shape_l = (site.num_layers, max(ranks), pieces, config.num_vectors)
                noise = jax.random.normal(site_key(key, name, part), shape_l, jnp.float32)
                logits[name] = nnx.Param(zero_tails(LOGITS_STD * noise, ranks))

    @strict
    def site_factors(self, name: str, layer: jax.Array | int | None = None) -> LowRank:
        """See base class."""
        bank, top_k = self.bank[...], self.config.top_k
        index, scale, layers = choose_blocks(self.sites[name], layer, self.site_scales[name])
        a = admix(bank, self.logits_a[name][index], top_k)
        b = admix(bank, self.logits_b[name][index], top_k)
        return keep_ranks(LowRank(a, b, scale, layers), self.site_ranks[name], index)

    def padded_rows(self, part: str, name: str) -> int:
        """See base class."""
        own = part in ("logits_a", "logits_b")
        return missing_rows(self.site_ranks[name]) if own else 0

    def count_served(self) -> int:
        """Values of the stored form: the bank, and k indices and k - 1 weights a sub-vector.

        The paper counts parameters like this, an index as one value and the last weight as what is
        missing to 1; it is tens to hundreds of times less than what is trained. A server needs no
        more. The adapter on disk keeps all logits, so that training can go on.
        """
        b, k = self.config.vector_length, self.config.top_k
        pieces = sum(
            sum(self.site_ranks[name]) * (site.d_in // b + site.d_out // b)
            for name, site in self.sites.items()
        )
        return self.config.num_vectors * b + pieces * (2 * k - 1)

    def summary(self) -> dict[str, Any]:
        """See base class; `stored_parameters` is `count_served`, the paper's count."""
        return {**super().summary(), "stored_parameters": self.count_served()}
