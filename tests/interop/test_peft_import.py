import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape, select_sites
from mos_jax.adapters.storage import adapter_arrays, load_adapter, save_adapter
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError
from mos_jax.interop.as_lora import lora_from_factors
from mos_jax.interop.peft_fields import KINDS
from mos_jax.interop.peft_import import import_peft, peft_facts
from mos_jax.interop.peft_native import export_native
from tests.adapters.fixtures_adapters import randomised
from tests.interop.fixtures_folders import (
    FIELDS,
    SITES,
    TARGETS,
    edit_config,
    edit_tensors,
    every,
    module,
    tensors_of,
    write_peft,
)

OPTIONS = {"base_name": "org/base", "num_layers": 3}
WANTED = {
    "LORA": LoRAConfig(rank=3, alpha=6),
    "VERA": VeRAConfig(rank=5, projection_seed=3, projections="shared"),
    "VBLORA": VBLoRAConfig(rank=2, num_vectors=6, vector_length=4, top_k=2),
    "UNILORA": UniLoRAConfig(theta_length=50, rank=2, routing_seed=42, used_more="drawn"),
}


def change_by_formula(kind, tensors, name, layer):
    """The dense change of one weight, [h, o] fp64, straight from PEFT's formula for the type."""
    stem = module(name, layer)
    get = {key.removeprefix(f"{stem}."): t.astype(np.float64) for key, t in tensors.items()}
    shape = SITES[name]
    if kind == "LORA":
        return 2 * (get["lora_B.weight"] @ get["lora_A.weight"]).T
    if kind == "VERA":
        a = get["base_model.vera_A"][:, : shape.d_in] * get["vera_lambda_d"][:, None]
        b = get["base_model.vera_B"][: shape.d_out] * get["vera_lambda_b"][:, None]
        return (b @ a).T
    if kind == "VBLORA":
        bank = get["base_model.vblora_vector_bank"]

        def mix(logits):
            out = np.zeros((*logits.shape[:-1], bank.shape[1]))
            for place in np.ndindex(logits.shape[:-1]):
                picked = np.argsort(-logits[place])[:2]
                weights = np.exp(logits[place][picked])
                out[place] = (weights / weights.sum()) @ bank[picked]
            return out

        a = mix(get["vblora_logits_A"]).reshape(2, -1)
        b = mix(get["vblora_logits_B"]).swapaxes(1, 2).reshape(-1, 2)
        return (b @ a).T
    theta = get["base_model.unilora_theta_d"]
    a, b = (
        theta[get[f"unilora_indices_{side}"].astype(int)] * get[f"unilora_scales_{side}"]
        for side in "AB"
    )
    return (b @ a).T


def some(tensors):
    """A name that is there in every type, of a tensor that holds floats."""
    return max(name for name in tensors if not name.startswith("base_model.vera"))


def assert_bitwise(have, want):
    assert set(have) == set(want)
    for name, tensor in want.items():
        assert (have[name].dtype, have[name].shape) == (tensor.dtype, tensor.shape), name
        assert have[name].tobytes() == tensor.tobytes(), name


