"""What is computed in which precision on a bf16 base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mos_jax.models.decoder import Decoder
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Session
from tests.training.fixtures_training import tiny_mapping, write_data

# What needs the range or the digits of fp32: sums over many entries and what undoes logarithms.
DELICATE = {"exp", "log", "log1p", "rsqrt", "sqrt", "reduce_sum", "cumsum", "argmax", "reduce_max"}


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def session_of(train_path, dtype="bfloat16", **base):
    mapping = tiny_mapping(train_path, dropout=0.1, accumulation=2)
    mapping["base"] |= {"dtype": dtype, **base}
    return Session.create(RunConfig.from_mapping(mapping))


def trace(session):
    state, parts = session.initial()
    batch = session.data.source(0, 2)[0]
    return session.train_step().trace(state, parts, session.base.model, batch)


def equations(jaxpr):
    """All equations, of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                yield from equations(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from equations(inner)


def test_what_is_held_is_bf16_for_products_and_fp32_for_the_rest(train_path):
    session = session_of(train_path)
    for name, weight in session.base.model.weights.items():
        assert weight.dtype == (jnp.float32 if "norm" in name else jnp.bfloat16), name
    state, parts = session.initial()
    after, metrics = jax.eval_shape(
        session.train_step(), state, parts, session.base.model, session.data.source(0, 2)[0]
    )
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves((after, metrics, parts))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert len(floats) > 6
    assert set(floats) == {jnp.dtype(jnp.float32)}
    factors = jax.eval_shape(lambda adapter: adapter.factors(), session.adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("attention", ["grouped", "xla"])
def test_products_with_the_base_are_bf16_and_nothing_delicate_is(train_path, quantize, attention):
    session = session_of(train_path, quantize=quantize, attention=attention, logits_mib=1e-6)
    config = session.base.config
    # Of the MLP, and of the head's chunks, which are the same.
    shapes = [(config.d_model, config.d_ff), (config.d_ff, config.d_model)]
    products, with_weights = 0, 0
    for equation in equations(trace(session).jaxpr.jaxpr):
        inputs = [v.aval for v in equation.invars if hasattr(v.aval, "dtype")]
        half = [a for a in inputs if a.dtype == jnp.bfloat16]
        name = equation.primitive.name
        if name in DELICATE:
            assert not half, equation
        if name == "dot_general":
            products += 1
            weights = [a for a in inputs if a.shape in shapes]
            assert all(a.dtype == jnp.bfloat16 for a in weights), equation
            with_weights += bool(weights)
    assert products > 20
    # Gate, up, down and head, forward and backward.
    assert with_weights >= 8


def test_the_loss_is_near_that_of_fp32_on_the_same_weights(train_path):
    """And no nearer than it should be: the products really are rounded."""
    half, again = session_of(train_path), session_of(train_path)
    weights = {n: w.astype(jnp.float32) for n, w in half.base.model.weights.items()}
    exact = Decoder(half.base.config, weights)
    found = []
    for session, model in ((half, half.base.model), (again, exact)):
        state, parts = session.initial()  # is gone after the step
        _, metrics = session.train_step()(state, parts, model, half.data.source(0, 2)[0])
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    for a, b in zip(*found, strict=True):
        assert 0 < abs(a - b) < 0.01 * abs(b)


def test_an_fp32_base_computes_nothing_in_bf16(train_path):
    for equation in equations(trace(session_of(train_path, "float32")).jaxpr.jaxpr):
        for variable in (*equation.invars, *equation.outvars):
            assert getattr(variable.aval, "dtype", np.dtype("f4")) != jnp.bfloat16, equation
