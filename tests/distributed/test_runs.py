"""Whole runs on meshes: from the config to the adapter, and from one mesh to another."""

import io
import json
import re

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from mos_jax import InputError
from mos_jax.adapters.storage import load_adapter
from mos_jax.models import generation
from mos_jax.models.generation import Sampling, generate
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.plan import plan, print_plan
from mos_jax.training.session import Session
from mos_jax.training.stacking import check_stackable
from tests.training.fixtures_training import tiny_mapping, write_data

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def train_path(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run_config(train_path, sizes=(1, 1, 1), steps=4, **mesh):
    mapping = tiny_mapping(
        train_path, steps=steps, schedule="constant", warmup_share=0.0, dropout=0.1, eps=1e-3
    )
    mapping["training"]["accumulation"] = 2
    mapping["data"]["batch_size"] = 4
    mapping["evaluation"]["test_at_end"] = False
    mapping["mesh"] = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)) | mesh
    return RunConfig.from_mapping(mapping)


def arrays(folder):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_adapter(folder / "adapter"))]


def test_a_run_moves_from_mesh_to_mesh_and_ends_as_on_one_device(tmp_path, train_path):
    alone = train(run_config(train_path), tmp_path / "alone", QUIET)
    moved = tmp_path / "moved"
    # With every array divided at first, then whole, then on one device.
    train(run_config(train_path, (1, 4, 1), 1, shard_above_mib=0.0), moved, QUIET)
    train(run_config(train_path, (2, 1, -1), 3), moved, QUIET)
    found = train(run_config(train_path), moved, QUIET)
    for ours, theirs in zip(arrays(moved), arrays(tmp_path / "alone"), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert found["validation"]["loss"] == pytest.approx(alone["validation"]["loss"], rel=1e-5)
    assert found["base_fingerprint"] == alone["base_fingerprint"]


def test_the_state_lies_where_the_rules_say_before_and_after_a_step(train_path):
    session = Session.create(run_config(train_path, (2, 2, 1), shard_above_mib=0.0))
    state, parts = session.initial()
    batch = session.place_batch(session.data.source(0, 2)[0])
    assert batch.tokens.sharding.shard_shape(batch.tokens.shape)[:2] == (2, 1)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(before.optimizer))
    after, _ = session.train_step()(state, parts, session.base.model, batch)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old, new.ndim)


def test_the_dry_run_prints_where_everything_lies_and_allocates_no_base(train_path, monkeypatch):
    config = run_config(train_path, (1, 2, 2))
    monkeypatch.setattr("mos_jax.models.base.place", None)
    found = plan(config)
    lines = {(line.group, line.name): line for line in found["mesh"]["lines"]}
    held = {group: 0 for group, _ in lines}
    for (group, _), line in lines.items():
        held[group] += line.held
    assert held["base"] == found["bytes"]["base"]
    assert held["trained"] + held["frozen"] == found["bytes"]["adapter"]
    assert held["optimizer"] == found["bytes"]["optimizer"]
    assert held["batch"] == found["bytes"]["batch"]
    assert lines["base", "blocks/up_proj"].shape == (2, 64, 128)
    assert lines["base", "blocks/up_proj"].held == 2 * 64 * 128 * 4 // 4
    console = Console(record=True, width=80, file=io.StringIO())
    print_plan(config, console)
    text = console.export_text()
    assert "mesh: data 1, fsdp 2, tensor 2" in text
    assert re.search(r"^ *blocks/up_proj +2 x 64 x 128 +float32 +-, fsdp, tensor ", text, re.M)
    assert re.search(r"^ *pool_b/gate_proj +\d", text, re.M)
    assert "memory of each device" in text


def test_the_dry_run_of_a_quantised_base_counts_codes(train_path):
    config = run_config(train_path, (1, 2, 2)).to_dict()
    config["base"]["quantize"] = "nf4"
    found = plan(RunConfig.from_mapping(config))
    held = sum(line.held for line in found["mesh"]["lines"] if line.group == "base")
    assert held == found["bytes"]["base"]


def test_what_does_not_fit_a_mesh_is_refused_before_anything_is_loaded(train_path, monkeypatch):
    monkeypatch.setattr("mos_jax.training.session.load_base", None)
    with pytest.raises(InputError, match=r"mesh\.fsdp=3.* need 3 devices, there are"):
        Session.create(run_config(train_path, (1, 3, 1)))
    config = run_config(train_path, (1, -1, 1)).to_dict()
    config["data"]["batch_size"] = 6
    with pytest.raises(InputError, match=r"batch_size=6 rows cannot be divided among"):
        Session.create(RunConfig.from_mapping(config))
    with pytest.raises(InputError, match=r"stacked runs .* one device, but mesh\.data=1, .*=-1"):
        check_stackable([run_config(train_path, (1, -1, 1))])


def test_a_quantised_base_trains_on_a_mesh_as_on_one_device(train_path):
    found = []
    for sizes in ((1, 1, 1), (1, 2, -1)):
        config = run_config(train_path, sizes).to_dict()
        config["base"]["quantize"] = "nf4"
        session = Session.create(RunConfig.from_mapping(config))
        state, parts = session.initial()
        batch = session.place_batch(session.data.source(0, 2)[0])
        state, metrics = session.train_step()(state, parts, session.base.model, batch)
        moments = optax.tree.get(state.optimizer, "mu")
        found.append((float(metrics["loss"]), [np.asarray(m) for m in jax.tree.leaves(moments)]))
    (loss, ours), (expected, theirs) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("count", [3, 4])
def test_answers_are_generated_on_a_mesh_whatever_their_number(train_path, count, monkeypatch):
    """And their tokens lie on every device, since each of several processes reads all of them."""
    prompts = [[65, 66], [67, 68, 69], [70], [71, 72]][:count]
    answers, chosen = [], []
    decode = generation._decode

    def watched(*arguments):
        chosen.append(decode(*arguments))
        return chosen[-1]

    monkeypatch.setattr(generation, "_decode", watched)
    for sizes in ((1, 1, 1), (2, 1, -1)):
        base = Session.create(run_config(train_path, sizes)).base
        answers.append(generate(base.model, prompts, [], Sampling.create(max_new_tokens=3)))
    assert answers[0] == answers[1]
    assert len(chosen) == 4
    assert all(current.is_fully_replicated for current, _ in chosen)


def write_lines(path, numbers):
    lines = (json.dumps({"prompt": f"after {i}?", "completion": str(i + 1)}) for i in numbers)
    path.write_text("".join(f"{line}\n" for line in lines))


def test_what_is_evaluated_is_among_the_facts_that_processes_compare(train_path, tmp_path):
    """One process with other evaluation sets would go through other batches than the rest."""
    mapping = run_config(train_path).to_dict()
    for split in ("validation", "test"):
        mapping["data"][f"{split}_path"] = str(tmp_path / f"{split}.jsonl")
        mapping["data"][f"{split}_examples"] = None
        write_lines(tmp_path / f"{split}.jsonl", range(100, 103))
    config = RunConfig.from_mapping(mapping)
    facts = Session.create(config).facts()
    assert Session.create(config).facts() == facts
    write_lines(tmp_path / "test.jsonl", range(100, 104))
    changed = Session.create(config).facts()
    assert [name for name in facts if facts[name] != changed[name]] == [
        "texts of all sets",
        "test batches",
    ]