def test_every_type_is_tested():
    assert set(WANTED) == set(FIELDS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryType:
    def test_the_adapter_is_the_method_with_the_configuration_of_the_file(self, tmp_path, kind):
        adapter = import_peft(write_peft(tmp_path / "x", kind), SITES)
        assert adapter.config == WANTED[kind]
        assert adapter.sites == {name: SITES[name] for name in TARGETS}

    def test_its_changes_are_those_of_the_formula(self, tmp_path, kind):
        folder = write_peft(tmp_path / "x", kind)
        factors, tensors = import_peft(folder, SITES).factors(), tensors_of(folder)
        for name, layer in every():
            want = change_by_formula(kind, tensors, name, layer)
            have = np.asarray(factors[name].delta())[layer]
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())

    def test_out_again_it_is_the_same_file(self, tmp_path, kind):
        folder = write_peft(tmp_path / "x", kind)
        out = export_native(tmp_path / "y", import_peft(folder, SITES), **OPTIONS)
        assert_bitwise(tensors_of(out), tensors_of(folder))
        again = import_peft(out, SITES)
        assert again.config == import_peft(folder, SITES).config

    def test_blocks_that_differ_by_type(self, tmp_path, kind):
        chosen = [("q_proj", 0), ("q_proj", 2), ("down_proj", 1)]
        targets = ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]
        folder = write_peft(
            tmp_path / "x", kind, chosen=chosen, target_modules=[*targets, "layers.1.mlp.down_proj"]
        )
        adapter = import_peft(folder, SITES)
        assert adapter.sites == {
            "q_proj": SiteShape(2, 8, 12, (0, 2)),
            "down_proj": SiteShape(1, 16, 4, (1,)),
        }
        out = export_native(tmp_path / "y", adapter, **OPTIONS)
        assert_bitwise(tensors_of(out), tensors_of(folder))
        assert import_peft(out, SITES).sites == adapter.sites

    def test_saved_as_an_adapter_of_ours(self, tmp_path, kind):
        adapter = import_peft(write_peft(tmp_path / "x", kind), SITES)
        loaded = load_adapter(save_adapter(tmp_path / "y", adapter), sites=SITES)
        assert loaded.config == adapter.config
        assert_bitwise(adapter_arrays(loaded), adapter_arrays(adapter))

    def test_as_a_lora(self, tmp_path, kind):
        folder = write_peft(tmp_path / "x", kind)
        factors = import_peft(folder, SITES).factors()
        lora = import_peft(folder, SITES, as_lora=True)
        assert lora.config.method == "lora"
        for name, low_rank in lora.factors().items():
            for part in ("a", "b", "scale"):
                np.testing.assert_array_equal(getattr(low_rank, part), getattr(factors[name], part))

    def test_halves_become_fp32(self, tmp_path, kind):
        folder = write_peft(tmp_path / "x", kind)

        def round_floats(tensors):
            for name, tensor in tensors.items():
                if tensor.dtype == np.float32 and "scales" not in name:
                    tensors[name] = tensor.astype(ml_dtypes.bfloat16)

        edit_tensors(folder, round_floats)
        out = export_native(tmp_path / "y", import_peft(folder, SITES), **OPTIONS)
        for name, tensor in tensors_of(folder).items():
            np.testing.assert_array_equal(tensors_of(out)[name], tensor.astype(np.float32))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(some(t)), "lacks tensor"),
            (lambda t: t.update({"base_model.model.lm_head.weight": t[some(t)]}), "lm_head.weight"),
            (lambda t: t.update({some(t): t[some(t)][:1]}), r"must be \["),
            (lambda t: t.update({some(t): np.nan * t[some(t)]}), "not finite"),
            (lambda t: t.update({some(t): t[some(t)].astype(np.float64)}), "got float64"),
        ],
    )
    def test_refused_tensors(self, tmp_path, kind, change, message):
        folder = write_peft(tmp_path / "x", kind)
        edit_tensors(folder, change)
        with pytest.raises(InputError, match=message):
            import_peft(folder, SITES)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save = .*\(whole modules"),
            ({"bias": "all"}, "bias = 'all'"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out = True .*Conv1D"),
            ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
            ({"r": 0}, "r must be an integer >= 1"),
            ({"r": 10**30}, r"must be \[|above every width|more than 64 bits"),
            ({"peft_type": ["LORA"]}, r"peft_type = \['LORA'\] is not supported"),
            ({"target_modules": "a{99999999999999999999}"}, "not a regular expression"),
            ({"from_the_future": 1}, "from_the_future = 1 is not supported; only a plain"),
            ({"use_dora": True}, "use_dora = True"),
            ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head', which is none of the sites"),
        ],
    )
    def test_refused_variants(self, tmp_path, kind, changes, message):
        folder = write_peft(tmp_path / "x", kind)
        edit_config(folder, **changes)
        with pytest.raises(InputError, match=message):
            import_peft(folder, SITES)

    def test_a_pickle_is_not_opened(self, tmp_path, kind):
        folder = write_peft(tmp_path / "x", kind)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(InputError, match=r"is a pickle.*safetensors\.torch\.save_file"):
            import_peft(folder, SITES)


