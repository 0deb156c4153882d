from typing import Any

import pytest

from mos_jax.adapters.sites import ALL_LINEAR, SITE_TYPES, SiteShape, check_sites, select_sites
from mos_jax.errors import InputError

SITES = {name: SiteShape(4, 8, 16) for name in SITE_TYPES}


def anything(value: Any) -> Any:
    """The value, as a caller without types would pass it."""
    return value


def test_the_site_types_are_the_seven_linear_layers_of_a_block():
    assert SITE_TYPES == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip


def test_all_linear_selects_everything_in_order():
    assert select_sites(SITES) == SITES
    for include in (ALL_LINEAR, [ALL_LINEAR], ["q_proj", ALL_LINEAR]):
        assert list(select_sites(SITES, include)) == list(SITE_TYPES)


@pytest.mark.parametrize(
    ("include", "selected"),
    [
        ("q_proj", ["q_proj"]),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        ("[qv]_proj", ["q_proj", "v_proj"]),
        (("q_proj", ".*up.*|gate.*"), ["q_proj", "gate_proj", "up_proj"]),
        (r"\w_proj", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (["q_proj", "[qk]_proj"], ["q_proj", "k_proj"]),
    ],
)
def test_names_and_expressions_select_in_the_order_of_the_sites(include, selected):
    assert list(select_sites(SITES, include)) == selected


def test_exclude_takes_names_and_expressions_away():
    assert list(select_sites(SITES, exclude="down_proj")) == list(SITE_TYPES[:-1])
    assert list(select_sites(SITES, "[qkv]_proj", exclude=["k.*"])) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["qproj", "proj", "q_pro", "q_proj_", "Q_PROJ"])
def test_a_pattern_that_matches_no_whole_name_raises_with_the_candidates(argument, pattern):
    with pytest.raises(InputError, match=f"{argument}.*'{pattern}' matches no") as error:
        select_sites(SITES, **dict[str, Any]({argument: pattern}))
    assert all(name in str(error.value) for name in SITE_TYPES)


def test_a_misspelled_name_gets_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'gate_proj'"):
        select_sites(SITES, ["q_proj", "gateproj"])


def test_one_dead_pattern_among_live_ones_raises():
    with pytest.raises(InputError, match="'fc1'"):
        select_sites(SITES, ["q_proj", "fc1"])


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["[qv", "a{99999999999}", "(" * 2000 + "a" + ")" * 2000])
def test_a_malformed_expression_raises(argument, pattern):
    with pytest.raises(InputError, match=rf"^{argument}: .* is not a regular expression"):
        select_sites(SITES, **dict[str, Any]({argument: pattern}))


@pytest.mark.parametrize(
    ("include", "exclude"), [((), ()), ("q_proj", "q_proj"), ("[qk]_proj", [".*_proj"])]
)
def test_an_empty_selection_raises(include, exclude):
    with pytest.raises(InputError, match="no sites left"):
        select_sites(SITES, include, exclude)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [([0], (0,)), ([2, 0], (0, 2)), ([-1], (3,)), ([-4, 3], (0, 3)), (range(4), (0, 1, 2, 3))],
)
def test_layers_are_counted_sorted_and_wrapped_from_the_end(layers, chosen):
    selected = select_sites(SITES, "q_proj", layers=layers)
    assert selected == {"q_proj": SiteShape(len(chosen), 8, 16, chosen)}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "block 4 does not exist for 'q_proj'.* 0 to 3"),
        ([-5], "block -5 does not exist"),
        ([1, 1], "block 1 is given twice"),
        ([3, -1], "block 3 is given twice"),
        ([], "empty"),
        ([True], "True is not a block index"),
        ([1.0], "1.0 is not a block index"),
        (["1"], "'1' is not a block index"),
    ],
)
def test_layers_that_cannot_be_used_raise(layers, message):
    with pytest.raises(InputError, match=message):
        select_sites(SITES, "q_proj", layers=layers)


def test_selecting_layers_again_selects_among_the_selected():
    once = select_sites(SITES, "q_proj", layers=[1, 3])
    assert select_sites(once, layers=[3]) == {"q_proj": SiteShape(1, 8, 16, (3,))}
    assert select_sites(once, layers=[-1]) == {"q_proj": SiteShape(1, 8, 16, (3,))}
    with pytest.raises(InputError, match="block 2 does not exist"):
        select_sites(once, layers=[2])


def test_sites_written_by_hand_are_checked_and_copied():
    sites = {"anything": SiteShape(2, 3, 5, (0, 7))}
    checked = check_sites(sites)
    assert checked == sites
    assert checked is not sites


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (SiteShape(0, 8, 8), "num_layers must be a positive integer, got 0"),
        (SiteShape(2, -8, 8), "d_in must be a positive integer, got -8"),
        (SiteShape(2, 8, anything(8.0)), "d_out must be a positive integer, got 8.0"),
        (SiteShape(True, 8, 8), "num_layers must be a positive integer, got True"),
        (SiteShape(2, 8, anything(None)), "d_out must be a positive integer, got None"),
        (SiteShape(2, 8, 8, (0,)), r"num_layers=2 distinct.* got \(0,\)"),
        (SiteShape(2, 8, 8, (1, 1)), r"distinct.* got \(1, 1\)"),
        (SiteShape(2, 8, 8, (2, 0)), r"ascending order, got \(2, 0\)"),
        (SiteShape(2, 8, 8, (-1, 0)), r"got \(-1, 0\)"),
    ],
)
def test_a_site_with_a_wrong_number_raises_with_its_name(site, message):
    with pytest.raises(InputError, match=f"'q_proj'.*{message}"):
        check_sites({"k_proj": SiteShape(2, 8, 8), "q_proj": site})


