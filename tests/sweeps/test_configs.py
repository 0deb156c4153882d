"""Every sweep in configs/ is built, item by item, and has the budgets that it says."""

import importlib.util
from pathlib import Path

import pytest

from mos_jax.adapters.methods import METHODS, count_parameters
from mos_jax.adapters.sites import SiteShape
from mos_jax.models.known import known_config
from mos_jax.sweeps.definition import Sweep

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.py") if "def get_arms" in path.read_text()
)
BASES = {"smollm2-135m-instruct": "smollm2-135m", "Llama-2-7b-hf": "llama2-7b"}
BASES |= {"Llama-2-13b-hf": "llama2-13b", "Llama-2-70b-hf": "llama2-70b"}
BASES |= {"Llama-3.2-3B": "llama3.2-3b"}


def load(path):
    spec = importlib.util.spec_from_file_location("sweep_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep_of(path):
    module = load(path)
    config = module.get_config()
    return Sweep.create(config.to_dict(), module.get_arms(config))


def counts_of(sweep):
    """Trained parameters by arm, on the shapes of the named base."""
    found = {}
    for run in sweep.final()[: len(sweep.arms)]:
        shapes = known_config(BASES[run.config.base.name]).site_shapes()
        sites = run.config.sites.select({n: SiteShape(*shape) for n, shape in shapes.items()})
        found[run.arm] = sum(count_parameters(run.config.adapter, sites).values())
    return found


def test_the_sweeps_asked_for_are_there():
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in FILES}
    assert names >= {
        "ablations/strategies", "ablations/pilot", "ablations/shards", "ablations/private_rank",
        "ablations/rank", "methods/equal_budget", "paper/llama2_7b", "paper/llama2_13b",
        "paper/llama32_3b", "core_study",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_item_of_every_sweep_is_built(path):
    sweep = sweep_of(path)
    assert len(sweep.arms) > 1
    assert "Command: python experiments/sweep.py" in load(path).__doc__
    unit = counts_of(Sweep.create(sweep.base, [{"arm": "unit", **UNIT}]))["unit"]
    for name, count in counts_of(sweep).items():
        assert count > 0
        budget = sweep.section.budget_rank * unit
        if budget and not sweep.arm(name).unequal and "e=" not in name:
            assert 0.5 * budget < count <= budget, name


UNIT = {"adapter.method": "lora", "adapter.rank": 1}


@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("llama2_7b", {"LoRA e=2": 4_997_120, "MoS e=2": 4_997_120, "MoS e=8": 19_988_480,
                       "LoRA e=64": 159_907_840, "MoS e=8 -sp": 19_988_480}),
        ("llama2_13b", {"LoRA e=2": 7_823_360, "MoS e=2": 7_823_360}),
        ("llama32_3b", {"LoRA e=2": 3_039_232, "MoS e=2": 3_039_232}),
    ],
)  # fmt: skip
def test_the_papers_budgets_are_exact(name, arms):
    counts = counts_of(sweep_of(ROOT / f"configs/paper/{name}.py"))
    assert {arm: counts[arm] for arm in arms} == arms


@pytest.mark.parametrize("rank", ["1", "2", "8"])
def test_every_method_is_in_the_comparison_at_equal_budgets(rank):
    module = load(ROOT / "configs/methods/equal_budget.py")
    config = module.get_config(rank)
    sweep = Sweep.create(config.to_dict(), module.get_arms(config))
    assert {one.overrides["adapter.method"] for one in sweep.arms} == set(METHODS)
    counts, budget = counts_of(sweep), int(rank) * 305_280
    assert counts["LoRA"] == counts["MoS"] == budget
    assert {n for n in counts if sweep.arm(n).unequal} == {"VeRA r=256", f"RaSA r={rank}"}
    assert 1 < counts[f"RaSA r={rank}"] / budget < 1.03
    assert counts["VeRA r=256"] == 209_280
    assert all(counts[n] <= budget for n in counts if not sweep.arm(n).unequal)


def test_the_core_study_compares_at_one_budget():
    sweep = sweep_of(ROOT / "configs/core_study.py")
    counts = counts_of(sweep)
    four_times = counts.pop("LoRA e=8")
    assert set(counts.values()) == {610_560}
    assert four_times == 4 * 610_560
    assert all(len(one.learning_rates) == 3 for one in sweep.arms)