@pytest.mark.parametrize(
    "kind",
    """ADALORA ADAPTION_PROMPT BOFT FOURIERFT HRA IA3 LN_TUNING LOHA LOKR MISS OFT P_TUNING POLY
    PREFIX_TUNING PROMPT_TUNING RANDLORA ROAD SHIRA TRAINABLE_TOKENS XLORA""".split(),
)
def test_other_types_are_refused_by_name(tmp_path, kind):
    folder = write_peft(tmp_path / "x", "LORA")
    edit_config(folder, peft_type=kind)
    with pytest.raises(InputError, match=f"peft_type = '{kind}' is not supported; LORA, VERA"):
        import_peft(folder, SITES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 10**400}, r"lora_alpha must be a finite number|more than 64 bits"),
        ({"lora_alpha": 1e39}, r"lora_alpha must be a finite number|more than 64 bits"),
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"trainable_token_indices": [1]}, "rows of the embeddings"),
        ({"target_parameters": ["mlp.experts"]}, "no linear layer"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"lora_bias": True}, "a bias beside B"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "several times"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"init_lora_weights": "loftq"}, "'loftq' also changes the base"),
        ({"init_lora_weights": "olora"}, "'olora' also changes the base"),
    ],
)
def test_variants_of_lora_are_refused_by_name(tmp_path, changes, message):
    folder = write_peft(tmp_path / "x", "LORA")
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        import_peft(folder, SITES)


class TestLoRA:
    def test_rslora_and_patterns_stay_what_they_are(self, tmp_path):
        patterns = {"down_proj": 2}
        alphas = {r"layers\.1\..*": 5, "q_proj": 3, "o_proj": 9}
        folder = write_peft(
            tmp_path / "x",
            "LORA",
            rank_pattern=patterns,
            alpha_pattern=alphas,
            use_rslora=True,
        )
        adapter = import_peft(folder, SITES)
        del alphas["o_proj"]  # which is not adapted
        assert adapter.config == LoRAConfig(
            rank=3, alpha=6, rslora=True, rank_pattern=patterns, alpha_pattern=alphas
        )
        scales = {name: np.asarray(f.scale) for name, f in adapter.factors().items()}
        root = np.sqrt([3, 2])
        np.testing.assert_allclose(scales["q_proj"], np.array([3, 5, 3]) / root[0], rtol=1e-6)
        np.testing.assert_allclose(scales["down_proj"], np.array([6, 5, 6]) / root[1], rtol=1e-6)
        out = export_native(tmp_path / "y", adapter, **OPTIONS)
        assert_bitwise(tensors_of(out), tensors_of(folder))
        assert import_peft(out, SITES).config == adapter.config

    @pytest.mark.parametrize("alpha", [-6, 0])
    def test_an_alpha_that_no_lora_has_goes_into_b(self, tmp_path, alpha):
        folder = write_peft(tmp_path / "x", "LORA", alpha_pattern={"q_proj": alpha})
        factors = import_peft(folder, SITES).factors()
        assert np.all(np.asarray(factors["q_proj"].scale) > 0)
        tensors = tensors_of(folder)
        for name, layer in every():
            want = change_by_formula("LORA", tensors, name, layer)
            want *= np.sign(alpha) if name == "q_proj" else 1
            have = np.asarray(factors[name].delta())[layer]
            np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)