@pytest.mark.parametrize("function", [check_sites, select_sites])
def test_no_sites_raise(function):
    with pytest.raises(InputError, match="no sites"):
        function({})


@pytest.mark.parametrize("layers", [(0, 1.5), ("0", "1"), (False, True), [0, 1]], ids=str)
def test_layers_that_are_no_tuple_of_integers_are_refused(layers):
    with pytest.raises(InputError, match=r"'q_proj'.*layers"):
        check_sites({"q_proj": SiteShape(2, 8, 8, layers)})


@pytest.mark.parametrize("name", ["a/q_proj", "", 3, "items", "__init__", "_pytree__nodes"])
def test_a_name_that_no_array_can_have_is_refused(name):
    with pytest.raises(InputError, match=f"name of a site type .*{name!r}"):
        check_sites({name: SiteShape(2, 8, 8)})


def test_what_is_no_site_shape_is_refused():
    with pytest.raises(InputError, match=r"'q_proj' must be a SiteShape, got \(2, 8, 8\)"):
        check_sites({"q_proj": anything((2, 8, 8))})


def test_what_is_no_mapping_is_refused():
    with pytest.raises(InputError, match=r"must be a mapping .*\['q_proj'\]"):
        check_sites(anything(["q_proj"]))


class TestModules:
    """Patterns over dotted module names, by which types may have different blocks."""

    def blocks(self, *arguments: Any, **options: Any) -> dict[str, tuple[int, ...] | None]:
        return {
            name: site.layers for name, site in select_sites(SITES, *arguments, **options).items()
        }

    @pytest.mark.parametrize(
        ("include", "selected"),
        [
            ("layers.2.self_attn.q_proj", {"q_proj": (2,)}),
            ("model.layers.2.self_attn.q_proj", {"q_proj": (2,)}),
            ("2.self_attn.q_proj", {"q_proj": (2,)}),
            (
                [r"layers\.[0-2]\.self_attn\.q_proj", r"layers\.[1-3]\..*\.v_proj"],
                {"q_proj": (0, 1, 2), "v_proj": (1, 2, 3)},
            ),
            ([r"0\.mlp\.(up|down)_proj", "k_proj"],
             {"k_proj": None, "up_proj": (0,), "down_proj": (0,)}),
            ("self_attn.[kv]_proj", {"k_proj": None, "v_proj": None}),
            ([r"layers\.[01]\..*q_proj", r"layers\.[1-3]\..*q_proj"], {"q_proj": None}),
        ],
    )  # fmt: skip
    def test_a_pattern_that_matches_no_type_selects_by_module(self, include, selected):
        assert self.blocks(include) == selected

    def test_exclude_takes_single_sites_away(self):
        assert self.blocks(["q_proj", "v_proj"], exclude=r"layers\.[03]\.self_attn\.v_proj") == {
            "q_proj": None,
            "v_proj": (1, 2),
        }
        assert self.blocks("mlp.*", exclude=["0.mlp.*", "up_proj|down_proj"]) == {
            "gate_proj": (1, 2, 3)
        }

    def test_a_pattern_that_matches_a_whole_type_means_types_alone(self):
        # As a module it would match the "l" of "model.layers" everywhere.
        assert list(self.blocks(".*l.*|q_proj")) == ["q_proj"]

    def test_layers_restrict_what_the_patterns_selected(self):
        chosen = self.blocks([r"layers\.[0-2]\..*q_proj", "v_proj"], layers=[-1, 1, 2])
        assert chosen == {"q_proj": (1, 2), "v_proj": (1, 2, 3)}
        with pytest.raises(
            InputError, match=r"layers: \[3\] leaves nothing of 'q_proj'.*\[0, 1, 2\]"
        ):
            self.blocks([r"layers\.[0-2]\..*q_proj", "v_proj"], layers=[3])
        with pytest.raises(InputError, match=r"block 4 does not exist for 'q_proj'.* 0 to 3"):
            self.blocks(r"layers\.[0-2]\..*q_proj", layers=[4])

    def test_blocks_are_named_as_in_the_model(self):
        once = select_sites(SITES, "q_proj", layers=[1, 3])
        assert select_sites(once, "3.self_attn.q_proj") == {"q_proj": SiteShape(1, 8, 16, (3,))}
        with pytest.raises(InputError, match=r"'2\.self_attn\.q_proj' matches no.*1.self_attn"):
            select_sites(once, "2.self_attn.q_proj")

    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_module_that_does_not_exist_raises_with_the_nearest(self, argument):
        with pytest.raises(
            InputError, match=r"did you mean 'model\.layers\.\d\.self_attn\.q_proj'"
        ):
            select_sites(SITES, **dict[str, Any]({argument: "layers.4.self_attn.q_proj"}))

    def test_nothing_left_raises(self):
        with pytest.raises(InputError, match="no sites left"):
            select_sites(SITES, "0.self_attn.q_proj", "q_proj")
