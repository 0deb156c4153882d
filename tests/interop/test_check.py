import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.sites import select_sites
from mos_jax.errors import InputError
from mos_jax.interop.check import largest_logit_difference
from mos_jax.models.config import DecoderConfig
from mos_jax.models.decoder import Decoder
from tests.adapters.fixtures_adapters import randomised

CONFIG = DecoderConfig.create(
    name="small",
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_ff=12,
    vocab_size=11,
    rope_base=10000.0,
    rms_eps=1e-5,
    tied_embeddings=True,
    max_positions=32,
)
TOKENS = np.random.default_rng(1).integers(0, 11, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    random = np.random.default_rng(0)
    return Decoder(
        CONFIG,
        {
            name: jnp.asarray(0.5 * random.normal(size=shape), jnp.float32)
            for name, shape in CONFIG.weight_shapes().items()
        },
    )


@pytest.fixture(scope="module")
def factors(model):
    sites = select_sites(model.sites, ["q_proj", "down_proj"], layers=[1])
    return randomised(create_adapter(LoRAConfig(rank=2), sites, jax.random.key(0))).factors()


def test_is_the_largest_difference(model, factors):
    expected = np.abs(np.asarray(model(TOKENS, factors)) - np.asarray(model(TOKENS))).max()
    assert expected > 0.01
    for pair in ((factors, None), (None, factors)):
        found = largest_logit_difference(model, TOKENS, *pair)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_equal_factors_differ_by_nothing(model, factors):
    assert largest_logit_difference(model, TOKENS, factors, dict(factors)) == 0.0
    # Other arrays for the same change.
    moved = {n: LowRank(2 * f.a, f.b / 2, f.scale, f.layers) for n, f in factors.items()}
    assert largest_logit_difference(model, TOKENS, factors, moved) < 1e-4


def test_nan_is_not_hidden(model, factors):
    broken = {n: LowRank(f.a * np.nan, f.b, f.scale, f.layers) for n, f in factors.items()}
    assert np.isnan(largest_logit_difference(model, TOKENS, broken, None))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"must be int32 \[B, S\].*got int32 \[5\]"),
        (TOKENS.astype(np.int64), "got int64"),
        (TOKENS[:, :0], "at least one token"),
        (np.full((1, 2), 11, np.int32), "between 0 and 10, got 11 to 11"),
        (np.full((1, 2), -1, np.int32), "got -1 to -1"),
    ],
)
def test_refused_tokens(model, tokens, message):
    with pytest.raises(InputError, match=message):
        largest_logit_difference(model, tokens, None, None)


def test_factors_of_another_base(model):
    factors = {"q_proj": LowRank(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 8)), jnp.ones(2))}
    with pytest.raises(InputError, match="factors of 'q_proj'"):
        largest_logit_difference(model, TOKENS, factors, None)
