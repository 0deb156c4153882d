import importlib.util
import json
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from mos_jax import InputError
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.training.config import RunConfig, default_config
from mos_jax.training.resuming import check_resumable
from tests.training.fixtures_training import tiny_mapping

ROOT = Path(__file__).parents[2]
# Those of sweeps are in tests/sweeps; what has no get_config() is shared by other files.
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config" in (text := path.read_text()) and "def get_arms" not in text
)


def load(path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
@pytest.mark.parametrize("method", ["mos", "lora"])
def test_every_config_file_makes_a_run(path, method):
    module = load(path)
    run = RunConfig.from_mapping(module.get_config(method).lock().to_dict())
    assert run.adapter.method == method
    again = RunConfig.from_mapping(json.loads(json.dumps(run.to_dict())))
    assert again.to_dict() == run.to_dict()
    assert "Command:" in module.__doc__


def test_the_quickstart_is_what_the_readme_says():
    run = RunConfig.from_mapping(load(ROOT / "configs/quickstart.py").get_config().to_dict())
    assert run.base.name == "smollm2-135m-instruct"
    assert run.data.task == "family_relationships"
    assert run.data.test_examples is not None
    assert run.data.test_examples >= 256


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("training", "stepz", 3, "unknown field training.stepz; did you mean 'steps'"),
        ("training", "steps", 0, "training.steps must be at least 1, got 0"),
        ("training", "steps", 2.5, "training.steps must be of type int, got 2.5"),
        ("training", "steps", True, "training.steps must be of type int, got True"),
        ("training", "learning_rate", "fast", "learning_rate must be of type float, got 'fast'"),
        ("training", "learning_rate", float("nan"), "learning_rate must be at least 0, got nan"),
        ("training", "schedule", "lineer", "'lineer' is unknown; did you mean 'linear'"),
        ("training", "dropout", 1.0, r"dropout must be in \[0, 1\), got 1.0"),
        ("checkpoint", "keep", 0, "checkpoint.keep must be at least 1"),
        ("adapter", "method", "moss", "unknown method 'moss'; did you mean 'mos'"),
        ("adapter", "rnk", 4, "unknown field 'rnk'; did you mean 'rank'"),
        ("data", "batchsize", 4, "batchsize.*did you mean 'batch_size'"),
    ],
)
def test_a_wrong_field_is_named(section, field, value, words):
    mapping = tiny_mapping("unread.jsonl")
    mapping[section][field] = value
    with pytest.raises(InputError, match=words):
        RunConfig.from_mapping(mapping)


def test_unknown_sections_and_a_missing_method_are_named():
    with pytest.raises(InputError, match="unknown section 'trainng'; did you mean 'training'"):
        RunConfig.from_mapping({"trainng": {}})
    with pytest.raises(InputError, match=r"adapter.method is missing"):
        RunConfig.from_mapping({})
    with pytest.raises(InputError, match="unknown method 'vero'"):
        default_config("vero")
    with pytest.raises(InputError, match="unknown field 'rnk'"):
        default_config("mos", rnk=3)


@pytest.mark.parametrize(
    ("include", "exclude", "layers", "expected"),
    [
        ("all-linear", "", "", 7),
        ("q_proj, v_proj", "", "", 2),
        ("[qkvo]_proj", "o_proj", "0,-1", 3),
    ],
)
def test_sites_are_selected_from_comma_lists(include, exclude, layers, expected):
    mapping = tiny_mapping("unread.jsonl")
    mapping["sites"] = {"include": include, "exclude": exclude, "layers": layers}
    from mos_jax import SiteShape

    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    sites = {name: SiteShape(4, 8, 8) for name in types}
    chosen = RunConfig.from_mapping(mapping).sites.select(sites)
    assert len(chosen) == expected
    if layers:
        assert all(site.layers == (0, 3) for site in chosen.values())


def test_layers_that_are_no_numbers_are_named():
    mapping = tiny_mapping("unread.jsonl")
    mapping["sites"] = {"layers": "first"}
    with pytest.raises(InputError, match="block indices with commas, got 'first'"):
        RunConfig.from_mapping(mapping).sites.select({})


def test_only_what_computes_nothing_new_may_change_on_resuming():
    old = tiny_mapping("a.jsonl")
    new = tiny_mapping("a.jsonl", steps=9)
    new["evaluation"]["every"] = 1
    changes = check_resumable(old, new, "runs/x")
    assert changes == ["evaluation.every: 0 -> 1", "training.steps: 6 -> 9"]
    new["training"]["learning_rate"] = 1.0
    new["adapter"]["rank"] = 4
    with pytest.raises(InputError, match=r"runs/x.*adapter.rank was 3, now 4.*learning_rate was"):
        check_resumable(old, new, "runs/x")


PATTERN = {"layers.0.self_attn.q_proj": 4, "down_proj": 1}


def test_a_config_file_sets_patterns_as_dicts():
    config = default_config("lora", rank_pattern=PATTERN)
    config.adapter.alpha_pattern = '{"q_proj": 2.5}'
    run = RunConfig.from_mapping(config.lock().to_dict())
    assert run.adapter == LoRAConfig(rank_pattern=PATTERN, alpha_pattern={"q_proj": 2.5})
    # As another run's config.json has it.
    stored = json.loads(json.dumps(run.to_dict()))
    assert stored["adapter"]["rank_pattern"] == PATTERN
    assert RunConfig.from_mapping(stored).adapter == run.adapter


def test_a_flag_sets_a_pattern_as_json(monkeypatch):
    argv = ["program", f"--config.adapter.rank_pattern={json.dumps(PATTERN)}"]
    monkeypatch.setattr("sys.argv", argv)  # Where the fields to define flags for are looked up.
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", default_config("lora"), flag_values=values)
    values(argv)
    run = RunConfig.from_mapping(holder.value.to_dict())
    assert run.adapter == LoRAConfig(rank_pattern=PATTERN)


def test_a_pattern_that_is_no_json_object_is_named():
    for text, words in (("q_proj=4", "must be a JSON object"), ("[4]", "must map names")):
        config = default_config("lora")
        config.adapter.rank_pattern = text
        with pytest.raises(InputError, match=f"rank_pattern {words}"):
            RunConfig.from_mapping(config.to_dict())


def test_another_pattern_is_another_run():
    old, new = (
        RunConfig.from_mapping(default_config("lora", rank_pattern=pattern).to_dict()).to_dict()
        for pattern in ({}, PATTERN)
    )
    with pytest.raises(InputError, match=r"adapter\.rank_pattern\.down_proj was None, now 1"):
        check_resumable(old, new, "runs/x")
