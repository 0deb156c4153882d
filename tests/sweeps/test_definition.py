import json

import pytest

from mos_jax.errors import InputError
from mos_jax.sweeps.combinators import arm
from mos_jax.sweeps.definition import FIRST_TUNING_SEED, Sweep, override, slug
from mos_jax.training.config import RunConfig
from mos_jax.training.session import Loads
from tests.sweeps.fixtures_sweeps import ITEMS, tiny_sweep


def test_tuning_tries_every_rate_of_every_arm_with_seeds_of_its_own():
    runs = tiny_sweep(tuning_seeds=2).tuning()
    assert [(r.arm, r.learning_rate, r.seed) for r in runs] == [
        (name, rate, FIRST_TUNING_SEED + seed)
        for name in ("lora", "mos")
        for rate in (1e-3, 1e-2)
        for seed in (0, 1)
    ]
    assert {r.stage for r in runs} == {"tune"}
    assert not any(r.config.evaluation.test_at_end for r in runs)


def test_final_runs_use_the_chosen_rates_and_the_test_set():
    runs = tiny_sweep(seeds=3).final({"lora": 1e-2})
    assert [(r.seed, r.arm, r.learning_rate) for r in runs] == [
        (seed, name, rate) for seed in range(3) for name, rate in (("lora", 1e-2), ("mos", 1e-3))
    ]
    assert all(r.config.evaluation.test_at_end for r in runs)
    assert not any(r.config.evaluation.compare_base for r in runs)
    seeds = {r.seed for r in tiny_sweep().tuning()} & {r.seed for r in runs}
    assert seeds == set()


def test_a_seed_decides_the_run_and_the_routing_and_leaves_the_data_alone():
    first, second = (r.config for r in tiny_sweep(learning_rates="").final() if r.arm == "mos")
    assert (first.training.seed, second.training.seed) == (0, 1)
    assert (first.adapter.routing_seed, second.adapter.routing_seed) == (0, 1)
    assert first.data == second.data


def test_folders_are_distinct_and_plain():
    sweep = tiny_sweep([arm("-ss", rank=3), arm("a b/ü", rank=4)], tuning_seeds=2)
    folders = [r.folder for r in sweep.every_run()]
    assert len(set(folders)) == len(folders) == 12
    assert folders[0] == "runs/minus-ss/tune-lr0.001-seed1000"
    assert {f.split("/")[1] for f in folders} == {"minus-ss", "a_b"}
    assert slug("..") == "minus-."


def test_an_arm_may_have_rates_of_its_own_or_one_without_tuning():
    own = arm("own", {"sweep.learning_rates": "0.5"}, rank=3)
    sweep = tiny_sweep([*ITEMS, own])
    assert {r.arm for r in sweep.tuning()} == {"lora", "mos"}
    assert {r.learning_rate for r in sweep.final() if r.arm == "own"} == {0.5}
    none = tiny_sweep(learning_rates="", training={"learning_rate": 7e-3})
    assert none.tuning() == []
    assert {r.learning_rate for r in none.final()} == {7e-3}


def test_a_method_starts_from_its_own_defaults():
    base = {"adapter": {"method": "mos", "equivalent_rank": 2, "rank": 3}, "training": {"steps": 5}}
    lora = override(base, {"adapter.method": "lora", "adapter.rank": 4, "training.steps": 6})
    assert lora["adapter"]["rank"] == 4
    assert "equivalent_rank" not in lora["adapter"]
    assert lora["training"]["steps"] == 6
    assert base["training"]["steps"] == 5
    same = override(base, {"adapter.rank": 5})
    assert same["adapter"] == {"method": "mos", "equivalent_rank": 2, "rank": 5}
    deep = override(base, {"data.task_options.max_terms": 3})
    assert deep["data"] == {"task_options": {"max_terms": 3}}