class TestVeRA:
    @pytest.mark.parametrize("said", [True, False])
    def test_without_its_projections_it_is_refused_with_the_reason(self, tmp_path, said):
        folder = write_peft(tmp_path / "x", "VERA", save_projection=said)
        edit_tensors(folder, lambda t: (t.pop("base_model.vera_A"), t.pop("base_model.vera_B")))
        with pytest.raises(InputError, match=r"projection_prng_key = 3 with PyTorch's generator"):
            import_peft(folder, SITES)

    def test_projections_of_other_widths_are_refused(self, tmp_path):
        folder = write_peft(tmp_path / "x", "VERA")
        edit_tensors(
            folder, lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"][:, 1:]})
        )
        with pytest.raises(InputError, match=r"vera_A must be \[5, 16\], got \[5, 15\]"):
            import_peft(folder, SITES)


def compact(folder, top_k=2):
    """Rewrites a VB-LoRA as PEFT does with save_only_topk_weights."""

    def change(tensors):
        for name in [name for name in tensors if "logits" in name]:
            logits = tensors.pop(name)
            index = np.argsort(-logits, axis=-1)[..., :top_k]
            weights = np.exp(np.take_along_axis(logits, index, -1))
            weights /= weights.sum(-1, keepdims=True)
            tensors[f"{name}_topk_indices"] = index.astype(np.uint8)
            tensors[f"{name}_topk_weights"] = np.ascontiguousarray(weights[..., :-1])

    edit_tensors(folder, change)
    edit_config(folder, save_only_topk_weights=True)


class TestVBLoRA:
    def test_the_compact_form_is_refused_with_what_can_be_done(self, tmp_path):
        folder = write_peft(tmp_path / "x", "VBLORA")
        compact(folder)
        with pytest.raises(InputError, match=r"not the logits.*as_lora=True"):
            import_peft(folder, SITES)

    def test_the_compact_form_has_the_factors_of_the_whole_one(self, tmp_path):
        folder = write_peft(tmp_path / "x", "VBLORA")
        whole = import_peft(folder, SITES).factors()
        compact(folder)
        lora = import_peft(folder, SITES, as_lora=True)
        for name, low_rank in lora.factors().items():
            for part in ("a", "b"):
                have, want = getattr(low_rank, part), getattr(whole[name], part)
                np.testing.assert_allclose(have, want, rtol=0, atol=1e-5)

    def test_an_index_out_of_range_is_refused(self, tmp_path):
        folder = write_peft(tmp_path / "x", "VBLORA")
        compact(folder)
        edit_tensors(
            folder, lambda t: [t[n].fill(6) for n in t if n.endswith("logits_A_topk_indices")]
        )
        with pytest.raises(InputError, match=r"must hold indices from 0 to 5, got 6 to 6"):
            import_peft(folder, SITES, as_lora=True)

    def test_a_length_that_does_not_divide_the_widths_is_refused(self, tmp_path):
        folder = write_peft(tmp_path / "x", "VBLORA")
        edit_config(folder, vector_length=3)
        with pytest.raises(InputError, match="vector_length=3 does not divide"):
            import_peft(folder, SITES)


