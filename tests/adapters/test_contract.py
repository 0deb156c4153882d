"""What every method must keep. A new method is one more entry of `CONFIGS`."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import METHODS, count_parameters, create_adapter, make_config
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.storage import ARRAYS_FILE, load_adapter, save_adapter
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import (
    MODEL_LAYERS,
    SITES,
    SOME_LAYERS,
    frozen_arrays,
    quick_jit,
    randomised,
    split_trained,
    trained_arrays,
)

CONFIGS = {
    "mos": MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1),
    "mos-scaled": MoSConfig.pure_sharing(1, random_scaling="fixed"),
    "mos-trained-scaling": MoSConfig.pure_sharing(1, random_scaling="trained"),
    "mos-options": MoSConfig(
        2, 3, 2, 1, balanced_routing=True, rank_scaling=True, pool_scope="width", b_rate_ratio=4.0
    ),
    "lora": LoRAConfig(rank=2),
    "rslora": LoRAConfig(rank=3, rslora=True),
    "prolora": PRoLoRAConfig(rank=5, unshared_rank=1, chunks_a=3, chunks_b=2),
    "prolora-all-shared": PRoLoRAConfig(rank=3, unshared_rank=0, chunks_a=2, chunks_b=4),
    "share-a": ShareLoRAConfig(rank=2, shared="a"),
    "share-b": ShareLoRAConfig(rank=2, shared="b"),
    "vera": VeRAConfig(rank=5),
    "vera-shared": VeRAConfig(rank=5, projections="shared"),
    "tied": TiedLoRAConfig(rank=2),
    "tied-qkv": TiedLoRAConfig(rank=3, tie_qkv=True),
    "rasa": RaSAConfig(rank=3, shared_rank=2),
    "rasa-all-shared": RaSAConfig(rank=1, shared_rank=1),
    "uni-lora": UniLoRAConfig(theta_length=31, rank=3),
    "uni-lora-drawn": UniLoRAConfig(theta_length=31, rank=3, used_more="drawn"),
    "vb-lora": VBLoRAConfig(rank=2, num_vectors=5, vector_length=4),
}
# The first block has another rank than the others; where a method has an alpha, that too.
RANKS = {"0.*": 2, "q_proj": 4}
ALPHAS = {r".*\.0\..*": 4.0}
CONFIGS |= {
    "mos-patterns": MoSConfig(
        3, 3, 2, 1, rank_scaling=True, rank_pattern=RANKS, alpha_pattern=ALPHAS
    ),
    "lora-patterns": LoRAConfig(rank=3, rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "prolora-patterns": PRoLoRAConfig(3, 1, 3, 2, rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "share-b-patterns": ShareLoRAConfig(3, "b", rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "vera-patterns": VeRAConfig(rank=3, rank_pattern=RANKS),
    "tied-qkv-patterns": TiedLoRAConfig(3, True, rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "rasa-patterns": RaSAConfig(rank=3, rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "uni-lora-patterns": UniLoRAConfig(theta_length=31, rank=3, rank_pattern=RANKS),
    "vb-lora-patterns": VBLoRAConfig(3, num_vectors=5, vector_length=4, rank_pattern=RANKS),
}
# Uni-LoRA trains one vector, and its index is as long as the ranks want.
PADDED = {name for name in CONFIGS if "patterns" in name} - {"uni-lora-patterns"}
# Whose trained arrays start as constants, whatever the key.
STARTS_ALIKE = {"vera", "vera-shared", "vera-patterns"}
# Where XLA rounds the last bit otherwise when it fuses the initialisation.
ROUNDED_BY_FUSION = {"vb-lora", "vb-lora-patterns"}
# Whose factors are not 0 at first, since A and B are read from the same trained array.
NOT_THE_BASE_AT_FIRST = {name for name in CONFIGS if name.startswith(("uni-lora", "vb-lora"))}
TREE_MODE = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
INSIDE = "MOS_JAX_CONTRACT_IN_TREE_MODE"


def sites_of(name, layers=False):
    """The sites of `SITES`, under other names where a method adapts no others."""
    sites = SOME_LAYERS if layers else SITES
    if name.startswith("tied-qkv"):
        return {"q_proj": sites["q_proj"], "v_proj": sites["down_proj"]}
    return sites


@functools.cache
def built(name, layers=False, seed=0):
    """One build for several tests: an adapter is only read."""
    return create_adapter(CONFIGS[name], sites_of(name, layers), jax.random.key(seed))


@functools.cache
def random_one(name, layers=False):
    return randomised(built(name, layers))


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["all-layers", "some-layers"])
def layers(request):
    return request.param


def structure(tree) -> Any:
    return jax.tree.structure(tree)


def assert_same(have, want, rtol=0.0):
    """The same tree of the same arrays, bitwise unless `rtol` is given."""
    assert structure(have) == structure(want)
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=0.0)


def block(factors, row):
    """The factors of one block out of those of all."""
    return LowRank(factors.a[row], factors.b[row], factors.scale[row])


def loss_of(adapter):
    return sum(jnp.sum(jnp.sin(f.a)) + jnp.sum((f.b - 1) ** 2) for f in adapter.factors().values())


def test_every_method_is_tested():
    assert {config.method for config in CONFIGS.values()} == set(METHODS)
    assert all(isinstance(CONFIGS[name], METHODS[CONFIGS[name].method]) for name in CONFIGS)


def test_factors_of_all_blocks_have_the_shapes_and_dtypes_of_the_contract(name, layers):
    adapter = built(name, layers)
    assert isinstance(adapter, Adapter)
    factors = adapter.factors()
    assert list(factors) == list(adapter.sites) == list(sites_of(name))
    for site_name, site in adapter.sites.items():
        f = factors[site_name]
        assert f.a.shape == (site.num_layers, f.rank, site.d_in)
        assert f.b.shape == (site.num_layers, f.rank, site.d_out)
        assert f.scale.shape == (site.num_layers,)
        assert {f.a.dtype, f.b.dtype, f.scale.dtype} == {jnp.dtype("float32")}
        assert f.layers == site.layers
        assert np.all(np.asarray(f.scale) > 0)
        assert_same(adapter.site_factors(site_name), f)


def test_factors_of_one_block_are_its_rows_of_all_or_have_scale_0(name, layers):
    adapter = random_one(name, layers)
    every = jax.tree.map(np.asarray, adapter.factors())
    compiled = quick_jit(adapter.factors)
    adapted = (0, 2, 3) if layers else (0, 1, 2)
    for k in range(MODEL_LAYERS if layers else 3):
        one = compiled(k)
        assert set(one) == set(every)
        for site_name, f in one.items():
            site = adapter.sites[site_name]
            assert f.a.shape == (f.rank, site.d_in)
            assert f.b.shape == (f.rank, site.d_out)
            assert (f.scale.shape, f.scale.dtype, f.layers) == ((), jnp.float32, None)
            if k in adapted:
                assert_same(f, block(every[site_name], adapted.index(k)))
            else:
                assert f.scale == 0


@pytest.mark.parametrize("layer", [3, -1, 99])
def test_a_block_that_does_not_exist_is_refused(name, layer):
    with pytest.raises(InputError, match=f"block {layer} does not exist; .* from 0 to 2"):
        built(name).factors(layer)
    if layer < 0:
        with pytest.raises(InputError, match=f"block {layer} does not exist"):
            built(name, layers=True).factors(layer)


def test_scan_over_blocks_equals_apply_block_by_block(name):
    adapter = random_one(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)

    @quick_jit
    def scanned(adapter):
        def step(carry, factors):
            return carry, factors["q_proj"].apply(x)

        return jax.lax.scan(step, None, adapter.factors())[1]

    loop = [x @ delta for delta in adapter.site_factors("q_proj").delta()]
    assert np.abs(loop[0] - loop[1]).max() > 0.1 or name == "mos-scaled"
    np.testing.assert_allclose(scanned(adapter), loop, rtol=1e-4, atol=1e-4)


def test_the_count_is_the_size_of_the_params_and_is_known_from_shapes(name, layers):
    adapter = built(name, layers)
    arrays = trained_arrays(adapter)
    size = sum(array.size for array in arrays.values())
    if name in PADDED:  # Rows that no block has are not trained; see test_patterns.py.
        assert 0 < adapter.count_trained() < size
    else:
        assert adapter.count_trained() == size > 0
    by_site = adapter.count_trained_by_site()
    assert sum(by_site.values()) == adapter.count_trained()
    assert count_parameters(CONFIGS[name], adapter.sites) == by_site
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}


def test_what_belongs_to_no_single_site_type_is_counted_as_shared(name):
    adapter = create_adapter(CONFIGS[name], sites_of(name), jax.random.key(0))
    own = adapter.count_trained_by_site()
    adapter.probe = nnx.Dict(vectors=nnx.Param(np.zeros((4, 8), np.float32)))
    adapter.probes = nnx.Dict(q_proj=nnx.Dict(vectors=nnx.Param(np.zeros((2, 8), np.float32))))
    counts = adapter.count_trained_by_site()
    shared = own.get("shared", 0) + 32
    assert counts == {**own, "q_proj": own["q_proj"] + 16, "shared": shared}
    assert sum(counts.values()) == adapter.count_trained()


def test_every_trained_array_gets_a_gradient_and_one_step_changes_nothing_else(name):
    adapter = random_one(name)
    graphdef, params, rest = split_trained(adapter)
    optimizer = optax.adamw(0.1)

    def loss(params):
        return loss_of(nnx.merge(graphdef, params, rest))

    @quick_jit
    def step(params):
        before, gradients = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        params = optax.apply_updates(params, updates)
        return before, gradients, loss(params), nnx.merge(graphdef, params, rest)

    before, gradients, after, stepped = step(params)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf)
    assert after < before
    old, new = trained_arrays(adapter), trained_arrays(stepped)
    assert list(old) == list(new)
    assert all(np.any(old[key] != new[key]) for key in old)
    old, new = frozen_arrays(adapter), frozen_arrays(stepped)
    assert list(old) == list(new)
    for key in old:
        np.testing.assert_array_equal(old[key], new[key])


def test_the_key_decides_what_trains_and_only_that(name):
    same = create_adapter(CONFIGS[name], sites_of(name), jax.random.key(0))
    other = built(name, seed=1)
    assert_same(nnx.state(same), nnx.state(built(name)))
    old, new = trained_arrays(same), trained_arrays(other)
    assert any(np.any(old[key] != new[key]) for key in old) or name in STARTS_ALIKE
    for key, array in frozen_arrays(same).items():
        np.testing.assert_array_equal(frozen_arrays(other)[key], array)


def test_the_constructor_and_the_factors_run_under_jit_and_vmap_over_keys(name):
    sites = {"q_proj": SOME_LAYERS["q_proj"]}

    def construct(key):
        adapter = create_adapter(CONFIGS[name], sites, key)
        return adapter, adapter.factors()

    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    many, factors = jax.jit(jax.vmap(construct))(keys)
    assert factors["q_proj"].layers == (0, 2, 3)
    for seed in range(2):
        want = create_adapter(CONFIGS[name], sites, keys[seed])
        one = jax.tree.map(lambda leaf: np.asarray(leaf[seed]), (nnx.state(many), factors))  # noqa: B023
        rtol = 1e-5 if name in ROUNDED_BY_FUSION else 0.0
        assert_same(one, (nnx.state(want), want.factors()), rtol)


def test_eval_shape_of_the_constructor_allocates_nothing_and_has_the_shapes(name):
    abstract = jax.eval_shape(
        lambda key: create_adapter(CONFIGS[name], sites_of(name), key), jax.random.key(0)
    )
    want = nnx.state(built(name))
    have = nnx.state(abstract)
    assert structure(have) == structure(want)
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert isinstance(one, jax.ShapeDtypeStruct)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert abstract.count_trained() == built(name).count_trained()


def test_two_adapters_of_one_configuration_share_one_compilation(name):
    traces = []

    @jax.jit
    def function(adapter):
        traces.append(adapter)
        return jnp.float32(0)

    function(built(name))
    function(built(name, seed=1))
    assert len(traces) == 1


def test_stacked_adapters_of_one_configuration_map_over_their_axis(name):
    adapters = [random_one(name), randomised(built(name, seed=1), seed=1)]
    graphdef, first = nnx.split(adapters[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, nnx.state(adapters[1]))
    factors = quick_jit(jax.vmap(lambda state: nnx.merge(graphdef, state).factors()))(stacked)
    for i, adapter in enumerate(adapters):
        one = jax.tree.map(lambda leaf: leaf[i], factors)  # noqa: B023
        assert_same(one, adapter.factors(), rtol=1e-5 if name in ROUNDED_BY_FUSION else 0.0)


def test_split_and_merge_give_the_adapter_back(name):
    graphdef, state = nnx.split(random_one(name))
    assert_same(nnx.merge(graphdef, state).factors(), random_one(name).factors())


def test_save_and_load_give_the_same_bits(name, layers, tmp_path):
    adapter = random_one(name, layers)
    loaded = load_adapter(save_adapter(tmp_path / "adapter", adapter))
    assert type(loaded) is type(adapter)
    assert (loaded.config, loaded.sites) == (adapter.config, adapter.sites)
    assert_same(nnx.state(loaded), nnx.state(adapter))
    assert_same(loaded.factors(), adapter.factors())


def test_the_configuration_survives_json(name):
    config = CONFIGS[name]
    assert make_config(config.method, json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_the_summary_is_json_and_names_method_count_and_bytes(name, tmp_path):
    adapter = built(name)
    summary = json.loads(json.dumps(adapter.summary()))
    assert summary["method"] == CONFIGS[name].method
    assert summary["trained_parameters"] == adapter.count_trained()
    # What is stored is what lies on disk, but for the names and shapes.
    arrays = load_file(save_adapter(tmp_path / "adapter", adapter) / ARRAYS_FILE)
    assert summary["stored_bytes"] == sum(array.nbytes for array in arrays.values())
    assert summary["served_bytes"] == 4 * adapter.count_served()


def test_no_factor_changes_the_base_at_first_unless_the_method_says_so(name, layers):
    for factors in built(name, layers).factors().values():
        assert np.any(factors.delta()) == (name in NOT_THE_BASE_AT_FIRST)


def test_factors_and_their_use_run_under_strict_promotion(name, layers):
    def use(adapter):
        every, one = adapter.factors(), adapter.factors(0)
        weight = jnp.ones((MODEL_LAYERS if layers else 3, 8, 12), jnp.bfloat16)
        return every["q_proj"].merge(weight), one["q_proj"].apply(weight[0].T)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        merged, y = jax.eval_shape(use, random_one(name, layers))
    assert merged.dtype == y.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.timeout(900)  # 35 s of one core, but of one that may be shared by many.
@pytest.mark.skipif(INSIDE in os.environ, reason="this is the run that the test starts")
def test_the_contract_holds_without_the_graph_mode_of_nnx():
    # How well XLA optimises has no part in this.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    environment = os.environ | TREE_MODE | quick | {INSIDE: "1", "PYTEST_ADDOPTS": ""}
    # To NNX, rsLoRA is LoRA, and so on.
    alike = "rslora or prolora-all or share-b or rasa-all or (patterns and not mos)"
    which = ["-k", f"not ({alike} or json)", __file__]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_mode_of_nnx_is_the_one_of_this_run():
    """The run above would prove nothing if the variables of the environment were not read."""
    graph_mode = INSIDE not in os.environ
    assert nnx.set_graph_mode.current_value() is graph_mode
    assert nnx.set_graph_updates.current_value() is graph_mode