def test_an_arm_sets_patterns_as_dicts_or_json():
    pattern = {"layers.0.mlp.up_proj": 1, "q_proj": 3}
    for value in (pattern, json.dumps(pattern)):
        fields = {"adapter.method": "lora", "adapter.rank_pattern": value}
        nested = override({"adapter": {"method": "mos", "rank": 3}}, fields)
        assert RunConfig.from_mapping(nested).adapter.rank_pattern == pattern


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (arm("x", method="lor"), "unknown method 'lor'; did you mean 'lora'"),
        (arm("x", method="lora", rnk=3), "unknown field 'rnk'; did you mean 'rank'"),
        (arm("x", {"training.stps": 3}), "training.stps; did you mean 'steps'"),
        (arm("x", {"trainig.steps": 3}), "unknown section 'trainig'; did you mean 'training'"),
        (arm("x", {"steps": 3}), "'steps' is no field of a section"),
        (arm("x", {"training.steps.more": 3}), "'steps' of it has no fields of its own"),
        (arm("x", method="mos", equivalent_rank=2, rank=8, private_rank=3), "private_rank=3"),
        (arm("x", {"training.seed": 3}), "sets training.seed, which the sweep sets itself"),
        (arm("x", {"training.learning_rate": 3.0}), "use sweep.seeds and sweep.learning_rates"),
        (arm("x", {"sweep.seeds": 3}), "sets sweep.seeds"),
        (arm("x", {"sweep.learning_rates": "0,1"}), "arm 'x': .*rates above 0"),
        (arm("x", {"sweep.learning_rates": "1,1"}), "arm 'x': .*holds a rate twice"),
    ],
)  # fmt: skip
def test_an_item_that_cannot_be_built_is_named_before_any_run(item, words):
    with pytest.raises(InputError, match=words) as error:
        tiny_sweep([*ITEMS, item])
    assert "arm 'x'" in str(error.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"baseline": "lra"}, "baseline 'lra' is no arm; did you mean 'lora'"),
        ({"seeds": 0}, "sweep.seeds must be at least 1, got 0"),
        ({"stack": 0}, "sweep.stack must be at least 1"),
        ({"margin": 1.0}, r"sweep.margin must be in \[0, 1\), got 1.0"),
        ({"tuning_metric": "los"}, "did you mean 'loss'"),
        ({"learning_rates": "fast"}, "rates above 0 with commas, got 'fast'"),
    ],
)
def test_a_section_that_is_refused_says_why(section, words):
    with pytest.raises(InputError, match=words):
        tiny_sweep(**section)


def test_empty_sweeps_and_arms_of_one_name_are_refused():
    with pytest.raises(InputError, match="the sweep is empty"):
        tiny_sweep([])
    with pytest.raises(InputError, match="two arms of the sweep are called 'lora'"):
        tiny_sweep([ITEMS[0], ITEMS[0]])
    with pytest.raises(InputError, match="'a b' and 'a/b' would share a folder"):
        tiny_sweep([arm("a b", rank=3), arm("a/b", rank=4)])


def test_arms_are_built_on_the_base_from_shapes():
    counts = tiny_sweep().check_arms(Loads())
    assert counts["lora"] == counts["mos"] > 0
    wide = arm("wide", method="mos", equivalent_rank=2, rank=3, shards_per_vector=7)
    with pytest.raises(InputError, match=r"arm 'wide' cannot be built: .*=7 does not divide"):
        tiny_sweep([*ITEMS, wide]).check_arms(Loads())


def test_data_that_cannot_be_loaded_is_found_before_any_run():
    away = arm("away", {"data.task": "jsonl", "data.train_path": "nowhere.jsonl"}, rank=3)
    with pytest.raises(InputError, match=r"arm 'away' cannot be built: .*nowhere\.jsonl"):
        tiny_sweep([away]).check_arms(Loads())


def test_a_sweep_survives_json():
    own = arm("own", {"sweep.learning_rates": "0.5", "sweep.unequal": True}, rank=3)
    sweep = tiny_sweep([*ITEMS, own], baseline="mos")
    again = Sweep.from_dict(json.loads(json.dumps(sweep.to_dict())))
    assert again.to_dict() == sweep.to_dict()
    assert list(again.every_run()) == list(sweep.every_run())
    assert [one.unequal for one in again.arms] == [False, False, True]
    assert again.baseline == "mos"
    assert tiny_sweep().baselines == ("lora",)
    both = tiny_sweep(baseline="mos, lora")
    assert (both.baseline, both.baselines) == ("mos", ("mos", "lora"))
