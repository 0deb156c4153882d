import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mos_jax import (
    InputError,
    LoRAConfig,
    MoSConfig,
    create_adapter,
    load_base,
    save_adapter,
)
from mos_jax.analysis.sharing import (
    analyse,
    analyse_run,
    compare_layers,
    describe_use,
    factor_gradients,
    pool_gradients,
    usage_counts,
)
from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.evaluation.loss import summed_loss
from mos_jax.training.loop import train
from tests.adapters.fixtures_adapters import SITES, SOME_LAYERS, quick_jit
from tests.models.fixtures_decoder import filled_adapter
from tests.training.fixtures_training import tiny_run, write_data

CONFIG = MoSConfig(equivalent_rank=2, rank=2, shards_per_vector=2, private_rank=1)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def batches(tmp_path_factory, base):
    path = write_data(tmp_path_factory.mktemp("data"))
    config = DataConfig.create(
        task="jsonl", train_path=path, validation_examples=2, test_examples=2, batch_size=2
    )
    source = load_data(config, base.tokenizer).source(0)
    return [source[0], source[1]]


def test_usage_is_what_the_tables_say():
    adapter = filled_adapter(SITES, CONFIG)
    counts = usage_counts(adapter)
    assert set(counts) == {f"pool_{part}/{name}" for part in "ab" for name in SITES}
    for path, table in adapter.tables().items():
        pool = counts[path.replace("table", "pool")]
        layers, rank, per_vector = table.shape
        assert pool.shape == (len(adapter.pool_a["q_proj"][...]), layers)
        np.testing.assert_array_equal(pool.sum(axis=0), rank * per_vector)
        for layer in range(layers):
            for shard in range(len(pool)):
                assert pool[shard, layer] == (table[layer] == shard).sum()


def test_use_in_figures():
    counts = np.array([[0, 0, 0], [2, 0, 0], [1, 1, 0], [1, 1, 1]])
    assert describe_use(counts) == {
        "shards": 4,
        "idle": 1,
        "private": 1,
        "mean_layers": 2.0,
        "most_layers": 3,
    }


