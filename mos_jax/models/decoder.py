"""The frozen base: a decoder of the Llama family, as a read-only Flax NNX pytree.

Blocks are stacked and scanned. The base knows `LowRank` factors and no adapter method. Tokens are
flattened to [N, d] before every product: on CPU, XLA's backward pass is much faster so.

Axis legend: B rows, S tokens of a row, N = B * S, L blocks, d model width, H query heads, K key and
value heads, G = H / K, c head width, T slots of a key-value cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mos_jax.adapters.adapter import Frozen, site_key
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest
from mos_jax.models.config import DecoderConfig
from mos_jax.models.rope import rotary_tables, rotate

Factors = Mapping[str, LowRank]
FactorsSource = Factors | Callable[[jax.Array], Factors] | None
Dropout = tuple[jax.Array, jax.Array | float]

# What a block keeps for its backward pass; everything else is cheap to compute again. The values
# are the outputs of the large products, so that none of those runs twice.
SAVED = ("q", "k", "v", "attended", "middle", "gate", "up", "low_rank")
REMAT_POLICIES = ("none", "products", "full")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far: both [L, B, T, K, c]; slot = position."""

    k: jax.Array
    v: jax.Array


class Decoder(nnx.Module):
    """Llama-family decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU.

    Attributes:
      config: its architecture.
      remat: "products" keeps the outputs of large products and computes the rest of a block again
        in the backward pass, "full" keeps only each block's input, "none" leaves it to JAX.
      embed: [V, d].
      blocks: mapping from name to stacked weight, `q_proj` [L, d, H c] and so on (y = x W).
      final_norm: fp32 [d].
      head: [d, V], or None when tied to `embed`.
    """

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, jax.Array], remat: str = "products"
    ):
        if remat not in REMAT_POLICIES:
            raise InputError(f"unknown remat policy {remat!r}; {suggest(remat, REMAT_POLICIES)}")
        self.config = config
        self.remat = remat
        self.embed = Frozen(weights["embed"])
        self.blocks = nnx.Dict(
            {
                name.removeprefix("blocks/"): Frozen(array)
                for name, array in weights.items()
                if name.startswith("blocks/")
            }
        )
        self.final_norm = Frozen(weights["final_norm"])
        self.head = None if config.tied_embeddings else Frozen(weights["head"])

    @property
    def sites(self) -> dict[str, SiteShape]:
        """All sites that an adapter may change."""
        return {name: SiteShape(*shape) for name, shape in self.config.site_shapes().items()}

    def __call__(
        self,
        tokens: jax.Array,
        factors: FactorsSource = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Computes the logits of every position.

        Args:
          tokens: int32 [B, S].
          factors: None for the untouched base; `adapter.factors()` to assemble all blocks before
            the scan; or the method itself, `adapter.factors`, to assemble each block inside it.
          positions: int32 [B, S], of each token in its own text; default 0, 1, 2, ...
          segments: int32 [B, S]; tokens attend only within equal segments, and to no later
            token. All see the tokens of a negative segment, a prefix that they share. Default:
            one segment.
          dropout: a key and a rate, applied to the input of the adapter's branch, one mask for
            every site.

        Returns:
          fp32 [B, S, V].
        """
        hidden = self.hidden(
            tokens, factors, positions=positions, segments=segments, dropout=dropout
        )
        return self.logits(hidden)

    @strict
    def hidden(
        self,
        tokens: jax.Array,
        factors: FactorsSource = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """The normed hidden states before the head, [B, S, d]; arguments as for a call."""
        return self.transform(
            self.embed[...][tokens],
            factors,
            positions=positions,
            segments=segments,
            dropout=dropout,
        )

    @strict
    def transform(
        self,
        embedded: jax.Array,
        factors: FactorsSource = None,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """`hidden` from embedded tokens [B, S, d] instead of tokens."""
        batch, length, _ = embedded.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (batch, length, length))
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]
            mask = mask & (same | (segments[:, None, :] < 0))
        rope = rotary_tables(self.config, positions)

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
            layer, weights, low_rank = scanned
            low_rank = low_rank if assemble is None else assemble(layer)
            project = _Projector(weights, low_rank, _layer_dropout(dropout, layer))
            q, k, v = _queries_keys_values(self.config, project, x, rope)
            q, k, v = (checkpoint_name(y, n) for y, n in ((q, "q"), (k, "k"), (v, "v")))
            x = _add_attention(project, x, attend(q, k, v, mask))
            return _add_mlp(self.config, project, x), None

        if self.remat != "none":
            policy = (
                jax.checkpoint_policies.save_only_these_names(*SAVED)
                if self.remat == "products"
                else jax.checkpoint_policies.nothing_saveable
            )
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x = embedded.reshape(batch * length, self.config.d_model)
        assemble, low_rank = self._split_source(factors)
        x, _ = jax.lax.scan(body, x, (self._layers(), self._weights(), low_rank))
        x = rms_norm(x, self.final_norm[...], self.config.rms_eps)
        return x.reshape(batch, length, self.config.d_model)

    @strict
    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [..., d] -> fp32 [..., V]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.head is None:
            weight, axis = self.embed[...], 1
        else:
            weight, axis = self.head[...], 0
        logits = jax.lax.dot_general(
            flat, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
        )
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A key-value cache of `slots` positions for `batch` rows, in the base's dtype."""
        c = self.config
        shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
        return Cache(jnp.zeros(shape, self.embed.dtype), jnp.zeros(shape, self.embed.dtype))

    @strict
    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache, factors: FactorsSource = None
    ) -> tuple[jax.Array, Cache]:
        """Runs new tokens against the cache and enters them into it.

        Args:
          tokens: int32 [B, S]; S = 1 when decoding.
          positions: int32 [B, S], the slot of each token. Slots up to a token's own are visible
            to it, so filler goes to slots that later tokens will overwrite.
          cache: what came before.
          factors: as for a call.

        Returns:
          Normed hidden states [B, S, d] and the new cache.
        """
        batch, length = tokens.shape
        slots = cache.k.shape[2]
        mask = jnp.arange(slots, dtype=jnp.int32)[None, None, :] <= positions[:, :, None]
        rope = rotary_tables(self.config, positions)
        rows = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], positions.shape)

        def body(carry: tuple[jax.Array, Cache], scanned: Any) -> tuple[Any, None]:
            x, cache = carry
            layer, weights, low_rank = scanned
            low_rank = low_rank if assemble is None else assemble(layer)
            project = _Projector(weights, low_rank, None)
            q, k, v = _queries_keys_values(self.config, project, x, rope)
            cache = Cache(
                cache.k.at[layer, rows, positions].set(k),
                cache.v.at[layer, rows, positions].set(v),
            )
            x = _add_attention(project, x, attend(q, cache.k[layer], cache.v[layer], mask))
            return (_add_mlp(self.config, project, x), cache), None

        x = self.embed[...][tokens].reshape(batch * length, self.config.d_model)
        assemble, low_rank = self._split_source(factors)
        scanned = (self._layers(), self._weights(), low_rank)
        (x, cache), _ = jax.lax.scan(body, (x, cache), scanned)
        x = rms_norm(x, self.final_norm[...], self.config.rms_eps)
        return x.reshape(batch, length, self.config.d_model), cache

    def _layers(self) -> jax.Array:
        return jnp.arange(self.config.num_layers, dtype=jnp.int32)

    def _weights(self) -> dict[str, jax.Array]:
        return {name: variable[...] for name, variable in self.blocks.items()}

    def _split_source(
        self, factors: FactorsSource
    ) -> tuple[Callable[[jax.Array], Factors] | None, Factors]:
        if factors is None:
            return None, {}
        if callable(factors):
            return factors, {}
        sites = self.sites
        for name, low_rank in factors.items():
            if name not in sites:
                raise InputError(f"factors for unknown site {name!r}; {suggest(name, sites)}")
            site, widths = sites[name], (low_rank.a.shape[-1], low_rank.b.shape[-1])
            layers = low_rank.layers
            depth_fits = (
                low_rank.a.shape[0] == site.num_layers
                if layers is None
                else len(layers) == low_rank.a.shape[0] and layers[-1] < site.num_layers
            )
            if widths != (site.d_in, site.d_out) or not depth_fits:
                raise InputError(
                    f"factors of {name!r} are for {low_rank.a.shape[0]} blocks of "
                    f"{widths[0]} -> {widths[1]}, the base has {site.num_layers} of "
                    f"{site.d_in} -> {site.d_out}"
                )
        depth = self.config.num_layers
        return None, {name: f.for_all_layers(depth) for name, f in factors.items()}


