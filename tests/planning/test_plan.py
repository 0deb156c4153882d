"""Slices, requests, verdicts, knobs and searches, with a compiler that answers by rule."""

import dataclasses
import json
import math

import pytest

from mos_jax.errors import InputError
from mos_jax.models.known import known_config
from mos_jax.planning import plan as planning
from mos_jax.planning.chips import CHIPS, find_slice
from mos_jax.planning.counting import Collective, Counts
from mos_jax.planning.estimate import estimate
from mos_jax.planning.plan import advise, knobs, make_plan
from mos_jax.planning.request import Request
from mos_jax.planning.resolving import make_request, spread
from mos_jax.planning.search import candidates, check_search, guessed_seconds, meshes, search
from mos_jax.training.config import RunConfig, default_config
from tests.planning.fixtures_planning import GIB, RuleCompiler, tiny_request


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e:5x5", "v5e:4x4, v5e:4x8"),
        ("v5e", "v5e:16x16"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v9:2x2", "v5e:{1x1,2x2,"),
        ("", "v5p:{2x2x1,"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(name, words):
    with pytest.raises(InputError, match="unknown topology") as refused:
        find_slice(name)
    assert words in str(refused.value)


def test_chips_are_counted():
    sizes = {"v5e:1x1": 1, "v5e:2x4": 8, "v5e:16x16": 256, "v5p:4x4x4": 64}
    assert {name: find_slice(name).count for name in sizes} == sizes
    # 400 GB/s of a v5e chip over 2 axes in both directions; 1200 of a v5p over 3.
    assert [CHIPS[name].axis_bandwidth for name in ("v5e", "v5p")] == [100e9, 200e9]


def paper(name="path/to/Llama-2-7b-hf", **data):
    config = default_config("lora")
    config.base.name = name
    config.data.task = "jsonl"
    config.data.train_path = "nowhere/train.jsonl"
    config.data.batch_size = 16
    config.data.sequence_length = 512
    config.data.update(data)
    return RunConfig.from_mapping(config.to_dict())


def test_a_base_and_data_that_are_not_here_are_assumed_in_words():
    request, notes = make_request(paper(), find_slice("v5e:8x8"))
    assert request.model == known_config("llama2-7b")
    assert (request.rows, request.width, request.targets) == (16, 512, 512)
    assert planning.mesh_sizes(request) == {"data": 1, "fsdp": 16, "tensor": 4}
    assert len(notes) == 3
    fewer, notes = make_request(paper(), find_slice("v5e:8x8"), (2, -1, 8), 100)
    assert planning.mesh_sizes(fewer) == {"data": 2, "fsdp": 4, "tensor": 8}
    assert fewer.targets == 100


@pytest.mark.parametrize(
    ("name", "topology", "noted"),
    [
        ("Llama-2-13b-hf", "v5e:16x16", "tensor 16 does not divide its 40 heads"),
        # Eight key heads, of which each has copies enough for its 64 query heads.
        ("Llama-2-70b-hf", "v5e:16x16", None),
        ("Llama-2-13b-hf", "v5e:8x8", None),
    ],
)
def test_attention_that_no_mesh_of_these_rows_divides_is_noted(name, topology, noted):
    _, notes = make_request(paper(name), find_slice(topology))
    whole = [note.partition(": ")[2] for note in notes if note.startswith("attention of ")]
    assert whole == ([] if noted is None else [noted])


def test_sizes_that_are_here_are_taken_from_there():
    config = default_config("mos", equivalent_rank=2, rank=4)
    config.base.name = "tiny-random"
    config.data.task = "family_relationships"
    config.data.train_examples = config.data.validation_examples = 8
    config.data.test_examples = 8
    request, notes = make_request(RunConfig.from_mapping(config.to_dict()), find_slice("v5e:1x1"))
    assert notes == []
    assert request.model.name.startswith("tiny")
    assert request.targets < request.width


@pytest.mark.parametrize(
    ("config", "mesh", "targets", "words"),
    [
        (lambda: paper("Llama-9-7b"), None, None, "neither there nor named after a public model"),
        (lambda: paper(sequence_length=None), None, None, "data.sequence_length must say"),
        (lambda: paper(), (1, 3, 1), None, "3 devices, there are 64"),
        (lambda: paper(), (1, 1, 1), None, "uses one of the 64 chips"),
        (lambda: paper(), (1, 32, 2), None, "16 rows cannot be divided"),
        (lambda: paper(), None, 513, "from 1 to the 512 tokens"),
    ],
    ids=["base", "length", "product", "one", "rows", "targets"],
)
def test_requests_that_cannot_be_are_refused(config, mesh, targets, words):
    with pytest.raises(InputError, match=words):
        make_request(config(), find_slice("v5e:8x8"), mesh, targets)


@pytest.mark.parametrize(("rows", "chips"), [(16, 1), (16, 8), (16, 256), (6, 8), (5, 4)])
def test_the_chosen_mesh_fits_rows_and_chips(rows, chips):
    data, fsdp, tensor = spread(rows, chips)
    assert data * fsdp * tensor == chips
    assert rows % (data * fsdp) == 0
    # No larger share of the rows is left, so that no mesh has a tensor that divides more heads.
    every = [t for _, _, t in meshes(find_slice("v5e:16x16"), rows, known_config("llama2-13b"))]
    assert chips < 256 or all(other % tensor == 0 for other in every)


@pytest.mark.parametrize("model", ["llama3.1-8b", "gemma3-1b", "qwen2.5-0.5b"])
def test_requests_survive_json(model):
    request = tiny_request(model=known_config(model))
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert again.digest() == request.digest()


def test_a_digest_is_of_what_the_step_depends_on():
    request = tiny_request()
    config = request.config
    data = dataclasses.replace(config.data, seed=7)
    logging = dataclasses.replace(config.logging, every=3)
    same = dataclasses.replace(config, data=data, logging=logging)
    assert dataclasses.replace(request, config=same).digest() == request.digest()
    others = [
        tiny_request(rows=8),
        tiny_request(mesh=(4, 1, 1)),
        tiny_request(remat="full"),
        dataclasses.replace(request, topology="v6e:2x2"),
        dataclasses.replace(request, targets=4),
        dataclasses.replace(request, model=known_config("llama2-7b")),
    ]
    assert len({one.digest() for one in (request, *others)}) == 7


def test_the_roofline_by_hand():
    gathered = Collective("all-gather", 8 * 10**9, 8, 2)
    counts = Counts(197e12, 819e9 / 2, (gathered,), {}, (), cycles=3 * 10**9)
    found = estimate(counts, CHIPS["v5e"], 1000)
    # 7/8 of 8 GB, twice, at 100 GB/s.
    assert (found.compute, found.memory, found.links) == pytest.approx((1.0, 0.5, 0.14))
    assert found.compiler == pytest.approx(2.0)
    assert (found.least, found.most, found.bound) == (1.0, pytest.approx(1.64), "compute")
    assert found.tokens_per_second == pytest.approx((1000 / 1.64, 1000.0))
    assert estimate(counts, CHIPS["v6e"], 1000).compiler is None


def test_verdicts_say_by_how_much():
    plan = make_plan(tiny_request(), RuleCompiler(lambda request: 12 * GIB))
    assert plan.fits
    assert plan.verdict() == "fits: 12.00 GiB of 16.00 GiB of a chip, 4.00 GiB free"
    plan = make_plan(tiny_request(), RuleCompiler(lambda request: 17 * GIB + GIB // 4))
    assert plan.verdict() == "does not fit: 17.25 GiB of 16.00 GiB of a chip, 1.25 GiB too much"
    assert plan.estimate is None
    json.dumps(plan.to_dict())


def test_arrays_that_are_too_much_alone_need_no_compiler():
    request = tiny_request("v5e:1x1", (1, 1, 1), model=known_config("llama2-70b"))
    request = dataclasses.replace(
        request,
        config=dataclasses.replace(
            request.config, base=dataclasses.replace(request.config.base, dtype="bfloat16")
        ),
    )
    compiler = RuleCompiler(lambda request: 200 * GIB)
    plan = make_plan(request, compiler, compile_all=False)
    assert compiler.asked == []
    assert "at least 1" in plan.verdict()
    # 69 billion weights of two bytes, and little more.
    assert 128 * GIB < plan.needed < 130 * GIB
    # Asked for, the compiler says what it needs in all.
    assert make_plan(request, compiler).needed == 200 * GIB


def test_each_knob_makes_a_step_smaller_in_its_own_way():
    request = tiny_request("v5e:2x2", (1, 2, 2), rows=8, remat="products")
    tried = dict(knobs(request))
    assert [flags.split("=")[0] for flags in tried] == [
        "--config.base.remat",
        "--config.data.batch_size",
        "--config.data.batch_size",
        "--config.base.quantize",
        "--config.base.quantize",
        *["--topology"] * 6,
    ]
    # No other set of examples makes up a step, and no mesh has a share without rows.
    for changed in tried.values():
        assert changed.tokens == request.tokens
        sizes = planning.mesh_sizes(changed)
        assert changed.rows % (sizes["data"] * sizes["fsdp"]) == 0
        assert math.prod(sizes.values()) == find_slice(changed.topology).count
    assert list(knobs(tiny_request("v5e:16x16", (1, 4, 64), remat="full", quantize="nf4"))) == []


def test_advice_is_the_first_knob_that_the_compiler_accepts():
    def rule(request):
        whole = request.config.base.quantize is None
        return 15 * GIB if request.rows <= 4 or not whole else 20 * GIB

    request = tiny_request("v5e:2x2", (1, 2, 2), rows=16, remat="products")
    told = []
    compiler = RuleCompiler(rule)
    tried = advise(request, compiler, 9, lambda flags, words: told.append((flags, words)))
    flags = [one for one, _ in tried]
    assert flags == [
        "--config.base.remat=full",
        "--config.data.batch_size=8 --config.training.accumulation=2",
        "--config.data.batch_size=4 --config.training.accumulation=4",
    ]
    assert [plan.fits for _, plan in tried] == [False, False, True]
    assert [one for one, _ in told] == flags
    assert advise(request, RuleCompiler(rule), 0) == []
    assert len(advise(request, RuleCompiler(lambda request: 99 * GIB), 2)) == 2


def test_a_search_tries_every_mesh_and_ranks_what_fits():
    request = tiny_request("v5e:2x2", (1, 4, 1), rows=4)
    settings = candidates(request, rows=(4, 6), remat=("full",))
    found = {(one.rows, *planning.mesh_sizes(one).values()) for one in settings}
    # The tiny model has 4 heads or a multiple; 6 rows divide among 2 and not among 4.
    assert {sizes for sizes in found if sizes[0] == 6} == {(6, 1, 1, 4), (6, 1, 2, 2), (6, 2, 1, 2)}
    assert len({sizes for sizes in found if sizes[0] == 4}) == 6

    def rule(request):
        return (20 if request.config.mesh.data > 1 else 10) * GIB

    ranking = search(request, RuleCompiler(rule), 99, rows=(4, 6), remat=("full",))
    assert ranking.untried == []
    assert len(ranking.plans) == len(settings)
    fits = [plan.fits for plan in ranking.plans]
    assert fits == sorted(fits, reverse=True)
    assert fits.count(False) == sum(sizes[1] > 1 for sizes in found)
    speeds = [plan.estimate.tokens_per_second[1] for plan in ranking.plans if plan.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert ranking.best is ranking.plans[0]
    json.dumps(ranking.to_dict())


def test_attention_that_is_whole_on_every_chip_is_guessed_to_cost_more():
    """Of two models that differ in heads alone, the one whose heads tensor 16 does not divide."""
    whole = known_config("llama2-13b")
    divided = dataclasses.replace(whole, num_heads=80, num_kv_heads=80, head_dim=64)
    seconds = {}
    for model in (whole, divided):
        for mesh in ((1, 16, 16), (1, 32, 8)):
            request = tiny_request("v5e:16x16", mesh, rows=32, model=model, remat="full")
            seconds[model.num_heads, mesh] = guessed_seconds(request)
    assert seconds[40, (1, 32, 8)] == seconds[80, (1, 32, 8)]
    assert seconds[40, (1, 16, 16)] > seconds[80, (1, 16, 16)]
    # Where the rows allow no other mesh, it is tried all the same.
    few = tiny_request("v5e:16x16", (1, 16, 16), rows=16, model=whole)
    sizes = {tuple(planning.mesh_sizes(one).values()) for one in candidates(few, (16,), ("full",))}
    assert (1, 16, 16) in sizes


def test_a_search_compiles_no_more_than_asked():
    request = tiny_request("v5e:2x2", (1, 4, 1), rows=4)
    compiler = RuleCompiler(lambda request: 99 * GIB)
    ranking = search(request, compiler, 3)
    assert len(compiler.asked) == len(ranking.plans) == 3
    assert ranking.best is None
    assert len(ranking.untried) == len(candidates(request)) - 3


@pytest.mark.parametrize(
    ("rows", "remat", "words"),
    [((), ("ful",), "did you mean 'full'"), ((0,), (), "1 or more"), ((7,), (), "")],
)
def test_searches_that_cannot_be_are_refused(rows, remat, words):
    request = tiny_request("v5e:16x16", (1, 4, 64), rows=4)
    with pytest.raises(InputError, match=words or r"no mesh of v5e:16x16 .* 64 and 128 columns"):
        check_search(request, rows, remat)