@pytest.mark.parametrize("sites", [SITES, SOME_LAYERS], ids=["all layers", "some layers"])
def test_layers_parts_sum_to_the_gradient_of_the_pool(sites):
    """Against jax.grad through the whole assembly, for a loss that is known."""
    adapter = filled_adapter(sites, CONFIG)
    graphdef, trained, frozen = nnx.split(adapter, nnx.Param, ...)
    random = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), adapter.factors()
    )

    @quick_jit
    def whole(trained):
        def loss(trained):
            factors = nnx.merge(graphdef, trained, frozen).factors()
            return sum(
                jnp.sum(weights[name].a * factor.a) + jnp.sum(weights[name].b * factor.b)
                for name, factor in factors.items()
            )

        return jax.grad(loss)(trained)

    expected = {"/".join(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(whole(trained))}
    parts = pool_gradients(adapter, weights)
    assert set(parts) == set(expected)
    counts = usage_counts(adapter)
    for path, part in parts.items():
        np.testing.assert_allclose(part.sum(axis=0), expected[path], rtol=1e-5, atol=1e-6)
        # A layer's part is zero on all shards that it does not read, and on no other.
        np.testing.assert_array_equal(np.any(part != 0, axis=2), counts[path].T > 0)


def test_site_types_of_one_width_share_a_pool():
    config = MoSConfig(2, 2, shards_per_vector=2, private_rank=1, pool_scope="width")
    adapter = filled_adapter(SITES, config)
    counts = usage_counts(adapter)
    assert {path: pool.shape for path, pool in counts.items()} == {
        "pool_a/width_8": (24, 3),
        "pool_b/q_proj": (12, 3),
        "pool_b/down_proj": (12, 3),
    }
    np.testing.assert_array_equal(counts["pool_a/width_8"].sum(axis=0), 2 * 2 * 2)
    weights = jax.tree.map(jnp.ones_like, adapter.factors())
    part = pool_gradients(adapter, weights)["pool_a/width_8"]
    np.testing.assert_array_equal(part[:, :, 0], counts["pool_a/width_8"].T)


def test_one_layers_part_by_hand():
    adapter = filled_adapter(SITES, CONFIG)
    weights = jax.tree.map(jnp.ones_like, adapter.factors())
    part = pool_gradients(adapter, weights)["pool_b/q_proj"]
    counts = usage_counts(adapter)["pool_b/q_proj"]
    np.testing.assert_array_equal(part, np.repeat(counts.T[:, :, None], part.shape[2], axis=2))


def test_factor_gradients_are_those_of_the_mean_loss(base, batches):
    adapter = filled_adapter(base.sites, CONFIG)
    factors = adapter.factors()
    loss, gradient, targets = factor_gradients(base.model, factors, batches)
    assert targets == sum(batch.loss_weights.sum() for batch in batches)

    def moved(step):
        changed = dict(factors)
        q = factors["q_proj"]
        changed["q_proj"] = type(q)(q.a + step * gradient["q_proj"].a, q.b, q.scale, q.layers)
        return sum(float(summed_loss(base.model, changed, batch)) for batch in batches) / targets

    assert loss == pytest.approx(moved(0.0), rel=1e-5)
    square = float(jnp.sum(gradient["q_proj"].a ** 2))
    # A step along the gradient changes the loss by its squared norm.
    size = 2e-3 / np.sqrt(square)
    assert (moved(size) - moved(-size)) / (2 * size) == pytest.approx(square, rel=0.02)


def test_cosines_norms_and_agreement_by_hand():
    # Three layers, three shards of width 2; shard 0 is read by layers 0 and 1, shard 1 by 1 and 2,
    # shard 2 by layer 2 alone.
    counts = np.array([[1, 1, 0], [0, 2, 1], [0, 0, 1]])
    gradient = np.zeros((3, 3, 2), np.float32)
    gradient[0, 0] = [3, 4]
    gradient[1, 0] = [-3, -4]
    gradient[1, 1] = [0, 2]
    gradient[2, 1] = [2, 0]
    gradient[2, 2] = [9, 9]
    pull = compare_layers([gradient], [counts])
    np.testing.assert_allclose(pull.norms, [5, np.sqrt(29), np.sqrt(166)])
    np.testing.assert_allclose(pull.cosines[0, 1], -1)
    np.testing.assert_allclose(pull.cosines[1, 2], 0)
    assert np.isnan(pull.cosines[0, 2])
    np.testing.assert_allclose(np.diag(pull.cosines), 1)
    np.testing.assert_allclose(sorted(pull.pairs()), [-1, 0])
    # Shard 0 cancels; shard 1 sums to sqrt(8) from norms 2 and 2.
    assert pull.agreement == pytest.approx(np.sqrt(8) / 14)
    assert pull.orthogonal == pytest.approx((np.sqrt(50) + np.sqrt(8)) / 14)
    assert pull.to_dict()["share_below_0"] == 0.5


def test_without_a_shared_shard_there_is_nothing_to_compare():
    gradient = np.ones((2, 2, 1), np.float32) * np.eye(2, dtype=np.float32)[:, :, None]
    pull = compare_layers([gradient], [np.eye(2, dtype=int)])
    assert np.isnan(pull.agreement)
    assert pull.to_dict()["mean_cosine"] is None
    assert pull.to_dict()["pairs"] == 0


def test_analysis_of_an_adapter_on_a_base(base, batches):
    found = analyse(base.model, filled_adapter(base.sites, CONFIG), batches)
    assert found.layers == (0, 1)
    assert {"pool_a", "pool_b"} < set(found.pulls)
    for pull in found.pulls.values():
        finite = pull.cosines[np.isfinite(pull.cosines)]
        assert np.all(np.abs(finite) <= 1)
        assert np.all(pull.norms > 0)
        np.testing.assert_allclose(pull.cosines, pull.cosines.T)
    per_type = [pull.norms**2 for path, pull in found.pulls.items() if path.startswith("pool_a/")]
    np.testing.assert_allclose(found.pulls["pool_a"].norms, np.sqrt(sum(per_type)), rtol=1e-6)


def test_analysis_of_a_run_folder(tmp_path):
    run = tiny_run(write_data(tmp_path), steps=2)
    train(run, tmp_path / "run")
    found = analyse_run(tmp_path / "run", batches=1)
    assert found.targets > 0
    assert found.to_dict()["use"]["pool_a/q_proj"]["shards"] == 8
    with pytest.raises(InputError, match="lacking"):
        analyse_run(tmp_path / "lacking")


def test_another_method_has_no_pools(tmp_path, base):
    lora = create_adapter(LoRAConfig(1), base.sites, jax.random.key(0))
    save_adapter(
        tmp_path / "adapter",
        lora,
        base_fingerprint=base.fingerprint,
        metadata={"base": "tiny-random"},
    )
    with pytest.raises(InputError, match="'lora'; only mos has pools"):
        analyse_run(tmp_path)