class _Projector:
    """The linear layers of one block, each with its adapter's branch where there is one."""

    def __init__(
        self,
        weights: Mapping[str, jax.Array],
        factors: Factors,
        dropout: Callable[[str, jax.Array], jax.Array] | None,
    ):
        self.weights = weights
        self._factors = factors
        self._dropout = dropout

    def __call__(self, x: jax.Array, *names: str) -> list[jax.Array]:
        """Applies the layers `names` to the same input: [N, d_in] -> [N, d_out] each."""
        outputs = [x @ self.weights[name] for name in names]
        adapted = [i for i, name in enumerate(names) if name in self._factors]
        if self._dropout is not None:
            for i in adapted:
                branch = self._factors[names[i]].apply(self._dropout(names[i], x))
                outputs[i] = outputs[i] + branch
            return outputs
        if adapted:
            branches = apply_together(x, [self._factors[names[i]] for i in adapted])
            for i, branch in zip(adapted, branches, strict=True):
                outputs[i] = outputs[i] + branch
        return outputs


def apply_together(x: jax.Array, factors: list[LowRank]) -> list[jax.Array]:
    """`[f.apply(x) for f in factors]` with one product for all A's.

    Products with so few rows are bound by reading `x`; stacking the A's of the layers that share
    an input reads it once, forward and backward.
    """
    stacked = jnp.concatenate([f.a for f in factors]).astype(x.dtype)
    scale = jnp.concatenate([jnp.broadcast_to(f.scale, (f.rank,)) for f in factors])
    middle = jax.lax.dot_general(
        x, stacked, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    middle = checkpoint_name((middle * scale[None, :]).astype(x.dtype), "low_rank")
    outputs, start = [], 0
    for f in factors:
        part = jax.lax.slice_in_dim(middle, start, start + f.rank, axis=1)
        outputs.append(part @ f.b.astype(x.dtype))
        start += f.rank
    return outputs


def _layer_dropout(
    dropout: Dropout | None, layer: jax.Array
) -> Callable[[str, jax.Array], jax.Array] | None:
    if dropout is None:
        return None
    key, rate = dropout
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    key = jax.random.fold_in(key, layer)

    return lambda name, x: keep_fraction(site_key(key, name, "dropout"), keep, x)


def keep_fraction(key: jax.Array, keep: jax.Array, x: jax.Array) -> jax.Array:
    """Dropout (Srivastava et al. 2014): keeps each entry of x with probability `keep`, scaled."""
    mask = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def _queries_keys_values(
    config: DecoderConfig, project: _Projector, x: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    normed = rms_norm(x, project.weights["attn_norm"], config.rms_eps)
    q, k, v = project(normed, "q_proj", "k_proj", "v_proj")
    batch, length = rope[0].shape[:2]
    q, k, v = (y.reshape(batch, length, -1, config.head_dim) for y in (q, k, v))
    return rotate(q, rope), rotate(k, rope), v


def _add_attention(project: _Projector, x: jax.Array, attended: jax.Array) -> jax.Array:
    attended = checkpoint_name(attended.reshape(x.shape[0], -1), "attended")
    (output,) = project(attended, "o_proj")
    return checkpoint_name(x + output, "middle")


def _add_mlp(config: DecoderConfig, project: _Projector, x: jax.Array) -> jax.Array:
    normed = rms_norm(x, project.weights["mlp_norm"], config.rms_eps)
    gate, up = project(normed, "gate_proj", "up_proj")
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    (output,) = project(jax.nn.silu(gate) * up, "down_proj")
    return x + output


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm (arXiv 1910.07467) over the last axis of [N, d], computed in fp32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight[None, :]).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245), softmax in fp32.

    Args:
      q: [B, S, H, c].
      k: [B, T, K, c].
      v: [B, T, K, c].
      mask: bool [B, S, T]; True where a query may see a key. Every query must see one.

    Returns:
      [B, S, H, c].
    """
    batch, length, heads, width = q.shape
    slots, shared = k.shape[1], k.shape[2]
    groups = heads // shared
    # One product for each key head, its queries stacked: on CPU twice as fast as einsum's layout.
    q = q.reshape(batch, length, shared, groups, width).transpose(0, 2, 3, 1, 4)
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch * shared, groups * length, width)
    k = k.transpose(0, 2, 1, 3).reshape(batch * shared, slots, width)
    v = v.transpose(0, 2, 1, 3).reshape(batch * shared, slots, width)
    scores = jnp.einsum("bqc,btc->bqt", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, shared, groups, length, slots)
    scores = jnp.where(mask[:, None, None], scores, jnp.float32(-1e30))
    # Divided after the product with v, which is smaller than the scores. The shift cancels out.
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - shift)
    total = jnp.sum(weights, axis=-1).reshape(batch * shared, groups * length, 1)
    weights = weights.astype(v.dtype).reshape(batch * shared, groups * length, slots)
    attended = jnp.einsum("bqt,btc->bqc", weights, v, preferred_element_type=jnp.float32) / total
    attended = attended.reshape(batch, shared, groups, length, width).transpose(0, 3, 1, 2, 4)
    return attended.reshape(batch, length, heads, width).astype(v.dtype)
