"""Adapters with their base, in and out of every format of the bridge to PEFT."""

import jax
import numpy as np
import pytest

from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import select_sites
from mos_jax.adapters.storage import save_adapter
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from mos_jax.finished import load_finished
from mos_jax.interop.detect import detect
from mos_jax.models.base import load_base
from tests.adapters.fixtures_adapters import randomised

METADATA = {
    "base": "tiny-random",
    "task": "memory",
    "steps": 3,
    "config": {"training": {"learning_rate": 0.1}},
}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


def saved(path, base, config):
    sites = select_sites(base.sites, ["q_proj", "down_proj"])
    adapter = randomised(create_adapter(config, sites, jax.random.key(0)))
    return save_adapter(path, adapter, base_fingerprint=base.fingerprint, metadata=METADATA)


def lines_of(folder):
    return (folder / "README.md").read_text().splitlines()


def assert_same_factors(one, other):
    assert set(one) == set(other)
    for name in one:
        for part in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(one[name], part), getattr(other[name], part))


def test_a_method_of_ours_goes_out_as_a_lora_and_comes_back(tmp_path, base):
    config = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2)
    finished = load_finished(saved(tmp_path / "ours", base, config), base)
    exported = finished.export_peft(tmp_path / "peft")
    assert (exported.rank, exported.difference) == (3, 0.0)
    # How it was trained, in the card.
    for line in ("- **method**: mos", "- **mos.rank**: 3", "- **training.learning_rate**: 0.1"):
        assert line in lines_of(tmp_path / "peft")
    assert not any("null" in line for line in lines_of(tmp_path / "peft"))

    # The folder names a base that is known here.
    back = load_finished(tmp_path / "peft")
    assert back.base.fingerprint == base.fingerprint
    assert back.method == "lora"
    assert_same_factors(back.factors, finished.factors)

    # Saved as an adapter of ours it still says where it is from, and so does the next export.
    again = load_finished(back.save(tmp_path / "again"), base)
    assert again.card.metadata["imported"]["format"] == "PEFT LORA"
    again.export_native(tmp_path / "native")
    assert "- **imported.format**: PEFT LORA" in lines_of(tmp_path / "native")
    with pytest.raises(InputError, match="exists; choose another folder"):
        back.save(tmp_path / "again")


def test_a_method_of_peft_keeps_its_type(tmp_path, base):
    config = VeRAConfig(rank=5, projections="shared")
    finished = load_finished(saved(tmp_path / "ours", base, config), base)
    assert finished.export_native(tmp_path / "peft").difference == 0.0
    assert detect(tmp_path / "peft").kind == "PEFT VERA"
    assert "- **task**: memory" in lines_of(tmp_path / "peft")
    back = load_finished(tmp_path / "peft", base)
    assert back.method == "vera"
    assert_same_factors(back.factors, finished.factors)


def test_any_method_as_a_lora_to_train_on(tmp_path, base):
    config = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2)
    path = saved(tmp_path / "ours", base, config)
    lora = load_finished(path, base, as_lora=True)
    assert lora.method == "lora"
    assert_same_factors(lora.factors, load_finished(path, base).factors)
    lora.export_native(tmp_path / "peft")
    for line in ("- **converted.method**: mos", "- **converted.steps**: 3", "- **method**: lora"):
        assert line in lines_of(tmp_path / "peft")


def test_one_rank_for_all(tmp_path, base):
    config = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2)
    finished = load_finished(saved(tmp_path / "ours", base, config), base)
    exported = finished.export_peft(tmp_path / "peft", pad_rank=16)
    assert exported.rank == 16
    assert exported.difference < 1e-5
    with pytest.raises(InputError, match="below the rank 3"):
        finished.export_peft(tmp_path / "x", pad_rank=1)


def test_a_base_that_is_not_here(tmp_path, base):
    config = VeRAConfig(rank=5, projections="shared")
    finished = load_finished(saved(tmp_path / "ours", base, config), base)
    finished.export_native(tmp_path / "peft")
    config_file = tmp_path / "peft" / "adapter_config.json"
    text = config_file.read_text()
    config_file.write_text(text.replace('"tiny-random"', '"meta-llama/Llama-3.2-1B"'))
    with pytest.raises(InputError, match=r"base 'meta-llama/Llama-3\.2-1B', which is neither"):
        load_finished(tmp_path / "peft")
    config_file.write_text(text.replace('"tiny-random"', "null"))
    with pytest.raises(InputError, match="does not say which base it is for; give --base"):
        load_finished(tmp_path / "peft")
    load_finished(tmp_path / "peft", "tiny-random")
