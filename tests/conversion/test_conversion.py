"""What is found, loaded, written in another format, read back and compared."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.storage import load_adapter, save_adapter
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.conversion.formats import FORMATS, Options, check_request, convert, format_name
from mos_jax.conversion.source import load_source
from mos_jax.errors import InputError
from mos_jax.interop.adapter_gguf import read_adapter_gguf
from mos_jax.interop.check import largest_difference, probe_logits
from mos_jax.interop.peft import read_peft_factors
from mos_jax.models.base import load_base
from mos_jax.models.tiny import tiny_config, tiny_weights
from tests.adapters.test_contract import assert_same
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_models import write_gguf

BASE = "tiny-random"


@pytest.fixture(scope="module")
def base():
    return load_base(BASE)


def saved(folder, base, config=None):
    options = {} if config is None else {"config": config}
    adapter = filled_adapter(base.sites, **options)
    save_adapter(
        folder, adapter, base_fingerprint=base.fingerprint, metadata={"base": BASE, "task": "sums"}
    )
    return folder


@pytest.fixture(scope="module")
def mos(base, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapters") / "mos", base)


def everything_below(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_an_adapter_leaves_exactly_and_comes_back(mos, tmp_path, kind):
    source, out = load_source(mos), tmp_path / "out"
    done = convert(source, out, kind)
    assert (done.difference, done.tokens) == (0.0, 64)
    assert set(done.differences) == {"float32"}
    written = {out} if out.is_file() else set(out.iterdir())
    assert done.files == {file.name: file.stat().st_size for file in written}
    # It is found again for what it is, trains on here, and leaves again as the same factors.
    again = load_source(out, BASE)
    assert again.kind == {"peft": "PEFT LORA", "gguf": "GGUF adapter"}[kind]
    assert_same(again.factors, source.factors)
    assert convert(again, tmp_path / "ours", "mos_jax").difference == 0.0
    ours = load_source(tmp_path / "ours")
    assert ours.finished.method == "lora"
    assert ours.card["imported.format"] == again.kind
    assert_same(ours.factors, source.factors)


def test_the_own_type_of_a_method_keeps_its_size(base, tmp_path):
    vera = saved(tmp_path / "vera", base, VeRAConfig(rank=4, projections="shared"))
    source = load_source(vera)
    done = convert(source, tmp_path / "native", "peft-native")
    assert done.difference == 0.0
    again = load_source(tmp_path / "native")
    assert (again.kind, again.finished.method) == ("PEFT VERA", "vera")
    trained = sum(source.finished.adapter.count_trained_by_site().values())
    assert f"vera, {trained:,} trained parameters" in dict(again.rows())["method"]


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_merged_model_is_the_base_with_its_adapter(base, mos, tmp_path, dtype):
    beside = probe_logits(base.model, load_source(mos).factors)
    done = convert(load_source(mos), tmp_path / "m", "merged", Options(dtype))
    merged = load_source(tmp_path / "m")
    assert (merged.kind, merged.factors) == ("Hugging Face model folder", None)
    difference = largest_difference(beside, probe_logits(merged.base.model))
    assert done.difference == difference
    assert difference < {None: 1e-4, "bfloat16": 0.5, "float16": 0.1}[dtype]
    assert set(done.differences) == {"float32", *(["bfloat16"] if dtype == "bfloat16" else [])}
    raw = json.loads((tmp_path / "m/config.json").read_text())
    assert raw["torch_dtype"] == (dtype or "float32")
    card = (tmp_path / "m/README.md").read_text()
    assert "- **method**: mos" in card
    assert "- **task**: sums" in card
    assert ("lost to rounding" in card) == (dtype == "bfloat16")


def test_a_quantised_base_is_merged_as_the_numbers_it_stands_for(base, mos, tmp_path):
    source = load_source(mos, quantize="int8")
    assert dict(source.rows())["base"].endswith("held in int8")
    beside = probe_logits(source.base.model, source.factors)
    done = convert(source, tmp_path / "m", "merged")
    assert ("base", "turned from int8 into float32") in done.facts
    merged = load_base(tmp_path / "m")
    assert largest_difference(beside, probe_logits(merged.model)) == done.difference < 1e-4
    # Another model than that of the unquantised base.
    assert largest_difference(beside, probe_logits(base.model, load_source(mos).factors)) > 1e-2


def test_a_base_alone_becomes_a_folder(tmp_path):
    config = tiny_config()
    file = write_gguf(tmp_path / "m.gguf", config, tiny_weights(config), "Q8_0", vocabulary=True)
    source = load_source(file)
    assert [name for name, _ in source.rows()] == ["input", "base"]
    assert f"{file.stat().st_size:,} bytes" in source.rows()[0][1]
    done = convert(source, tmp_path / "m", "merged", Options(max_shard_bytes=100_000))
    assert done.difference == 0.0
    assert len([name for name in done.files if name.endswith(".safetensors")]) > 3
    again = load_source(tmp_path / "m").base
    for name, array in load_base(file).model.weights.items():
        assert np.array_equal(again.model.weights[name], array), name


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dry_run_says_what_it_would_write_and_writes_nothing(mos, tmp_path, kind):
    source = load_source(mos, as_lora=True)
    before = everything_below(mos.parent)
    planned = convert(source, tmp_path / "out", kind, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert everything_below(mos.parent) == before
    done = convert(source, tmp_path / "out", kind)
    if kind == "merged":  # headers, and how exact it is, are known only when it is written
        text = {"README.md", "model.safetensors"}
        assert set(planned.files) == set(done.files)
        assert all(planned.files[name] == done.files[name] for name in set(done.files) - text)
        assert 0 < done.files["model.safetensors"] - planned.files["model.safetensors"] < 10_000
        assert not planned.differences
    else:
        assert planned == done


def test_overwriting_is_asked_for_and_replaces_only_its_own(mos, tmp_path):
    for kind in FORMATS:
        out, options = tmp_path / kind, Options(overwrite=True)
        convert(load_source(mos, as_lora=True), out, kind)
        before = everything_below(tmp_path)
        with pytest.raises(InputError, match=r"exists|not empty"):
            convert(load_source(mos, as_lora=True), out, kind)
        assert everything_below(tmp_path) == before
        convert(load_source(mos, as_lora=True), out, kind, options)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years")
    for kind in FORMATS:
        with pytest.raises(InputError):
            convert(load_source(mos, as_lora=True), tmp_path / "own", kind, Options(overwrite=True))
    assert (tmp_path / "own" / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FORMATS, "own"])


def test_one_rank_for_all_sites(base, tmp_path):
    config = LoRAConfig(rank=4, rank_pattern={"q_proj": 2})
    source = load_source(saved(tmp_path / "lora", base, config))
    assert "rank 2" in " ".join(text for _, text in source.rows())
    done = convert(source, tmp_path / "p", "peft", Options(pad_rank=8))
    assert done.difference < 1e-5
    raw = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert (raw["r"], raw["rank_pattern"]) == (8, {})
    assert {f.rank for f in read_peft_factors(tmp_path / "p", base.sites).values()} == {8}


@pytest.mark.parametrize(
    ("times", "words"),
    [(1e4, r"cannot merge \w+ of layer 0"), (1.0, "logits that are not finite")],
)
def test_a_merge_that_overflows_leaves_nothing(base, tmp_path, times, words):
    adapter = filled_adapter(base.sites, LoRAConfig(rank=2, alpha=1e38))
    adapter = jax.tree.map(lambda array: array * times, adapter)
    save_adapter(
        tmp_path / "a", adapter, base_fingerprint=base.fingerprint, metadata={"base": BASE}
    )
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=words):
        convert(load_source(tmp_path / "a"), tmp_path / "m", "merged")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"given": "tinyrandom"}, "did you mean 'tiny-random'"),
        ({"given": BASE, "base": BASE}, "is a base itself"),
        ({"given": BASE, "as_lora": True}, "leave --as_lora out"),
        ({"given": BASE, "quantize": "int3"}, "unknown quantize"),
        ({"given": "{tmp}/empty"}, "no adapter and no model"),
        ({"given": "{tmp}/a.gguf"}, "give --base"),
        ({"given": "{tmp}/adapter_model.bin"}, "pickle"),
        ({"given": "{mos}", "base": "tiny"}, "unknown base 'tiny'"),
    ],
)
def test_inputs_that_are_refused(base, mos, tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    convert(load_source(mos), tmp_path / "a.gguf", "gguf")
    given = options["given"].format(tmp=tmp_path, mos=mos)
    with pytest.raises(InputError, match=words):
        load_source(**{**options, "given": given})


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("pickle", {}, "unknown --format=pickle"),
        (None, {}, "--format is missing"),
        ("mos_jax", {}, "already"),
        ("peft-native", {}, "PEFT has no type for 'mos'"),
        ("peft", {"dtype": "bfloat16"}, "--dtype is for --format=merged"),
        ("merged", {"pad_rank": 8}, "--pad_rank is for --format=peft"),
        ("gguf", {"allow_rounding": True}, "--allow_rounding is for --format=peft"),
        ("peft", {"allow_rounding": True}, "--allow_rounding is for --pad_rank"),
        ("merged", {"dtype": "int8"}, "unknown dtype 'int8'"),
        ("peft", {"pad_rank": 2}, "pad_rank"),
    ],
)
def test_requests_that_are_refused(mos, tmp_path, kind, options, words):
    with pytest.raises(InputError, match=words):
        convert(load_source(mos), tmp_path / "out", kind, Options(**options))
    assert list(tmp_path.iterdir()) == []


def test_a_base_has_one_format_and_nothing_is_written_over_the_input(mos, tmp_path):
    with pytest.raises(InputError, match="the only format for it is 'merged'"):
        check_request(load_source(BASE), tmp_path / "x", "peft", Options())
    shutil.copytree(mos, tmp_path / "mos")
    with pytest.raises(InputError, match="the input itself"):
        convert(
            load_source(tmp_path / "mos", as_lora=True),
            tmp_path / "mos",
            "peft",
            Options(overwrite=True),
        )
    assert load_adapter(tmp_path / "mos").config.method == "mos"


def test_a_folder_with_the_input_or_its_base_in_it_is_not_replaced(base, mos, tmp_path):
    """Replacing a folder would remove them; a model may be written over one that is neither."""
    folder, model = tmp_path / "m", tmp_path / "m/model.gguf"
    convert(load_source(BASE), folder, "merged")
    shutil.copytree(mos, folder / "mos")
    write_gguf(model, base.config, tiny_weights(base.config), "F32", vocabulary=True)
    before = everything_below(tmp_path)
    for given, its_base, words in (
        (folder / "mos", BASE, "m/mos in it, the input itself"),
        (model, None, "m/model.gguf in it, the input itself"),
        (mos, str(model), "m/model.gguf in it, its base itself"),
        (mos, str(folder), "is its base itself"),
    ):
        with pytest.raises(InputError, match=words):
            convert(load_source(given, its_base), folder, "merged", Options(overwrite=True))
    assert everything_below(tmp_path) == before
    convert(load_source(mos, BASE), folder, "merged", Options(overwrite=True))
    assert not model.exists()


def test_every_difference_is_a_number_in_the_table(mos, tmp_path):
    done = convert(load_source(mos), tmp_path / "m", "merged", Options("bfloat16"))
    lines = [text for name, text in done.rows() if name == "largest logit difference"]
    assert [line.rpartition(" ")[2] for line in lines] == ["float32", "bfloat16"]
    assert all(math.isfinite(value) and value > 0 for value in done.differences.values())
    broken = dataclasses.replace(done, differences={})
    assert "largest logit difference" not in dict(broken.rows())
    assert format_name("merged") == "merged"


def test_a_gguf_adapter_lands_on_the_layers_that_it_is_for(base, tmp_path):
    factors = {
        name: dataclasses.replace(f, a=f.a[1:], b=f.b[1:], scale=f.scale[1:], layers=(1,))
        for name, f in filled_adapter(base.sites, LoRAConfig(rank=2)).factors().items()
        if name in ("q_proj", "v_proj")
    }
    from mos_jax.interop.adapter_gguf import write_adapter_gguf

    write_adapter_gguf(tmp_path / "a.gguf", factors, base.config)
    source = load_source(tmp_path / "a.gguf", BASE)
    assert ("sites", "q_proj, v_proj: rank 2, layers [1]") in source.rows()
    assert_same(source.factors, read_adapter_gguf(tmp_path / "a.gguf", base.config))
    assert convert(source, tmp_path / "p", "peft").difference == 0.0