class TestUniLoRA:
    def test_an_index_that_is_not_saved_is_drawn_as_peft_draws_it(self, tmp_path):
        folder = write_peft(tmp_path / "x", "UNILORA", save_indices=False)
        adapter = import_peft(folder, SITES)
        adapter.check()
        # NumPy does not promise it, and PEFT's folders of this kind mean something else once it
        # changes.
        flat = np.concatenate([table.ravel() for table in adapter.tables().values()])
        assert flat[:8].tolist() == [38, 16, 6, 17, 27, 20, 40, 8]
        out = export_native(tmp_path / "y", adapter, **OPTIONS, save_indices=False)
        assert_bitwise(tensors_of(out), tensors_of(folder))

    def test_an_index_that_peft_would_not_draw_must_be_saved(self, tmp_path):
        adapter = import_peft(write_peft(tmp_path / "x", "UNILORA"), SITES)
        with pytest.raises(
            InputError, match="not the one that PEFT would draw from proj_seed = 42"
        ):
            export_native(tmp_path / "y", adapter, **OPTIONS, save_indices=False)

    def test_scales_of_a_base_in_bf16(self, tmp_path):
        folder = write_peft(tmp_path / "x", "UNILORA")

        def rounded(tensors):
            for name in tensors:
                if "scales" in name:
                    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

        edit_tensors(folder, rounded)
        out = export_native(tmp_path / "y", import_peft(folder, SITES), **OPTIONS)
        for name, tensor in tensors_of(folder).items():
            np.testing.assert_array_equal(tensors_of(out)[name].astype(tensor.dtype), tensor)

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("scales_A", lambda t: 2 * t, "another scale for an entry of theta"),
            ("indices_B", lambda t: t + 50, "must hold indices from 0 to 49"),
            ("indices_B", lambda t: 0 * t, "another scale for an entry|not balanced"),
            ("indices_A", lambda t: t.astype(np.float32), "must hold integers, got float32"),
        ],
    )
    def test_an_index_that_does_not_fit_is_refused(self, tmp_path, part, change, message):
        folder = write_peft(tmp_path / "x", "UNILORA")
        name = f"{module('down_proj', 1)}.unilora_{part}"
        edit_tensors(folder, lambda t: t.update({name: change(t[name])}))
        with pytest.raises(InputError, match=message):
            import_peft(folder, SITES)

    def test_a_rank_that_nothing_bounds_is_refused(self, tmp_path):
        folder = write_peft(tmp_path / "x", "UNILORA", save_indices=False)
        edit_config(folder, r=10**9)
        with pytest.raises(InputError, match=r"r = 1000000000 is above every width .*\(16\)"):
            import_peft(folder, SITES)

    def test_more_entries_than_places_are_refused(self, tmp_path):
        folder = write_peft(tmp_path / "x", "UNILORA", save_indices=False, theta_d_length=1000)
        with pytest.raises(InputError, match="theta_length=1000 must be at most the 240 entries"):
            import_peft(folder, SITES)


class TestAsLoRA:
    """Any method's factors as a LoRA."""

    def test_factors_of_a_sharing_method_stay_what_they_are(self):
        sites = select_sites(SITES, layers=[0, 2])
        config = MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1)
        factors = randomised(create_adapter(config, sites, jax.random.key(0))).factors()
        lora = lora_from_factors(factors, SITES)
        assert lora.sites == sites
        for name, low_rank in lora.factors().items():
            assert low_rank.layers == factors[name].layers
            for part in ("a", "b", "scale"):
                np.testing.assert_array_equal(getattr(low_rank, part), getattr(factors[name], part))
        assert lora.count_trained() == sum(f.count() for f in factors.values())

    def test_ranks_and_scales_by_block(self):
        random = np.random.default_rng(0)
        a, b = (jnp.asarray(random.normal(size=(3, 4, w)), jnp.float32) for w in (8, 12))
        ranks, scale = (4, 1, 2), jnp.asarray([0.3, -2.0, 0.0], jnp.float32)
        mask = (np.arange(4)[None] < np.asarray(ranks)[:, None])[..., None]
        given = LowRank(a * mask, b * mask, scale, None, ranks)
        lora = lora_from_factors({"q_proj": given}, SITES)
        assert lora.site_ranks == {"q_proj": ranks}
        assert lora.count_trained() == 7 * (8 + 12)
        got = lora.factors()["q_proj"]
        np.testing.assert_array_equal(got.scale[:2], [np.float32(0.3), np.float32(2.0)])
        np.testing.assert_array_equal(got.delta(), given.delta())
        # What the other sign and the 0 became.
        np.testing.assert_array_equal(got.b[1], -given.b[1])
        assert not np.any(got.b[2])

    @pytest.mark.parametrize(
        ("factors", "message"),
        [
            ({}, "at least one site type"),
            ({"k_proj": None}, "no such site; .*Known: down_proj, q_proj, up_proj"),
            (
                {"q_proj": LowRank(jnp.ones((2, 1, 8)), jnp.ones((2, 1, 12)), jnp.ones(2))},
                "2 entries for the blocks",
            ),
            (
                {"q_proj": LowRank(jnp.ones((3, 1, 8)), jnp.ones((3, 1, 8)), jnp.ones(3))},
                "are for 8 -> 8, the base has 8 -> 12",
            ),
        ],
    )
    def test_factors_that_do_not_fit_are_refused(self, factors, message):
        with pytest.raises(InputError, match=message):
            lora_from_factors(factors, SITES)


