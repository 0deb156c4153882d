"""Runs that start from an adapter instead of a fresh one."""

import jax
import numpy as np
import pytest

from mos_jax import InputError, LoRAConfig, create_adapter, load_base, save_adapter, select_sites
from mos_jax.adapters.storage import adapter_arrays
from mos_jax.training.session import Session
from tests.adapters.fixtures_adapters import randomised
from tests.experiments.fixtures_programs import call
from tests.training.fixtures_training import tiny_run, write_data

BASE = load_base("tiny-random")


def saved(folder, fingerprint=BASE.fingerprint):
    """A LoRA of chosen blocks and differing ranks, as an import may leave one."""
    sites = select_sites(BASE.sites, ["q_proj", r"1\.mlp\.up_proj"])
    config = LoRAConfig(rank=3, alpha=5.0, rank_pattern={r"layers\.0\..*": 2})
    adapter = randomised(create_adapter(config, sites, jax.random.key(3)))
    save_adapter(folder, adapter, base_fingerprint=fingerprint)
    return adapter


def test_method_settings_sites_and_arrays_are_those_of_the_start(tmp_path):
    adapter = saved(tmp_path / "a")
    run = tiny_run(write_data(tmp_path), start=str(tmp_path / "a"))
    session = Session.create(run)
    assert run.adapter == adapter.config  # the config asks for MoS
    assert session.adapter.sites == adapter.sites
    for name, array in adapter_arrays(adapter).items():
        np.testing.assert_array_equal(adapter_arrays(session.adapter)[name], array, err_msg=name)


def test_the_arrays_of_the_start_are_among_the_facts_that_processes_compare(tmp_path):
    adapter = saved(tmp_path / "a")
    run = tiny_run(write_data(tmp_path), start=str(tmp_path / "a"))
    facts = Session.create(run).facts()
    assert Session.create(run).facts() == facts
    other = jax.tree.map(lambda x: x * 1.001, adapter)
    save_adapter(tmp_path / "a", other, base_fingerprint=BASE.fingerprint)
    changed = Session.create(run).facts()
    assert [name for name in facts if facts[name] != changed[name]] == ["training.start"]


def test_another_base_and_no_adapter_are_refused(tmp_path):
    saved(tmp_path / "a", "0" * 64)
    data = write_data(tmp_path)
    with pytest.raises(InputError, match="another base"):
        Session.create(tiny_run(data, start=str(tmp_path / "a")))
    with pytest.raises(InputError, match=r"adapter\.json is missing"):
        tiny_run(data, start=str(tmp_path))


def test_a_run_goes_on_from_an_import(tmp_path):
    """By the programs: an adapter leaves as a PEFT folder, comes back and is trained on."""
    saved(tmp_path / "a")
    convert = ("--base=tiny-random", f"--in={tmp_path / 'a'}", f"--out={tmp_path / 'peft'}")
    call("convert", *convert, "--format=peft-native")
    again = ("--base=tiny-random", f"--in={tmp_path / 'peft'}", f"--out={tmp_path / 'b'}")
    call("convert", *again, "--format=mos_jax")
    flags = (
        "--config=configs/own_data.py",
        "--config.base.name=tiny-random",
        f"--config.data.train_path={write_data(tmp_path)}",
        "--config.data.validation_examples=2",
        "--config.data.test_examples=2",
        "--config.data.batch_size=2",
        "--config.training.steps=2",
        f"--config.training.start={tmp_path / 'b'}",
        f"--workdir={tmp_path / 'run'}",
    )
    planned = call("train", *flags, "--dry_run").stdout
    assert "q_proj" in planned
    assert "k_proj" not in planned
    call("train", *flags)
    from mos_jax import load_adapter

    trained, started = load_adapter(tmp_path / "run" / "adapter"), load_adapter(tmp_path / "b")
    assert trained.config == started.config
    assert trained.sites == started.sites
    moved = [
        np.abs(array - adapter_arrays(started)[name]).max()
        for name, array in adapter_arrays(trained).items()
    ]
    assert 0 < max(moved) < 0.1
