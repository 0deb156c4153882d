"""The frozen base: one decoder for all families, as a read-only Flax NNX pytree.

Blocks are stacked and scanned. The base knows `LowRank` factors and no adapter method. Tokens are
flattened to [N, d] before every product: on CPU, XLA's backward pass is much faster so.

Axis legend: B rows, S tokens of a row, N = B * S, L blocks, d model width, H query heads, K key and
value heads, G = H / K, c head width, T slots of a key-value cache, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mos_jax.adapters.adapter import Frozen
from mos_jax.adapters.bits import dtype_at_rest
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.strictness import strict
from mos_jax.errors import InputError, suggest
from mos_jax.models.attention import IMPLEMENTATIONS, Attend, choose_attention, implementation
from mos_jax.models.blocks import add_attention, add_mlp, queries_keys_values, rms_norm
from mos_jax.models.config import DecoderConfig
from mos_jax.models.factors import check_block, check_blocks
from mos_jax.models.head import LOGITS_MIB, head_logits, score_targets
from mos_jax.models.kv_cache import Cache, attend_cached
from mos_jax.models.projection import Dropout, Factors, Projector, layer_dropout
from mos_jax.models.quantized import Weight, dequantize, scheme_of
from mos_jax.models.remat import REMAT_POLICIES, remat_policy
from mos_jax.models.sharding import (
    DATA,
    FSDP,
    ROWS,
    TENSOR,
    constrain,
    constrain_factors,
    gather_factors,
    key_head_copies,
    per_shard,
)
from mos_jax.models.windows import layer_flags, layer_reach, layer_ropes, layer_views

FactorsSource = Factors | Callable[[jax.Array], Factors] | None


def check_computation(remat: str, attention: str, logits_mib: float) -> None:
    """Raises InputError for arguments of `Decoder` that no base can have."""
    if remat not in REMAT_POLICIES:
        raise InputError(f"unknown remat policy {remat!r}; {suggest(remat, REMAT_POLICIES)}")
    if attention not in IMPLEMENTATIONS:
        raise InputError(f"unknown attention {attention!r}; {suggest(attention, IMPLEMENTATIONS)}")
    if not (math.isfinite(logits_mib) and logits_mib >= 0):
        raise InputError(f"logits_mib must be 0 or more, got {logits_mib!r}")


class Decoder(nnx.Module):
    """Decoder with grouped-query attention, RoPE, RMSNorm and a gated MLP.

    The config says what a family adds to Llama: biases, norms, windows, scales. What it does not
    ask for leaves no trace in the compiled program.

    Attributes:
      config: its architecture.
      remat: "products" keeps the outputs of large products and computes the rest of a block again
        in the backward pass, "full" keeps only each block's input, "none" leaves it to JAX.
      embed: [V, d].
      blocks: mapping from name to stacked weight, `q_proj` [L, d, H c] and so on (y = x W);
        those of sites may be quantised, see `quantized.py`: read their numbers with `weight`.
      final_norm: fp32 [d].
      head: [d, V], or None when tied to `embed`.
      mesh: of devices that the weights and the computation are divided over, see `sharding.py`;
        None: one device.
      attention: which attention a whole text goes through, see `choose_attention`.
      logits_mib: how many MiB of logits a device may hold at one time while `score` computes a
        loss; 0: any.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Weight],
        remat: str = "products",
        mesh: Mesh | None = None,
        attention: str = "auto",
        logits_mib: float = LOGITS_MIB,
    ):
        check_computation(remat, attention, logits_mib)
        self.config = config
        self.remat = remat
        self.mesh = mesh
        self.attention = attention
        self.logits_mib = logits_mib
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
    def weights(self) -> dict[str, Any]:
        """All weights by name, as `Decoder` takes them; see `weight` for the numbers of one."""
        named = {f"blocks/{name}": variable[...] for name, variable in self.blocks.items()}
        named |= {"embed": self.embed[...], "final_norm": self.final_norm[...]}
        return named if self.head is None else named | {"head": self.head[...]}

    @property
    def sites(self) -> dict[str, SiteShape]:
        """All sites that an adapter may change."""
        return {name: SiteShape(*shape) for name, shape in self.config.site_shapes().items()}

    @property
    def quantization(self) -> str | None:
        """How the weights of the sites are stored: a name in `SCHEMES`, or None: as numbers."""
        return scheme_of(self.blocks["q_proj"][...])

    def weight(self, name: str) -> jax.Array:
        """The numbers of a weight, by its name in `DecoderConfig.weight_shapes`.

        A quantised one is computed from its codes, all blocks at once, in the base's dtype.
        """
        return dequantize(self.weights[name], self.embed.dtype)

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
            Any callable of a block's index, int32 [], may stand for it; the factors that it
            returns may have a leading axis B, an adapter for each row (see `AdapterBank`).
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
            self.embed_tokens(tokens),
            factors,
            positions=positions,
            segments=segments,
            dropout=dropout,
        )

    @strict
    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens, int32 [B, S] -> [B, S, d], scaled where the family scales them."""
        # With the weight divided along d, rows are gathered to look tokens up, not the weight.
        embedded = self.embed[...][constrain(tokens, self.mesh, DATA, None)]
        embedded = constrain(embedded, self.mesh, DATA, None, FSDP)
        embedded = constrain(embedded, self.mesh, ROWS, None, None)
        scale = self.config.embed_scale
        return embedded if scale is None else embedded * jnp.asarray(scale, embedded.dtype)

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
        view = layer_views(self.config, positions, mask, positions)
        chosen = choose_attention(
            self.attention, self.mesh, embedded.dtype, self.config.head_dim, length
        )
        attend_to = implementation(chosen, self.config.query_scale)

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
            layer, windowed, weights, low_rank = scanned
            mask, rope = view(windowed)
            low_rank = low_rank if assemble is None else assemble(layer)
            x = constrain(x, self.mesh, ROWS, None)
            project = self._projector(weights, low_rank, layer_dropout(dropout, layer))
            q, k, v = queries_keys_values(self.config, project, x, rope)
            attended = self._attend(q, k, v, mask, attend_to)
            x = add_attention(self.config, project, x, attended)
            return add_mlp(self.config, project, x), None

        if self.remat != "none":
            policy = remat_policy(self.remat, chosen)
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x = embedded.reshape(batch * length, self.config.d_model)
        assemble, low_rank = self._split_source(factors, batch)
        x, _ = jax.lax.scan(body, x, (*self._layers(), low_rank))
        x = rms_norm(x, self.final_norm[...], self.config.rms_eps)
        return x.reshape(batch, length, self.config.d_model)

    @strict
    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: [..., d] -> fp32 [..., V]."""
        logits = head_logits(hidden.reshape(-1, hidden.shape[-1]), *self._head(), self.mesh)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    @strict
    def score(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a loss needs of `logits`, of which no more exist at a time than `logits_mib`.

        Args:
          hidden: [..., d].
          targets: int32 [...].

        Returns:
          fp32 [...], the targets' negative log likelihood in nats; and bool [...], whether each
          is the most likely token.
        """
        flat = constrain(hidden.reshape(-1, hidden.shape[-1]), self.mesh, ROWS, None)
        weight, axis = self._head()
        limit = self.logits_mib * 2**20
        found = score_targets(flat, targets.reshape(-1), weight, axis, self.mesh, limit)
        return found[0].reshape(targets.shape), found[1].reshape(targets.shape)

    def _head(self) -> tuple[jax.Array, int]:
        """The weight of the head, and which of its axes is the vocabulary."""
        return (self.embed[...], 0) if self.head is None else (self.head[...], 1)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A key-value cache of `slots` positions for `batch` rows, in the base's dtype."""
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads, slots, c.head_dim)
        dtype = dtype_at_rest(self.embed.dtype)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @strict
    def extend(
        self,
        tokens: jax.Array,
        start: jax.Array,
        cache: Cache,
        factors: FactorsSource = None,
        *,
        row: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs new tokens against the cache and enters them into it.

        Args:
          tokens: int32 [B, S]; S = 1 when decoding.
          start: int32 [B], the slot of each row's first token; the others follow it. A token sees
            its own slot and those before it, so filler behind a text goes to slots that later
            tokens will overwrite. From T on, a row takes no part: it enters nothing, and what is
            returned of it means nothing.
          cache: what came before.
          factors: as for a call.
          row: int32 []; with it B = 1, and the tokens are of this row of the cache.

        Returns:
          Normed hidden states [B, S, d] and the new cache.
        """
        batch, length = tokens.shape
        seen = jnp.where(start < cache.slots, start, jnp.int32(0))
        positions = seen[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        ropes = layer_ropes(self.config, positions)
        first = jnp.int32(0) if row is None else row

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            layer, windowed, weights, low_rank = scanned
            low_rank = low_rank if assemble is None else assemble(layer)
            project = self._projector(weights, low_rank, None)
            q, k, v = queries_keys_values(self.config, project, x, ropes(windowed))
            reach = layer_reach(self.config, windowed)
            attended = self._attend_cached(q, k, v, cache, layer, first, seen, reach)
            x = add_attention(self.config, project, x, attended)
            return add_mlp(self.config, project, x), (k, v)

        x = self.embed_tokens(tokens).reshape(batch * length, self.config.d_model)
        assemble, low_rank = self._split_source(factors, batch)
        # The cache is read in the scan and written once behind it, for all layers.
        x, (k, v) = jax.lax.scan(body, x, (*self._layers(), low_rank))
        x = rms_norm(x, self.final_norm[...], self.config.rms_eps)
        return x.reshape(batch, length, self.config.d_model), cache.enter(k, v, start, row)

    def _projector(
        self,
        weights: Mapping[str, Any],
        low_rank: Factors,
        dropout: Callable[[str, jax.Array], jax.Array] | None,
    ) -> Projector:
        if self.mesh is not None:
            low_rank = {n: gather_factors(f, self.mesh, n) for n, f in low_rank.items()}
        return Projector(weights, low_rank, dropout, self.mesh)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, how: Attend
    ) -> jax.Array:
        """Attention; on a mesh every device has its rows and its heads, if `tensor` divides H."""
        if self.mesh is not None:
            copies = key_head_copies(q.shape[2], k.shape[2], self.mesh.shape)
            if copies > 1:
                k, v = (jnp.repeat(y, copies, axis=2) for y in (k, v))
        heads = (ROWS, None, TENSOR, None)
        return per_shard(how, self.mesh, heads, heads, heads, (ROWS, None, None))(q, k, v, mask)

    def _attend_cached(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Cache,
        layer: jax.Array,
        row: jax.Array,
        start: jax.Array,
        reach: jax.Array,
    ) -> jax.Array:
        """`attend_cached`; every device has its rows, and its heads if `tensor` divides K.

        Elsewhere it is whole: the cache is, and reading it is most of the work.
        """
        heads, held = (ROWS, None, TENSOR, None), (None, ROWS, TENSOR, None, None)

        own = functools.partial(attend_cached, scale=self.config.query_scale)
        wanted = (heads, heads, heads, held, held, (), (), (ROWS,), ())
        divided = per_shard(own, self.mesh, *wanted)
        return divided(q, k, v, cache.k, cache.v, layer, row, start, reach)

    def _layers(self) -> tuple[jax.Array, jax.Array | None, dict[str, Weight]]:
        """Index, window flag and weights of the layers, to scan over."""
        index = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        weights: dict[str, Weight] = {n: variable[...] for n, variable in self.blocks.items()}
        return index, layer_flags(self.config), weights

    def _split_source(
        self, factors: FactorsSource, rows: int
    ) -> tuple[Callable[[jax.Array], Factors] | None, Factors]:
        if factors is None:
            return None, {}
        if callable(factors):
            source = factors

            def assemble(layer: jax.Array) -> Factors:
                assembled = source(layer)
                for name, low_rank in assembled.items():
                    check_block(self.sites, name, low_rank, rows)
                return assembled

            return assemble, {}
        for name, low_rank in factors.items():
            check_blocks(self.sites, name, low_rank)
        depth = self.config.num_layers
        every = {name: f.for_all_layers(depth) for name, f in factors.items()}
        return None, {name: constrain_factors(f, self.mesh, name) for name, f in every.items()}
