import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mos_jax import LoRAConfig, MoSConfig, create_adapter, load_base
from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.training.config import TrainingSection
from mos_jax.training.optimizer import make_optimizer, make_schedule
from mos_jax.training.step import AdapterParts, initial_state, make_train_step
from tests.models.fixtures_decoder import MOS
from tests.training.fixtures_training import write_data


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    path = write_data(tmp_path_factory.mktemp("data"))
    config = DataConfig.create(
        task="jsonl", train_path=path, validation_examples=2, test_examples=2, batch_size=2
    )
    return load_data(config, base.tokenizer)


def start(base, config=MOS, **training):
    section = TrainingSection(**{"learning_rate": 1e-2, "steps": 20, **training})
    optimizer = make_optimizer(section)
    adapter = create_adapter(config, base.sites, jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    step = make_train_step(
        optimizer, section.dropout, section.accumulation, assembly=section.assembly
    )
    return initial_state(trained, optimizer, jax.random.key(1)), parts, step


COMBINATIONS = [
    pytest.param(ss, pd, shards, private, id=f"ss{ss:d}-pd{pd:d}-vs{shards}-sp{private}")
    for ss in (True, False)
    for pd in (True, False)
    for shards in (1, 2)
    for private in (0, 1)
]


@pytest.mark.parametrize(("ss", "pd", "shards", "private"), COMBINATIONS)
def test_all_sixteen_combinations_of_strategies_train(base, data, ss, pd, shards, private):
    config = MoSConfig(
        equivalent_rank=2,
        rank=3 if ss else None,
        shards_per_vector=shards,
        private_rank=private,
        subset_selection=ss,
        pair_dissociation=pd,
    )
    state, parts, step = start(base, config)
    before = jax.tree.map(np.asarray, state.trained)
    source = data.source(0)
    losses = []
    for i in range(3):
        state, metrics = step(state, parts, base.model, source[i])
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    moved = [
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.trained), strict=True)
    ]
    assert all(moved)


def test_private_rank_equal_to_the_budget_trains_exactly_as_lora(base, data):
    found = []
    for config in (MoSConfig(2, None, 1, 2), LoRAConfig(2)):
        state, parts, step = start(base, config)
        for i in range(3):
            state, metrics = step(state, parts, base.model, data.source(0)[i])
        factors = parts.merge(state.trained).factors()
        found.append((float(metrics["loss"]), factors))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name in base.sites:
        for part in ("a", "b"):
            a, b = (getattr(f[name], part) for _, f in found)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_batch_that_holds_them_all(base, data):
    """With unequal numbers of targets, so that a mean of means would differ."""
    many = data.source(0, accumulation=3)[0]
    whole = type(many)(*(a.reshape(1, -1, *a.shape[2:])[0] for a in many))
    assert len({float(w.sum()) for w in many.loss_weights}) > 1
    state, parts, step = start(base, accumulation=3, clip_norm=0.0)
    accumulated, metrics = step(state, parts, base.model, many)
    state, parts, step = start(base, clip_norm=0.0)
    once, expected = step(state, parts, base.model, whole)
    for name in ("loss", "gradient_norm"):
        assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    # AdamW divides by the gradient's size, so compare its first moment: the gradient itself.
    first, second = (optax.tree_utils.tree_get(s.optimizer, "mu") for s in (accumulated, once))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("config", [MOS, LoRAConfig(2)], ids=["mos", "lora"])
