import dataclasses

import pytest

from mos_jax.adapters.budget import fit
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import METHODS, count_parameters
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from tests.adapters.fixtures_adapters import model_sites

SITES = {"q_proj": SiteShape(4, 16, 24), "down_proj": SiteShape(4, 32, 16)}
PER_RANK = 4 * (16 + 24 + 32 + 16)
SMOLLM2 = model_sites("smollm2-135m")


def trained(config, sites=SITES):
    return sum(count_parameters(config, sites).values())


def test_every_method_has_a_size():
    for config in METHODS.values():
        assert config.size_field in {known.name for known in dataclasses.fields(config)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2 * PER_RANK, 5 * PER_RANK + 17])
def test_the_next_larger_setting_exceeds_the_budget(method, budget):
    fitted = fit(method, SITES, budget)
    assert fitted.config.method == method
    assert fitted.trained == trained(fitted.config) <= budget
    assert fitted.ratio == fitted.trained / budget <= 1
    field = METHODS[method].size_field
    larger = dataclasses.replace(fitted.config, **{field: getattr(fitted.config, field) + 1})
    assert trained(larger) > budget


@pytest.mark.parametrize(
    ("method", "fixed", "sizes"),
    [
        ("lora", {}, range(1, 12)),
        ("rasa", {"shared_rank": 2}, range(2, 12)),
        ("prolora", {"unshared_rank": 2, "chunks_a": 3, "chunks_b": 5}, range(2, 40)),
        ("tied_lora", {}, range(1, 30)),
        ("vb_lora", {"vector_length": 4, "rank": 1, "top_k": 3}, range(3, 40)),
        ("mos", {"rank": 5, "private_rank": 1, "rank_scaling": True}, range(2, 12)),
    ],
)
@pytest.mark.parametrize("budget", [1500, 2345])
def test_it_finds_what_a_search_through_all_sizes_finds(method, fixed, sizes, budget):
    field = METHODS[method].size_field
    counts = {size: trained(METHODS[method](**{field: size}, **fixed)) for size in sizes}
    assert min(counts.values()) <= budget < max(counts.values())
    best = max(size for size in sizes if counts[size] <= budget)
    fitted = fit(method, SITES, budget, **fixed)
    assert fitted.config == METHODS[method](**{field: best}, **fixed)
    assert fitted.trained == counts[best]


@pytest.mark.parametrize(
    ("rank", "config", "ratio"),
    [
        (1, MoSConfig(1, 4), 1),
        (8, MoSConfig(8, 32), 1),
        (1, PRoLoRAConfig(4, 0, 4, 4), 1),
        (2, PRoLoRAConfig(9, 1, 8, 8), 1),
        (8, PRoLoRAConfig(29, 1, 4, 4), 1),
        # The figures that show that equal budgets are not always to be had.
        (1, VeRAConfig(rank=713), 0.9999),
        (2, VeRAConfig(rank=2166), 0.9997),
        (2, ShareLoRAConfig(rank=3), 0.7887),
        (2, RaSAConfig(rank=1), 0.5103),
        (8, RaSAConfig(rank=7), 0.8781),
        (1, VBLoRAConfig(num_vectors=46, vector_length=192), 0.9873),
        (1, UniLoRAConfig(theta_length=305_280, rank=4), 1),
    ],
)
def test_settings_at_the_budgets_of_lora_on_smollm2(rank, config, ratio):
    budget = trained(LoRAConfig(rank=rank), SMOLLM2)
    fitted = fit(config.method, SMOLLM2, budget)
    assert fitted.config == config
    assert fitted.ratio == pytest.approx(ratio, abs=1e-4)


def test_fixed_fields_stay_and_the_defaults_follow_them():
    assert fit("lora", SITES, 3 * PER_RANK, rslora=True).config == LoRAConfig(3, rslora=True)
    # All private: plain LoRA.
    assert fit("mos", SITES, 2 * PER_RANK, private_rank=2).config == MoSConfig(2, 2, 1, 2)
    # Three public vectors a block at p = 1 need e = 2.
    assert fit("mos", SITES, 2 * PER_RANK, rank=4, private_rank=1).config == MoSConfig(2, 4, 1, 1)
    pure = fit("mos", SITES, 2 * PER_RANK, subset_selection=False, pair_dissociation=False)
    assert pure.config == MoSConfig.pure_sharing(2)
    # A pool for both types of one input width has twice as many vectors.
    alike = {name: SiteShape(4, 16, 16) for name in ("q_proj", "k_proj")}
    wide = fit("mos", alike, 256, rank=8, pool_scope="width")
    assert wide.config == MoSConfig(1, 8, pool_scope="width")
    with pytest.raises(InputError, match="smallest setting, equivalent_rank=2, has 512"):
        fit("mos", alike, 256, rank=8)
    # 4 blocks have 4 vectors for each equivalent rank; with 2 they have fewer than 4 e.
    shallow = {"q_proj": SiteShape(2, 16, 16)}
    assert fit("mos", shallow, 64 * 3).config == MoSConfig(3, 6)
    assert fit("prolora", SITES, 2 * PER_RANK, chunks_b=2).config.chunks_b == 2
    # Hardly anything is left to repeat.
    assert fit("prolora", SITES, PER_RANK + 1, unshared_rank=1).config == PRoLoRAConfig(1, 1, 8, 8)
    assert fit("vb_lora", SITES, 4 * PER_RANK).config.vector_length == 8
    tied = {name: SiteShape(4, 16, 16) for name in ("q_proj", "k_proj", "v_proj")}
    assert fit("tied_lora", tied, 1000, tie_qkv=True).config.tie_qkv


def test_uni_lora_stops_where_theta_has_no_more_places():
    fitted = fit("uni_lora", SITES, 10 * PER_RANK, rank=1)
    assert fitted.config == UniLoRAConfig(theta_length=PER_RANK, rank=1)
    assert fitted.ratio == 0.1


@pytest.mark.parametrize(
    ("method", "budget", "fixed", "message"),
    [
        ("lora", PER_RANK - 1, {}, f"budget of {PER_RANK - 1} .*, rank=1, has {PER_RANK}"),
        ("rasa", PER_RANK, {}, f"smallest setting, rank=1, has {PER_RANK + 32}"),
        ("rasa", 3 * PER_RANK, {"shared_rank": 3}, r"smallest setting, rank=3, has \d+"),
        ("mos", 3 * PER_RANK, {"private_rank": 4}, "smallest setting, equivalent_rank=4, has"),
        ("vb_lora", 10, {"top_k": 3}, "smallest setting, num_vectors=3, has"),
        ("vb_lora", 999, {"vector_length": 7}, "vector_length=7 does not divide d_in=16"),
        ("rasa", 999, {"shared_rank": "two"}, "shared_rank must be an integer >= 1, got 'two'"),
        ("loraa", 999, {}, "unknown method 'loraa'; did you mean 'lora'"),
        ("lora", 999, {"rank": 3}, "rank=3 is what the budget decides for lora"),
        ("lora", 999, {"alhpa": 3.0}, "unknown field 'alhpa'; did you mean 'alpha'"),
        ("lora", 999.5, {}, "budget must be an integer >= 1, got 999.5"),
        ("lora", 0, {}, "budget must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_fitted_says_why(method, budget, fixed, message):
    with pytest.raises(InputError, match=message):
        fit(method, SITES, budget, **fixed)
