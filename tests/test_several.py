import jax
import numpy as np
import pytest

from mos_jax import InputError, LoRAConfig, MoSConfig, combine, load_base, save_adapter
from mos_jax.adapters.bank import BASE_NAME, BankFactors
from mos_jax.adapters.sites import select_sites
from mos_jax.interop.peft import export_peft
from mos_jax.several import load_several
from tests.adapters.test_contract import assert_same
from tests.models.fixtures_decoder import filled_adapter, tokens_of

CONFIGS = {"mos": MoSConfig(2, 3, 2, 1), "lora": LoRAConfig(2)}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def adapters(base):
    sites = select_sites(base.sites, ["q_proj", "down_proj"])
    return {name: filled_adapter(sites, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def folder(base, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    trained_on = {"base": "tiny-random", "config": {"base": {"quantize": "int8"}}}
    metadata = {"mos": {"base": "tiny-random"}, "lora": trained_on}
    for name, adapter in adapters.items():
        save_adapter(
            folder / name, adapter, base_fingerprint=base.fingerprint, metadata=metadata[name]
        )
    factors = adapters["mos"].factors()
    export_peft(folder / "peft", factors, base_name="tiny-random", num_layers=2)
    return folder


def test_adapters_share_one_base_and_are_called_by_their_methods(folder, adapters):
    several = load_several([f"{folder}/mos", f"{folder}/lora", f"law={folder}/peft"])
    assert list(several.factors) == ["mos", "lora", "law"]
    for name, adapter in adapters.items():
        assert_same(several.factors[name], adapter.factors())
    assert_same(several.factors["law"], adapters["mos"].factors())
    (note,) = several.notes
    assert note.startswith("lora: note: the adapter was trained on this base in int8")


def test_rows_of_several_and_of_one(folder, base):
    several = load_several([f"{folder}/mos", f"{folder}/lora"])
    assert several.for_rows([BASE_NAME] * 2) is None
    assert several.for_rows(["lora", "lora"]) is several.factors["lora"]
    rows = several.for_rows(["lora", BASE_NAME, "mos"])
    assert isinstance(rows, BankFactors)
    tokens = tokens_of(base.model, rows=3, length=4)
    run = jax.jit(lambda factors: several.base.model(tokens, factors))
    mixed = run(rows)
    for row, factors in enumerate((several.factors["lora"], None, several.factors["mos"])):
        np.testing.assert_allclose(mixed[row], run(factors)[row], atol=1e-5)


def test_a_written_combination_is_loaded_like_an_adapter(folder, base, tmp_path):
    several = load_several([f"{folder}/mos", f"{folder}/lora"])
    found = combine(list(several.factors.values()), [0.7, -0.3])
    export_peft(tmp_path / "both", found.factors, base_name="tiny-random", num_layers=2)
    again = load_several([f"{tmp_path}/both"])
    assert_same(again.factors["lora"], found.factors)


def test_the_base_alone():
    several = load_several([], "tiny-random", "bfloat16")
    assert (several.factors, several.notes, several.base.dtype) == ({}, (), "bfloat16")
    assert several.for_rows([BASE_NAME]) is None


def test_bad_input_is_refused(folder, tmp_path):
    save_adapter(tmp_path / "nameless", filled_adapter(select_sites(
        load_base("tiny-random").sites, "q_proj"), LoRAConfig(2)))  # fmt: skip
    save_adapter(
        tmp_path / "foreign",
        filled_adapter(select_sites(load_base("tiny-random").sites, "q_proj"), LoRAConfig(2)),
        base_fingerprint="0" * 64,
    )
    for adapters, words in (
        ([], "--adapter is missing"),
        ([f"{folder}/mos", f"mos={folder}/lora"], "two adapters are called 'mos'"),
        (["a=none", "a=neither"], "two adapters are called 'a'"),
        ([f"={folder}/mos"], "the name of an adapter must be"),
        ([f"{BASE_NAME}={folder}/mos"], "the name of an adapter must be"),
        ([f"{tmp_path}/none"], "no adapter at"),
        ([f"{tmp_path}/nameless"], "does not say which base it is for; give --base"),
        ([f"{folder}/mos", f"{tmp_path}/foreign"], "was trained on another base"),
    ):
        with pytest.raises(InputError, match=words):
            load_several(adapters)