def test_where_factors_are_assembled_changes_nothing_but_rounding(base, data, config):
    many = data.source(0, accumulation=2)[0]
    found = []
    for assembly in ("before", "inside"):
        section = {"accumulation": 2, "dropout": 0.2, "clip_norm": 0.0, "assembly": assembly}
        state, parts, step = start(base, config, **section)
        # B must not be zero, or nothing reaches A.
        for part in set(state.trained) & {"pool_b", "b"}:
            state.trained[part] = jax.tree.map(lambda b: b + 0.1, state.trained[part])
        state, metrics = step(state, parts, base.model, many)
        found.append((float(metrics["loss"]), optax.tree_utils.tree_get(state.optimizer, "mu")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(*(jax.tree.leaves(moment) for _, moment in found), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_assembled_inside_the_scan_no_copy_of_all_factors_is_kept(base, data):
    """Nothing of the step is as large as the factors of all blocks, forward or backward."""
    config = MoSConfig(equivalent_rank=2, rank=3)
    found = {}
    for assembly in ("before", "inside"):
        state, parts, step = start(base, config, assembly=assembly)
        text = step.lower(state, parts, base.model, data.source(0)[0]).compile().as_text()
        found[assembly] = {
            f"f32[{site.num_layers},3,{width}]"
            for site in base.sites.values()
            for width in (site.d_in, site.d_out)
            if f"f32[{site.num_layers},3,{width}]" in text
        }
    assert len(found["before"]) > 1
    assert not found["inside"]


def test_dropout_noise_is_new_at_every_step_and_repeats_with_the_key(base, data):
    def losses(steps):
        state, parts, step = start(base, dropout=0.5, learning_rate=0.0)
        # B must not be zero, or the branch is silent whatever is dropped.
        state.trained["pool_b"] = jax.tree.map(lambda b: b + 0.1, state.trained["pool_b"])
        found = []
        for _ in range(steps):
            state, metrics = step(state, parts, base.model, data.source(0)[0])
            found.append(float(metrics["loss"]))
        return found

    first = losses(3)
    assert len(set(first)) == 3
    assert losses(3) == first


def test_only_trained_arrays_change_and_frozen_ones_stay_where_they_are(base, data):
    state, parts, step = start(base)
    tables = jax.tree.map(np.asarray, parts.frozen)
    state, _ = step(state, parts, base.model, data.source(0)[0])
    for a, b in zip(jax.tree.leaves(tables), jax.tree.leaves(parts.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    params = nnx.state(parts.merge(state.trained), nnx.Param)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_one_compilation_serves_all_steps_and_batches(base, data):
    state, parts, step = start(base)
    for i in range(4):
        state, _ = step(state, parts, base.model, data.source(0)[i])
    assert step._cache_size() == 1


def test_a_bf16_base_trains_an_fp32_adapter(data):
    rounded = load_base("tiny-random", "bfloat16")
    state, parts, step = start(rounded)
    for i in range(3):
        state, metrics = step(state, parts, rounded.model, data.source(0)[i])
    assert np.isfinite(float(metrics["loss"]))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trained))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_rise_to_the_peak_and_end_where_they_should(schedule):
    section = TrainingSection(steps=100, learning_rate=1.0, schedule=schedule, warmup_share=0.1)
    rate = make_schedule(section)
    values = [float(rate(i)) for i in range(101)]
    assert 0 < values[0] < values[5] < values[10] == pytest.approx(1.0)
    assert values[100] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-6)
    assert values[55] == pytest.approx({"linear": 0.5, "cosine": 0.5, "constant": 1}[schedule])


def test_without_warmup_the_first_step_has_the_full_rate():
    assert float(make_schedule(TrainingSection(warmup_share=0.0, learning_rate=0.5))(0)) == 0.5


@pytest.mark.parametrize(("clip_norm", "norm"), [(0.5, 0.5), (0.0, 200.0)])
def test_clipping_bounds_what_the_optimiser_sees(clip_norm, norm):
    optimizer = make_optimizer(TrainingSection(clip_norm=clip_norm))
    huge = {"w": jnp.full(4, 100.0)}
    _, state = optimizer.update(huge, optimizer.init(huge), huge)
    # After one step the first moment is (1 - b1) times the gradient.
    moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.1 * norm, rel=1e-5)


def test_the_step_holds_without_the_graph_mode_of_nnx():
    tree_mode = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "PYTEST_ADDOPTS": ""}
    chosen = "ss1-pd1-vs2-sp1 or ss0-pd0-vs1-sp0 or accumulated or private_rank or frozen"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env=os.environ | tree_mode,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
