"""Every implementation of attention gives what `attend` gives, or is refused with the reason."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mos_jax import InputError, load_base
from mos_jax.distributed.mesh import make_mesh, resolve_sizes
from mos_jax.distributed.partition import Placement
from mos_jax.models import attention
from mos_jax.models.attention import attend, choose_attention, implementation
from mos_jax.models.decoder import Decoder
from mos_jax.models.tiny import tiny_config, tiny_weights
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_families import FAMILY_FIELDS, family_decoder

ROWS, LENGTH = 2, 12
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 0], [*range(7), *range(5)]], np.int32)
# A prefix that is shared, two texts, and filler; then two texts.
SEGMENTS = np.array([[-1] * 3 + [1] * 3 + [2] * 4 + [0] * 2, [1] * 7 + [2] * 5], np.int32)


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(ROWS, LENGTH, heads, 8)) for heads in (4, 2, 2))
    mask = rng.random((ROWS, LENGTH, LENGTH)) < 0.5
    mask |= np.eye(LENGTH, dtype=bool)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(mask)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_xla_gives_the_values_and_gradients_of_attend_under_any_mask(dtype, scale):
    *inputs, mask = arrays(dtype)

    def run(how):
        def total(q, k, v):
            out = how(q, k, v, mask)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*inputs)

    ours = run(lambda q, k, v, mask: attend(q, k, v, mask, scale))
    theirs = run(implementation("xla", scale))
    share = 1e-5 if dtype == jnp.float32 else 2**-6
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= share * np.abs(b).max()


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_every_family_computes_the_same_with_either(family):
    """Segments, a shared prefix, filler, windows by position, scales and norms of heads."""
    model = family_decoder(family)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (ROWS, LENGTH)), jnp.int32)
    factors = filled_adapter(model.sites).factors()

    def run(name):
        other = Decoder(model.config, model.weights, attention=name)

        def total(factors):
            out = other.hidden(tokens, factors, positions=POSITIONS, segments=SEGMENTS)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(factors)

    for a, b in zip(*(jax.tree.leaves(run(name)) for name in ("grouped", "xla")), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_auto_is_cudnn_only_where_all_it_needs_is_there(monkeypatch):
    assert choose_attention("auto", None, "bfloat16", 64, 128) == "grouped"
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "cuda")
    assert choose_attention("auto", None, "bfloat16", 64, 128) == "cudnn"
    assert choose_attention("cudnn", None, "float16", 128) == "cudnn"
    for dtype, width, length, words in (
        ("float32", 64, 128, "computes in bfloat16, and the base's dtype is float32"),
        ("bfloat16", 256, 128, "at most 128 wide, by 8, and those of the base have 256"),
        ("bfloat16", 12, 128, "at most 128 wide, by 8, and those of the base have 12"),
        ("bfloat16", 64, 127, "rows of an even number of tokens .* got 127"),
    ):
        assert choose_attention("auto", None, dtype, width, length) == "grouped"
        with pytest.raises(InputError, match=f"'cudnn' .*{words}"):
            choose_attention("cudnn", None, dtype, width, length)


def test_what_cannot_be_had_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("mos_jax.models.base.place", None)
    with pytest.raises(InputError, match=r"'cudnn' needs an NVIDIA GPU, and the devices are 'cpu'"):
        load_base("tiny-random", "bfloat16", attention="cudnn")
    with pytest.raises(InputError, match=r"unknown attention 'flash'; .*Known: auto, cudnn"):
        load_base("tiny-random", attention="flash")
    with pytest.raises(InputError, match="unknown remat policy 'all'"):
        load_base("tiny-random", remat="all")
    with pytest.raises(InputError, match="mask must be bool"):
        attend(*arrays()[:3], jnp.zeros((ROWS, LENGTH, LENGTH)))


def test_cudnn_is_lowered_for_cuda_with_its_kernels_once_each(monkeypatch):
    """As far as a machine without a GPU can go: the program for CUDA, which nothing has run."""
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "cuda")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    base = load_base("tiny-random", "bfloat16", attention="auto")
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)

    def total(factors):
        out = base.model.hidden(tokens, factors, positions=POSITIONS, segments=SEGMENTS)
        return jnp.sum(out.astype(jnp.float32))

    factors = filled_adapter(base.sites).factors()
    traced = jax.jit(jax.grad(total)).trace(factors)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmha(\w+)\(", text)
    # Once in the scan over layers and once in that of the backward pass: nothing runs twice.
    assert sorted(calls) == ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"]


@pytest.mark.parametrize("name", ["grouped", "xla"])
def test_on_a_mesh_every_device_attends_with_its_own_rows_and_heads(name):
    model = family_decoder("gemma3")
    placement = Placement(make_mesh(resolve_sizes(1, 2, 2, jax.device_count())), 1 << 24)
    shardings = placement.weights()
    placed = {n: jax.device_put(w, shardings(n, w.shape)) for n, w in model.weights.items()}
    divided = Decoder(model.config, placed, mesh=placement.mesh, attention=name)
    tokens = jnp.asarray(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH), jnp.int32)

    @jax.jit
    def run(model):
        return model.hidden(tokens, positions=POSITIONS, segments=SEGMENTS)

    expected = run(model)
    assert np.abs(run(divided) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("heads", "shared"), [(8, 2), (12, 6), (6, 3)])
def test_heads_are_divided_where_the_key_heads_alone_are_not(heads, shared, monkeypatch):
    """Four devices: values, gradients and decoding, and how many heads a device attends with.

    Six query heads are not divided, so that every device has all of them.
    """
    config = dataclasses.replace(
        tiny_config(), num_heads=heads, num_kv_heads=shared, head_dim=8, d_model=48
    )
    alone = Decoder(config, {n: jnp.asarray(w) for n, w in tiny_weights(config).items()})
    placement = Placement(make_mesh(resolve_sizes(1, 1, 4, jax.device_count())), 1 << 24)
    shardings = placement.weights()
    placed = {n: jax.device_put(w, shardings(n, w.shape)) for n, w in alone.weights.items()}
    divided = Decoder(config, placed, mesh=placement.mesh)
    tokens = jnp.asarray(np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH), jnp.int32)
    factors = filled_adapter(alone.sites).factors()
    seen = []

    def spying(name, scale):
        def attend_to(q, k, v, mask):
            seen.append((q.shape[2], k.shape[2]))
            return attend(q, k, v, mask, scale)

        return attend_to

    monkeypatch.setattr("mos_jax.models.decoder.implementation", spying)

    @jax.jit
    def train(factors, model):
        def total(factors):
            out = model.hidden(tokens, factors)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(total, has_aux=True)(factors)

    @jax.jit
    def decode(factors, model):
        cache, start = model.empty_cache(ROWS, LENGTH), jnp.zeros(ROWS, jnp.int32)
        _, cache = model.extend(tokens[:, :-1], start, cache, factors)
        return model.extend(tokens[:, -1:], start + LENGTH - 1, cache, factors)[0]

    expected = train(factors, alone)
    assert set(seen) == {(heads, shared)}
    seen.clear()
    found = train(factors, divided)
    # Of twelve query heads and two copies of each of the six key heads, every device has three.
    assert set(seen) == {{8: (2, 1), 12: (3, 3), 6: (6, 3)}[heads]}
    pairs = [*zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
    for a, b in (*pairs, (decode(factors, divided), expected[0][1][:, -1:])):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
