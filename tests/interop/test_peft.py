import dataclasses
import json
import os
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.interop.peft_config import find_alpha
from tests.adapters.fixtures_adapters import randomised

SITES = {"q_proj": SiteShape(3, 8, 8), "down_proj": SiteShape(3, 12, 4)}
SOME_LAYERS = {n: SiteShape(3, s.d_in, s.d_out, (0, 2, 3)) for n, s in SITES.items()}
BASE_SITES = {**SITES, "up_proj": SiteShape(3, 8, 12)}
DEEP_SITES = {name: SiteShape(5, site.d_in, site.d_out) for name, site in BASE_SITES.items()}
METHODS = {
    "mos": MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1, alpha=16.0),
    "pure sharing, random scaling": MoSConfig.pure_sharing(
        2, random_scaling="trained", random_scaling_std=0.5
    ),
    "lora": LoRAConfig(rank=3, alpha=7.0),
    "rslora": LoRAConfig(rank=3, alpha=16.0, rslora=True),
}


def factors_of(config, sites=SITES):
    return randomised(create_adapter(config, sites, jax.random.key(0))).factors()


def export(path, factors, num_layers=3, **options):
    return export_peft(path, factors, base_name="org/base", num_layers=num_layers, **options)


def low_rank(rank=2, d_in=8, d_out=8, depth=3, scale=1.0, layers=None, seed=0):
    random = np.random.default_rng(seed)
    a = random.normal(size=(depth, rank, d_in)).astype(np.float32)
    b = random.normal(size=(depth, rank, d_out)).astype(np.float32)
    scale = np.broadcast_to(np.asarray(scale, np.float32), (depth,))
    return LowRank(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale), layers)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder, **changes):
    raw = config_of(folder)
    for name, value in changes.items():
        raw[name] = value
    (folder / "adapter_config.json").write_text(json.dumps(raw))


def edit_arrays(folder, change):
    arrays = load_file(folder / "adapter_model.safetensors")
    change(arrays)
    save_file(arrays, folder / "adapter_model.safetensors")


def assert_same(left, right):
    assert set(left) == set(right)
    for name in left:
        assert left[name].layers == right[name].layers
        for part in ("a", "b", "scale"):
            ours, theirs = (np.asarray(getattr(side[name], part)) for side in (left, right))
            assert ours.dtype == theirs.dtype == np.float32
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def folder(tmp_path):
    return export(tmp_path / "lora", factors_of(METHODS["lora"]))