def test_facts_say_what_was_found(tmp_path):
    folder = write_peft(tmp_path / "x", "LORA", use_rslora=True, alpha_pattern={"q_proj": 1})
    assert peft_facts(folder) == {
        "format": "PEFT LORA",
        "rank": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 1},
        "target_modules": ["down_proj", "q_proj"],
        "base_model_name_or_path": "org/base",
        "peft_version": "0.21.2",
    }


def test_a_seed_or_a_block_0_is_a_fact(tmp_path):
    folder = write_peft(tmp_path / "x", "UNILORA", proj_seed=0, layers_to_transform=0)
    facts = peft_facts(folder)
    assert (facts["proj_seed"], facts["layers_to_transform"]) == (0, 0)


class TestNative:
    def build(self, config, sites=SITES):
        return randomised(create_adapter(config, sites, jax.random.key(0)))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                MoSConfig(equivalent_rank=2, rank=2, shards_per_vector=2),
                "PEFT has no type for 'mos'",
            ),
            (
                VeRAConfig(rank=4, projections="shared", rank_pattern={"q_proj": 2}),
                r"no rank_pattern, this adapter has \{'q_proj': 2\}",
            ),
            (
                VBLoRAConfig(rank=2, num_vectors=5, vector_length=4, rank_pattern={"q_proj": 1}),
                "vb_lora: PEFT's type has no rank_pattern",
            ),
            (
                UniLoRAConfig(theta_length=50, rank=2, rank_pattern={"q_proj": 1}),
                "uni_lora: PEFT's type has no rank_pattern",
            ),
            (VeRAConfig(rank=4), r'projections="site_type" has a pair .* 3 site types'),
        ],
    )
    def test_what_peft_cannot_hold_is_refused(self, tmp_path, config, message):
        with pytest.raises(InputError, match=f"{message}.*export_peft writes"):
            export_native(tmp_path / "x", self.build(config), **OPTIONS)
        assert not (tmp_path / "x").exists()

    def test_a_base_that_is_too_short(self, tmp_path):
        adapter = self.build(LoRAConfig(rank=2))
        with pytest.raises(InputError, match="has block 2, a base of 2 has not"):
            export_native(tmp_path / "x", adapter, base_name="b", num_layers=2)

    def test_values_that_are_not_finite(self, tmp_path):
        adapter = self.build(LoRAConfig(rank=2))
        adapter.a["q_proj"][...] = jnp.full((3, 2, 8), jnp.nan)
        with pytest.raises(InputError, match="'a/q_proj' holds values that are not finite"):
            export_native(tmp_path / "x", adapter, **OPTIONS)

    def test_uni_lora_with_the_first_entries_used_more(self, tmp_path):
        adapter = self.build(UniLoRAConfig(theta_length=100, rank=2))
        out = export_native(tmp_path / "x", adapter, **OPTIONS)
        again = import_peft(out, SITES)
        assert again.config == dataclasses.replace(adapter.config, used_more="drawn")
        for name, low_rank in adapter.factors().items():
            np.testing.assert_array_equal(again.factors()[name].a, low_rank.a)
            np.testing.assert_array_equal(again.factors()[name].b, low_rank.b)

    def test_the_card(self, tmp_path):
        adapter = self.build(VBLoRAConfig(rank=2, num_vectors=5, vector_length=4))
        out = export_native(tmp_path / "x", adapter, **OPTIONS, card={"steps": 3})
        text = (out / "README.md").read_text()
        for line in ("- vblora", "# VBLORA adapter", "- **steps**: 3", "| q_proj | 0, 1, 2 | 2 |"):
            assert line in text.splitlines()
