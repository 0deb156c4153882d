"""A run on a quantised base from its config to the finished adapter, and off that base again."""

import jax
import numpy as np
import pytest
from rich.console import Console

from mos_jax import InputError
from mos_jax.adapters.low_rank import LowRank
from mos_jax.finished import load_finished
from mos_jax.interop.merged import merge
from mos_jax.training.config import BaseSection, RunConfig, default_config
from mos_jax.training.loop import train
from mos_jax.training.plan import plan
from mos_jax.training.session import Loads
from tests.training.fixtures_training import tiny_mapping, write_data

TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    mapping = tiny_mapping(write_data(tmp_path_factory.mktemp("data")), steps=2)
    mapping["base"]["quantize"] = "nf4"
    return RunConfig.from_mapping(mapping)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    summary = train(config, folder, Console(quiet=True))
    return folder / "adapter", summary


def logits(finished):
    return jax.jit(lambda model, factors: model(TOKENS, factors))(
        finished.base.model, finished.factors
    )


def test_the_section_says_how_the_base_is_held():
    assert default_config("mos").base.quantize is None
    assert BaseSection.from_mapping("base", {"quantize": "int8"}).quantize == "int8"
    with pytest.raises(InputError, match=r"base\.quantize 'nf5' is unknown; did you mean 'nf4'"):
        BaseSection.from_mapping("base", {"quantize": "nf5"})
    loads, plain = Loads(), BaseSection("tiny-random")
    assert loads.base(plain).quantization is None
    assert loads.base(BaseSection("tiny-random", quantize="int8")).quantization == "int8"


def test_the_dry_run_counts_the_bytes_that_are_held(config):
    found, plain = (
        plan(config),
        plan(RunConfig.from_mapping({**config.to_dict(), "base": {"name": "tiny-random"}})),
    )
    assert found["base"] == {"name": "tiny-random", "dtype": "float32", "quantization": "nf4"}
    sites = sum(s["layers"] * s["d_in"] * s["d_out"] for s in found["sites"].values())
    assert plain["bytes"]["base"] - found["bytes"]["base"] == sites * (32 - 4.25) / 8


def test_an_adapter_finds_its_base_as_it_was_and_serves_on_others_with_a_note(run):
    folder, summary = run
    assert summary["base_quantization"] == "nf4"
    same = load_finished(folder)
    assert (same.base.quantization, same.note) == ("nf4", None)
    other = load_finished(folder, quantize="none")
    assert other.base.quantization is None
    assert "trained on this base in nf4 and is used on it without quantisation" in other.note
    assert "in int8" in load_finished(folder, quantize="int8").note
    assert 0 < abs(logits(same) - logits(other)).max() < 3
    with pytest.raises(InputError, match="unknown quantize = 'nf3'; did you mean 'nf4'"):
        load_finished(folder, quantize="nf3")


def test_merging_gives_a_plain_base_with_the_numbers_of_the_codes(run):
    finished = load_finished(run[0])
    # Larger than a fresh adapter's, so that a change left out would show.
    factors = {n: LowRank(f.a, f.b + 0.05, f.scale) for n, f in finished.factors.items()}
    merged = merge(finished.base, factors)
    assert merged.base.quantization is None
    assert merged.base.fingerprint != finished.base.fingerprint
    name = "blocks/up_proj"
    expected = finished.base.model.weight(name) + factors["up_proj"].delta()
    assert np.allclose(merged.base.model.weight(name), expected, atol=1e-6)
    assert merged.difference < 1e-3
