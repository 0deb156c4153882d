import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError
from mos_jax.interop.peft import export_peft, read_peft_factors
from mos_jax.interop.vllm import VLLM_RANKS, SiteFactors, check_vllm, max_lora_rank, pad_to_rank
from tests.interop.fixtures_folders import COMMON, FIELDS, config_of

PLAIN = {**COMMON, **FIELDS["LORA"], "peft_type": "LORA", "r": 8}
SITES = {"q_proj": SiteShape(2, 8, 12), "down_proj": SiteShape(2, 16, 4)}


def site(rank, scale, seed=0):
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=(rank, width)).astype(np.float32) for width in (8, 12))
    return SiteFactors(a, b, np.float32(scale))


def change(one):
    """In fp64, where products and sums of so few terms keep every bit that matters."""
    return float(one.scale) * (one.a.astype(np.float64).T @ one.b.astype(np.float64))


class TestCheck:
    def test_a_plain_lora_is_served(self):
        assert check_vllm(PLAIN) == []
        assert check_vllm({**PLAIN, "use_rslora": True}) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "VERA"}, "peft_type = 'VERA': vLLM serves LoRA only"),
            ({"use_dora": True}, "use_dora = True: vLLM does not serve DoRA"),
            ({"modules_to_save": ["lm_head"]}, "vLLM serves no whole modules"),
            ({"bias": "all"}, "bias = 'all': vLLM serves no biases"),
            ({"lora_bias": True}, "lora_bias = True: vLLM serves no biases"),
            ({"rank_pattern": {"q_proj": 4}}, "rank_pattern has 1 entries: vLLM reads r = 8 alone"),
            (
                {"alpha_pattern": {"q_proj": 4, "v_proj": 2}},
                "alpha_pattern has 2 entries: vLLM reads lora_alpha = 6 alone",
            ),
            ({"r": 513}, "r = 513: vLLM serves ranks from 1 to 512"),
            ({"r": None}, "r = None"),
            ({"target_parameters": ["x"]}, "vLLM serves linear layers only"),
        ],
    )
    def test_each_reason_is_said(self, changes, message):
        (found,) = check_vllm({**PLAIN, **changes})
        assert message in found

    def test_all_reasons_are_said(self):
        assert len(check_vllm({**PLAIN, "use_dora": True, "bias": "all", "r": 1000})) == 3

    def test_the_room_that_a_rank_needs(self):
        assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
        with pytest.raises(InputError, match="ranks up to 512, this adapter has 513"):
            max_lora_rank(513)


class TestPad:
    @given(
        ranks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
        exponents=st.lists(st.integers(-6, 6), min_size=4, max_size=4),
        signs=st.lists(st.sampled_from([1, -1, 0]), min_size=4, max_size=4),
        size=st.floats(0.5, 2, width=32),
    )
    def test_scales_a_power_of_two_apart_lose_not_a_bit(self, ranks, exponents, signs, size):
        sites = {
            ("q_proj", k): site(rank, signs[k] * np.float32(size) * 2.0 ** exponents[k], k)
            for k, rank in enumerate(ranks)
        }
        padded, rounded = pad_to_rank(sites, 8)
        assert not rounded
        assert len({one.scale for one in padded.values()}) == 1
        for key, one in padded.items():
            assert one.a.shape[0] == one.b.shape[0] == 8
            assert one.a.dtype == one.b.dtype == np.float32
            np.testing.assert_array_equal(change(one), change(sites[key]))

    def test_other_scales_are_refused_unless_rounding_is_allowed(self):
        sites = {("q_proj", k): site(2, scale, k) for k, scale in enumerate([2.0, 2.0, 3.0])}
        with pytest.raises(
            InputError, match=r"q_proj of block 2 has scale 3.0, the others 2.0.*1.5"
        ):
            pad_to_rank(sites, 8)
        padded, rounded = pad_to_rank(sites, 8, allow_rounding=True)
        assert rounded
        for key, one in padded.items():
            want = change(sites[key])
            # Of each entry of B by half a unit in the last place.
            bound = 6e-8 * np.abs(sites[key].scale) * (np.abs(one.a[:2].T) @ np.abs(sites[key].b))
            assert np.all(np.abs(change(one) - want) <= bound)

    def test_scales_that_are_all_zero(self):
        padded, _ = pad_to_rank({("q_proj", 0): site(2, 0.0)}, 8)
        assert not np.any(change(padded["q_proj", 0]))

    @pytest.mark.parametrize(
        ("rank", "scale", "message"),
        [
            (12, 1.0, "pad_rank must be one of 1, 8, 16, .*got 12"),
            (True, 1.0, "got True"),
            ("16", 1.0, "got '16'"),
            (1, 1.0, "pad_rank=1 is below the rank 2 of q_proj of block 0"),
            (8, 2.0**-140, "B of q_proj of block 1 would overflow"),
        ],
    )
    def test_what_cannot_be_had_is_refused(self, rank, scale, message):
        sites = {("q_proj", 0): site(2, scale), ("q_proj", 1): site(2, 1.0)}
        sites["down_proj", 0] = site(1, scale)  # the common one
        with pytest.raises(InputError, match=message):
            pad_to_rank(sites, rank)


class TestExport:
    FACTORS = {  # noqa: RUF012
        "q_proj": LowRank(
            jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32),
            jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 12)), jnp.float32),
            jnp.asarray([2.0, -0.25], jnp.float32),
        ),
        "down_proj": LowRank(
            jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 16)), jnp.float32),
            jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 4)), jnp.float32),
            jnp.asarray([2.0, 2.0], jnp.float32),
        ),
    }

    def export(self, path, **options):
        return export_peft(path, self.FACTORS, base_name="b", num_layers=2, **options)

    def test_a_padded_folder_is_one_that_vllm_serves(self, tmp_path):
        plain = self.export(tmp_path / "plain")
        assert len(check_vllm(config_of(plain))) == 2
        path = self.export(tmp_path / "x", pad_rank=16)
        raw = config_of(path)
        assert check_vllm(raw) == []
        assert (raw["r"], raw["lora_alpha"]) == (16, 32)
        for name, read in read_peft_factors(path, SITES).items():
            given = self.FACTORS[name]
            r = given.rank
            assert read.rank == 16
            np.testing.assert_array_equal(read.a[:, :r], given.a)
            assert not np.any(read.a[:, r:])
            assert not np.any(read.b[:, r:])
            want = given.scale[:, None, None] * given.b
            np.testing.assert_array_equal(read.scale[:, None, None] * read.b[:, :r], want)
        text = (path / "README.md").read_text()
        assert "bring every site to rank 16, and the sites' own scales are in B, exactly." in text

    def test_what_is_refused_leaves_nothing(self, tmp_path):
        with pytest.raises(InputError, match="pad_rank=1 is below the rank 5 of down_proj"):
            self.export(tmp_path / "x", pad_rank=1)
        assert not any(tmp_path.iterdir())

    def test_the_default_is_as_it_was(self, tmp_path):
        raw = config_of(self.export(tmp_path / "x"))
        assert json.dumps(raw["rank_pattern"])
        assert raw["r"] not in VLLM_RANKS
        assert raw["rank_pattern"]