class TestExport:
    @pytest.mark.parametrize("method", METHODS)
    def test_round_trip_is_exact(self, tmp_path, method):
        factors = factors_of(METHODS[method])
        assert all(np.any(np.asarray(f.b)) for f in factors.values())
        assert_same(read_peft_factors(export(tmp_path / "x", factors), BASE_SITES), factors)

    @pytest.mark.parametrize("method", METHODS)
    def test_round_trip_of_selected_layers(self, tmp_path, method):
        factors = factors_of(METHODS[method], SOME_LAYERS)
        path = export(tmp_path / "x", factors, num_layers=5)
        assert config_of(path)["layers_to_transform"] == [0, 2, 3]
        assert_same(read_peft_factors(path, DEEP_SITES), factors)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_file_is_the_change_of_every_weight(self, tmp_path, method):
        """By PEFT's formula, scale * B A, from the raw files alone."""
        factors = factors_of(METHODS[method], SOME_LAYERS)
        path = export(tmp_path / "x", factors, num_layers=5)
        arrays, raw = load_file(path / "adapter_model.safetensors"), config_of(path)
        assert len(arrays) == 2 * 2 * 3
        for name, block in (("q_proj", "self_attn"), ("down_proj", "mlp")):
            alpha = raw["alpha_pattern"].get(name, raw["lora_alpha"])
            rank = raw["rank_pattern"].get(name, raw["r"])
            delta = np.asarray(factors[name].delta())
            for position, layer in enumerate((0, 2, 3)):
                stem = f"base_model.model.model.layers.{layer}.{block}.{name}.lora_"
                a, b = arrays[stem + "A.weight"], arrays[stem + "B.weight"]
                assert a.shape[0] == b.shape[1] == rank
                np.testing.assert_allclose(
                    alpha / rank * (b @ a).T, delta[position], rtol=1e-4, atol=1e-4
                )

    def test_config(self, tmp_path):
        raw = config_of(export(tmp_path / "x", factors_of(LoRAConfig(rank=4, alpha=16.0))))
        assert raw == {
            "alpha_pattern": {},
            "auto_mapping": None,
            "base_model_name_or_path": "org/base",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": 4,
            "rank_pattern": {},
            "revision": None,
            "target_modules": ["down_proj", "q_proj"],
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
        assert isinstance(raw["lora_alpha"], int)

    def test_ranks_and_scales_that_differ(self, tmp_path):
        factors = {
            "q_proj": low_rank(rank=2, scale=[1.0, 0.3, 1.0]),
            "down_proj": low_rank(rank=4, d_in=12, d_out=4, scale=0.5),
        }
        path = export(tmp_path / "x", factors)
        raw = config_of(path)
        assert (raw["r"], raw["rank_pattern"]) == (2, {"down_proj": 4})
        assert raw["lora_alpha"] == 2
        assert raw["alpha_pattern"] == {"layers.1.self_attn.q_proj": 0.6}
        assert_same(read_peft_factors(path, BASE_SITES), factors)

    def test_block_1_is_not_block_11(self, tmp_path):
        scale = np.ones(12, np.float32)
        scale[1] = 3.0
        factors = {"q_proj": low_rank(depth=12, scale=scale)}
        path = export(tmp_path / "x", factors, num_layers=12)
        assert config_of(path)["alpha_pattern"] == {"layers.1.self_attn.q_proj": 6}
        assert_same(read_peft_factors(path, {"q_proj": SiteShape(12, 8, 8)}), factors)

    def test_types_with_different_layers(self, tmp_path):
        factors = {
            "q_proj": low_rank(depth=2, layers=(0, 1)),
            "down_proj": low_rank(depth=1, d_in=12, d_out=4, layers=(2,)),
        }
        path = export(tmp_path / "x", factors)
        raw = config_of(path)
        assert raw["layers_to_transform"] is None
        assert raw["target_modules"] == [
            "layers.0.self_attn.q_proj",
            "layers.1.self_attn.q_proj",
            "layers.2.mlp.down_proj",
        ]
        assert_same(read_peft_factors(path, BASE_SITES), factors)

    def test_a_full_list_of_layers_is_all_layers(self, tmp_path):
        path = export(tmp_path / "x", {"q_proj": low_rank(layers=(0, 1, 2))})
        assert config_of(path)["layers_to_transform"] is None
        assert read_peft_factors(path, BASE_SITES)["q_proj"].layers is None

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ({}, "at least one entry"),
            ([], "must be a mapping"),
            ({"qproj": low_rank()}, "unknown site type 'qproj'; did you mean 'q_proj'"),
            ({"q_proj": low_rank(rank=0)}, "rank 0, 3 blocks"),
            ({"q_proj": low_rank(depth=2)}, r"2 entries for the blocks \(all\) of a base of 3"),
            ({"q_proj": low_rank(depth=1, layers=(3,))}, r"blocks \[3\] of a base of 3"),
            ({"q_proj": low_rank(depth=2, layers=(1, 0))}, r"blocks \[1, 0\]"),
            ({"q_proj": low_rank(scale=np.nan)}, "scale holds values that are not finite"),
            (
                {"q_proj": LowRank(jnp.ones((2, 8)), jnp.ones((2, 8)), jnp.float32(1))},
                r"must be a \[L, r, h\].*got \[2, 8\]",
            ),
            (
                {"q_proj": LowRank(jnp.ones((3, 2, 8)), jnp.ones((3, 1, 8)), jnp.ones(3))},
                r"\[3, 2, 8\], \[3, 1, 8\] and \[3\]",
            ),
            (
                {
                    "q_proj": LowRank(
                        jnp.ones((3, 2, 8), jnp.bfloat16), jnp.ones((3, 2, 8)), jnp.ones(3)
                    )
                },
                "a must be float32, got bfloat16",
            ),
        ],
    )
    def test_refused_factors(self, tmp_path, factors, message):
        with pytest.raises(InputError, match=message):
            export(tmp_path / "x", factors)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"base_name": ""}, "base_name must be the name of a model"),
            ({"base_name": None}, "got None"),
            ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
            ({"num_layers": True}, "got True"),
            ({"card": {"steps": object()}}, "card: 'steps' is not a JSON value"),
            ({"card": {"loss": float("nan")}}, "card: 'loss'"),
        ],
    )
    def test_refused_options(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            export_peft(
                tmp_path / "x",
                {"q_proj": low_rank()},
                **{"base_name": "b", "num_layers": 3, **options},
            )
        assert not any(tmp_path.iterdir())


class TestRanks:
    """Of factors whose blocks differ in rank, the rows that are real are written."""

    def padded(self, ranks=(2, 1, 2)):
        factors = low_rank()
        a, b = (np.asarray(part).copy() for part in (factors.a, factors.b))
        a[1, 1] = b[1, 1] = 0
        return dataclasses.replace(factors, a=jnp.asarray(a), b=jnp.asarray(b), ranks=ranks)

    def test_they_come_back_as_they_were(self, tmp_path):
        export(tmp_path / "x", {"q_proj": self.padded()})
        arrays = load_file(tmp_path / "x" / "adapter_model.safetensors")
        shapes = [
            arrays[f"base_model.model.model.layers.{k}.self_attn.q_proj.lora_A.weight"].shape
            for k in range(3)
        ]
        assert shapes == [(2, 8), (1, 8), (2, 8)]
        assert config_of(tmp_path / "x")["rank_pattern"] == {"layers.1.self_attn.q_proj": 1}
        read = read_peft_factors(tmp_path / "x", {"q_proj": SiteShape(3, 8, 8)})
        assert_same(read, {"q_proj": self.padded()})
        assert read["q_proj"].ranks == (2, 1, 2)

    @pytest.mark.parametrize(
        ("ranks", "words"),
        [
            ((2, 1), r"have the ranks \[2, 1\]; 3 blocks of rank 1 to 2 are there"),
            ((2, 0, 2), r"have the ranks \[2, 0, 2\]"),
            ((2, 3, 2), r"have the ranks \[2, 3, 2\]"),
            ((1, 1, 2), "entry 0 has rank 1, but a row beyond it is not 0"),
        ],
    )
    def test_ranks_that_the_rows_contradict_are_refused(self, tmp_path, ranks, words):
        with pytest.raises(InputError, match=f"factors of 'q_proj'.*{words}"):
            export(tmp_path / "x", {"q_proj": self.padded(ranks)})
        assert not (tmp_path / "x").exists()


class TestCard:
    def test_says_how_it_was_trained(self, tmp_path):
        card = {"method": "mos", "steps": 300, "config": {"rank": 3}, "note": "a\n# b"}
        factors = factors_of(METHODS["mos"])
        text = (export(tmp_path / "x", factors, card=card) / "README.md").read_text()
        front, body = text.removeprefix("---\n").split("\n---\n", 1)
        assert 'base_model: "org/base"' in front.splitlines()
        assert "library_name: peft" in front.splitlines()
        for line in ("- **method**: mos", "- **steps**: 300", '- **config**: `{"rank": 3}`'):
            assert line in body.splitlines()
        assert "- **note**: a # b" in body.splitlines()
        assert "| q_proj | 0, 1, 2 | 3 | 16 |" in body.splitlines()
        assert f"{sum(f.count() for f in factors.values())} numbers together" in body
        assert 'from_pretrained("org/base")' in body

    def test_without_a_card(self, folder):
        assert "Not recorded." in (folder / "README.md").read_text()


class TestAlpha:
    @pytest.mark.parametrize(
        ("scale", "rank", "alpha"),
        [(2.0, 8, 16), (16 / 7, 7, 16), (16 / 3, 3, 16), (0.1, 1, 0.1), (0.0, 4, 0), (-1.5, 2, -3)],
    )
    def test_the_written_number(self, scale, rank, alpha):
        found = find_alpha(np.float32(scale), rank)
        assert (found, type(found)) == (alpha, type(alpha))

    @given(
        scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
        rank=st.integers(1, 1 << 20),
    )
    def test_the_scale_is_exact(self, scale, rank):
        alpha = json.loads(json.dumps(find_alpha(scale, rank)))
        with np.errstate(over="raise"):
            assert np.float32(alpha / rank) == np.float32(scale)

    @given(
        scale=st.floats(width=32, allow_nan=False, allow_infinity=False), rank=st.integers(1, 512)
    )
    def test_the_product_that_proves_it_is_exact(self, scale, rank):
        assert Fraction(scale * rank) == Fraction(scale) * rank


class TestFolder:
    def test_is_not_overwritten_unasked(self, folder):
        with pytest.raises(InputError, match="is not empty; set overwrite=True"):
            export(folder, {"q_proj": low_rank()})

    def test_is_overwritten_when_asked(self, folder):
        (folder / "stale.txt").touch()
        factors = {"q_proj": low_rank()}
        assert export(folder, factors, overwrite=True) == folder
        assert_same(read_peft_factors(folder, BASE_SITES), factors)
        names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert {file.name for file in folder.iterdir()} == names
        assert list(folder.parent.iterdir()) == [folder]

    def test_something_else_is_never_overwritten(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("x")
        with pytest.raises(InputError, match="not a PEFT adapter"):
            export(tmp_path, {"q_proj": low_rank()}, overwrite=True)
        with pytest.raises(InputError, match="is a file"):
            export(tmp_path / "thesis.txt", {"q_proj": low_rank()}, overwrite=True)
        assert (tmp_path / "thesis.txt").read_text() == "x"

    def test_an_empty_folder_and_missing_parents(self, tmp_path):
        (tmp_path / "empty").mkdir()
        export(tmp_path / "empty", {"q_proj": low_rank()})
        export(tmp_path / "a" / "b", {"q_proj": low_rank()})
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755

    def test_relative_paths_and_links(self, tmp_path, monkeypatch, folder):
        (tmp_path / "link").symlink_to(folder)
        export(tmp_path / "link", {"q_proj": low_rank()}, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        monkeypatch.chdir(folder)
        export(".", {"q_proj": low_rank(seed=1)}, overwrite=True)
        assert_same(read_peft_factors(folder, BASE_SITES), {"q_proj": low_rank(seed=1)})

    @pytest.mark.parametrize("number", range(3))
    def test_an_interrupted_write_leaves_the_old_one(self, folder, monkeypatch, number):
        old, calls = {f.name: f.read_bytes() for f in folder.iterdir()}, []
        fsync = os.fsync

        def interrupt(descriptor):
            calls.append(descriptor)
            if len(calls) > number:
                raise KeyboardInterrupt
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(folder, {"q_proj": low_rank()}, overwrite=True)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == old
        assert list(folder.parent.iterdir()) == [folder]

    @pytest.mark.parametrize("number", range(2))
    def test_a_failed_rename_leaves_the_old_one(self, folder, monkeypatch, number):
        old, calls = {f.name: f.read_bytes() for f in folder.iterdir()}, []
        rename = Path.rename

        def fail(path, target):
            calls.append(path)
            if len(calls) == number + 1:
                raise OSError("disk")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="disk"):
            export(folder, {"q_proj": low_rank()}, overwrite=True)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == old
        assert list(folder.parent.iterdir()) == [folder]


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


class TestRead:
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_halves_become_fp32(self, folder, dtype):
        factors = factors_of(METHODS["lora"])
        edit_arrays(folder, lambda a: a.update({k: v.astype(dtype) for k, v in a.items()}))
        read = read_peft_factors(folder, BASE_SITES)["q_proj"]
        want = np.asarray(factors["q_proj"].a).astype(dtype).astype(np.float32)
        assert read.a.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(read.a), want)

    def test_rslora(self, folder):
        edit_config(folder, use_rslora=True, lora_alpha=16)
        scale = np.asarray(read_peft_factors(folder, BASE_SITES)["q_proj"].scale)
        np.testing.assert_array_equal(scale, np.full(3, 16 / 3**0.5, np.float32))

    def test_ranks_that_differ_by_layer_are_padded(self, tmp_path):
        whole, path = low_rank(rank=3), tmp_path / "x"
        export(path, {"q_proj": whole})

        def shorten(arrays):
            stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
            arrays[stem + "A.weight"] = arrays[stem + "A.weight"][:2].copy()
            arrays[stem + "B.weight"] = arrays[stem + "B.weight"][:, :2].copy()

        edit_arrays(path, shorten)
        key = r"model.layers\.1\..*q_proj"
        edit_config(path, rank_pattern={key: 2}, alpha_pattern={key: 5}, lora_alpha=6)
        read = read_peft_factors(path, BASE_SITES)["q_proj"]
        a, b = np.asarray(whole.a).copy(), np.asarray(whole.b).copy()
        a[1, 2:], b[1, 2:] = 0, 0
        np.testing.assert_array_equal(np.asarray(read.a), a)
        np.testing.assert_array_equal(np.asarray(read.b), b)
        np.testing.assert_array_equal(np.asarray(read.scale), np.array([2, 2.5, 2], np.float32))

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
            {"target_modules": r".*\.(q_proj|down_proj)"},
            {"target_modules": ["self_attn.q_proj", "down_proj"]},
            {"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": r".*\.up_.*"},
            {"layers_to_transform": [2, 0, 1]},
            {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h", "layers"]},
            {"layers_to_transform": []},
            {"rank_pattern": None, "alpha_pattern": None, "task_type": None},
            {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16},
            {"lora_dropout": 0.1, "inference_mode": False, "revision": "main"},
            {"init_lora_weights": "gaussian", "loftq_config": {}, "lora_bias": False},
        ],
    )
    def test_other_ways_to_say_the_same(self, folder, changes):
        edit_config(folder, **changes)
        assert_same(read_peft_factors(folder, BASE_SITES), factors_of(METHODS["lora"]))

    def test_one_layer_as_a_number(self, tmp_path):
        factors = {"q_proj": low_rank(depth=1, layers=(1,))}
        path = export(tmp_path / "x", factors)
        edit_config(path, layers_to_transform=1)
        assert_same(read_peft_factors(path, BASE_SITES), factors)

    def test_onto_selected_sites(self, tmp_path):
        factors = factors_of(METHODS["lora"], SOME_LAYERS)
        path = export(tmp_path / "x", factors, num_layers=5)
        assert_same(read_peft_factors(path, SOME_LAYERS), factors)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "ADALORA"}, "peft_type = 'ADALORA' is not supported"),
            ({"peft_type": None}, "peft_type = None"),
            ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
            (
                {"use_dora": True},
                r"use_dora = True \(DoRA, .*only a plain LoRA is",
            ),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
            ({"bias": "all"}, "bias = 'all' is not supported"),
            ({"lora_bias": True}, "lora_bias = True"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
            ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
            ({"trainable_token_indices": [3]}, "trainable_token_indices"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"from_the_future": 1}, "from_the_future = 1"),
            ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' also changes the base"),
            ({"r": 0}, "r must be an integer >= 1, got 0"),
            ({"r": "8"}, "got '8'"),
            ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
            ({"use_rslora": "yes"}, "use_rslora must be true or false"),
            ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be an object"),
            ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
            ({"alpha_pattern": {"(": 1}}, r"alpha_pattern holds .* not a regular expression"),
            ({"target_modules": None}, "target_modules must be a name or a list of names"),
            ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head', which is none of the sites"),
            ({"target_modules": ["k_proj"]}, "'k_proj'.*did you mean 'q_proj'"),
            ({"target_modules": "nothing"}, "selects none of the base's sites"),
            ({"target_modules": "("}, "not a regular expression"),
            ({"target_modules": []}, "selects none"),
            ({"layers_to_transform": [7]}, "selects none"),
            ({"layers_to_transform": "all"}, "layers_to_transform must be block indices"),
            ({"layers_to_transform": [0]}, "has the extra tensor .*layers.1.* and 5 more"),
            ({"target_modules": ["q_proj"]}, "has the extra tensor .*down_proj.lora_A.weight"),
            ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "lacks tensor .*up_proj"),
            ({"r": 4}, r"must be \[4, 8\], got \[3, 8\]"),
            ({"rank_pattern": {"down_proj": 2}}, r"must be \[2, 12\], got \[3, 12\]"),
        ],
    )
    def test_refused_configs(self, folder, changes, message):
        edit_config(folder, **changes)
        with pytest.raises(InputError, match=message):
            read_peft_factors(folder, BASE_SITES)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop(A0), f"lacks tensor {A0};"),
            (lambda a: a.update({"base_model.model.lm_head.weight": a[A0]}), "lm_head.weight;"),
            (lambda a: a.update({A0: a[A0].T.copy()}), r"must be \[3, 8\], got \[8, 3\]"),
            (lambda a: a.update({A0: a[A0] * np.float32(np.inf)}), "not finite"),
            (lambda a: a.update({A0: a[A0].astype(np.int32)}), "got int32"),
        ],
    )
    def test_refused_tensors(self, folder, change, message):
        edit_arrays(folder, change)
        with pytest.raises(InputError, match=message):
            read_peft_factors(folder, BASE_SITES)

    def test_another_base(self, folder):
        with pytest.raises(InputError, match=r"must be \[3, 16\], got \[3, 8\]"):
            read_peft_factors(folder, {**BASE_SITES, "q_proj": SiteShape(3, 16, 8)})
        with pytest.raises(InputError, match="has the extra tensor"):
            read_peft_factors(folder, {n: SiteShape(2, s.d_in, s.d_out) for n, s in SITES.items()})
        with pytest.raises(InputError, match="lacks tensor"):
            read_peft_factors(folder, DEEP_SITES)
        with pytest.raises(InputError, match="unknown site type 'c_attn'"):
            read_peft_factors(folder, {"c_attn": SiteShape(3, 8, 8)})
        with pytest.raises(InputError, match="no sites"):
            read_peft_factors(folder, {})

    def test_missing_and_torn_files(self, folder):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_peft_factors(folder, BASE_SITES)
        weights.unlink()
        with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
            read_peft_factors(folder, BASE_SITES)
        for text, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
            (folder / "adapter_config.json").write_text(text)
            with pytest.raises(InputError, match=message):
                read_peft_factors(folder, BASE_SITES)
        (folder / "adapter_config.json").unlink()
        for path in (folder, folder / "nowhere", folder / "README.md"):
            with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
                read_peft_factors(path, BASE_SITES)

    def test_a_pickle_is_refused_with_the_way_out(self, folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        for path in (folder, folder / "adapter_model.bin"):
            with pytest.raises(InputError, match=r"is a pickle.*safetensors.torch.save_file"):
                read_peft_factors(path, BASE_SITES)
