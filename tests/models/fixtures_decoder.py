"""A tiny decoder, adapters with all arrays filled, and a plain forward pass to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mos_jax import MoSConfig, create_adapter
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder
from mos_jax.models.rope import inverse_frequencies
from mos_jax.models.tiny import tiny_config, tiny_weights

MOS = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)


def tiny_decoder(remat="products", dtype="float32", seed=0):
    config = tiny_config()
    weights = {k: jnp.asarray(v) for k, v in tiny_weights(config, seed, dtype).items()}
    return Decoder(config, weights, remat)


def filled_adapter(sites, config=MOS, seed=1):
    """An adapter whose trained arrays are all random, so that it changes the base."""
    adapter = create_adapter(config, sites, jax.random.key(seed))
    graphdef, state = nnx.split(adapter)
    rng = np.random.default_rng(seed)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if isinstance(variable, nnx.Param):
            values = rng.normal(0, 0.1, variable[...].shape)
            flat[path] = variable.replace(jnp.asarray(values, jnp.float32))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def tokens_of(decoder, rows=2, length=11, seed=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, decoder.config.vocab_size, (rows, length)), jnp.int32)


def shapes_of(config: DecoderConfig, remat="products"):
    """The decoder as shapes alone: compiles, holds nothing."""

    def build():
        weights = {n: jnp.zeros(s, jnp.float32) for n, s in config.weight_shapes().items()}
        return Decoder(config, weights, remat)

    return jax.eval_shape(build)


def plain_logits(decoder, tokens, factors=None, segments=None, positions=None):
    """One row, one layer after the other, in float64 NumPy: [S] -> [S, V]."""
    c = decoder.config
    w = {name: np.asarray(v[...], np.float64) for name, v in decoder.blocks.items()}
    embed = np.asarray(decoder.embed[...], np.float64)
    tokens = np.asarray(tokens)
    n = len(tokens)
    positions = np.arange(n) if positions is None else np.asarray(positions)
    segments = np.zeros(n) if segments is None else np.asarray(segments)
    windowed = c.is_windowed()

    def linear(x, name, layer):
        y = x @ w[name][layer]
        bias = name.replace("proj", "bias")
        if bias in w:
            y = y + w[bias][layer]
        if factors is not None and name in factors:
            f = factors[name]
            a, b = (np.asarray(v[layer], np.float64) for v in (f.a, f.b))
            y = y + float(f.scale[layer]) * (x @ a.T) @ b
        return y

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.rms_eps) * weight

    def post_norm(x, name, layer):
        return norm(x, w[name][layer]) if c.post_norms else x

    def visible(query, key, layer):
        seen = key <= query and (segments[key] == segments[query] or segments[key] < 0)
        return seen and not (
            windowed[layer] and positions[query] - positions[key] >= (c.window or 0)
        )

    half = c.head_dim // 2

    def turn(x, layer):
        frequency = np.asarray(inverse_frequencies(c, windowed[layer]), np.float64)
        cos, sin = (f(positions[:, None] * frequency) for f in (np.cos, np.sin))
        first, second = x[:, :half], x[:, half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)

    x = embed[tokens] * (c.embed_scale or 1)
    scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
    for k in range(c.num_layers):
        h = norm(x, w["attn_norm"][k])
        q, key, v = (linear(h, name, k) for name in ("q_proj", "k_proj", "v_proj"))
        hidden = np.array([[not visible(i, j, k) for j in range(n)] for i in range(n)])
        heads = []
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            mine, theirs = (slice(i * c.head_dim, (i + 1) * c.head_dim) for i in (head, kv))
            queries, keys = q[:, mine], key[:, theirs]
            if c.qk_norm:
                queries, keys = norm(queries, w["q_norm"][k]), norm(keys, w["k_norm"][k])
            scores = turn(queries, k) @ turn(keys, k).T * scale
            scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, theirs])
        x = x + post_norm(linear(np.concatenate(heads, 1), "o_proj", k), "attn_post_norm", k)
        h = norm(x, w["mlp_norm"][k])
        gate, up = linear(h, "gate_proj", k), linear(h, "up_proj", k)
        if c.activation == "gelu_tanh":
            inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
            gate = gate * (1 + np.tanh(inner)) / 2
        else:
            gate = gate / (1 + np.exp(-gate))
        x = x + post_norm(linear(gate * up, "down_proj", k), "mlp_post_norm", k)
    x = norm(x, np.asarray(decoder.final_norm[...], np.float64))
    return x @ (embed.T if decoder.head is None else np.asarray(decoder.head[...], np.float64))
