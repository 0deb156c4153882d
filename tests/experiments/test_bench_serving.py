"""The benchmark of serving in its short form: counts and bytes, no times; and its arithmetic."""

import dataclasses
import json

import pytest

from experiments.bench.engines import Contestant, Engines
from experiments.bench.serving import contestants_of, quick_sizes
from experiments.bench.serving_report import ratios, within
from experiments.bench.tenant_folders import write_tenants
from experiments.bench.traffic import zipf_counts
from mos_jax import LoRAConfig, load_adapter, load_base
from mos_jax.serving.capacity import factor_bytes, pool_bytes
from tests.experiments.fixtures_programs import call

SIZES = quick_sizes()
MOS = SIZES.mos


@pytest.fixture(scope="module")
def base():
    return load_base(SIZES.base, "float32")


class TestTenants:
    def test_folders_are_adapters_and_differ_in_what_is_trained_alone(self, tmp_path, base):
        names = write_tenants(tmp_path, base, MOS, 3)
        one, two, _ = (
            load_adapter(tmp_path / n, sites=base.sites, base_fingerprint=base.fingerprint)
            for n in names
        )
        assert one.tables().keys() == two.tables().keys()
        assert (one.pool_a["q_proj"][...] != two.pool_a["q_proj"][...]).any()

    def test_links_share_arrays_and_a_second_call_makes_what_is_missing(self, tmp_path, base):
        config = LoRAConfig(2)
        names = write_tenants(tmp_path, base, config, 4, distinct=2)
        assert (tmp_path / names[3]).resolve() == (tmp_path / names[1]).resolve()
        kept = (tmp_path / names[0] / "adapter.safetensors").stat().st_mtime_ns
        assert write_tenants(tmp_path, base, config, 5, distinct=2)[4] == "t0004"
        assert (tmp_path / names[0] / "adapter.safetensors").stat().st_mtime_ns == kept


def test_zipf_gives_the_first_most_and_is_the_same_each_time():
    names = [f"t{number}" for number in range(50)]
    drawn = zipf_counts(names, 5000, 1.0, seed=1)
    counts = sorted((drawn.count(name) for name in names), reverse=True)
    harmonic = sum(1 / k for k in range(1, 51))
    assert counts[0] == pytest.approx(5000 / harmonic, rel=0.15)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.25)
    assert drawn == zipf_counts(names, 5000, 1.0, seed=1)
    assert drawn != zipf_counts(names, 5000, 1.0, seed=2)


def test_contestants_of_a_part_have_the_same_requests(tmp_path, base):
    folders = {kind: str(tmp_path) for kind in ("mos", "lora", "lora-budget")}
    for part in ("batch", "rows", "tenants", "peft"):
        chosen = contestants_of(part, folders, SIZES)
        assert len({contestant.name for contestant in chosen}) == len(chosen)
        side = Engines(SIZES.base, chosen)
        asked = {c.rows: [r.prompt for r in side.requests(c.name)] for c in chosen}
        for c in chosen:
            assert [r.prompt for r in side.requests(c.name)] == asked[c.rows]
    (bare, one, different, *_) = contestants_of("batch", folders, SIZES)
    tenants = [
        {request.tenant for request in Engines(SIZES.base, [c]).requests(c.name)}
        for c in (bare, one, different)
    ]
    assert [len(each) for each in tenants] == [1, 1, 8]
    assert tenants[0] == {"__base__"}


def test_the_arithmetic_of_ratios():
    rounds = [
        {"a": {"tokens": 10, "seconds": 1.0}, "b": {"tokens": 10, "seconds": 2.0}},
        # The machine is ten times slower, for both.
        {"a": {"tokens": 10, "seconds": 10.0}, "b": {"tokens": 10, "seconds": 5.0}},
        {"a": {"tokens": 20, "seconds": 1.0}, "b": {"tokens": 10, "seconds": 1.0}},
    ]
    assert ratios({"rounds": rounds}, "a", "b") == [2.0, 0.5, 2.0]
    assert within([2.0, 0.5, 2.0]) == "2.00 (0.50 to 2.00)"


def test_banks_hold_the_bytes_that_are_counted_and_rounds_compile_nothing(tmp_path, base):
    sizes = dataclasses.replace(SIZES, tenants=(8, 12))
    folders = {kind: str(tmp_path / kind) for kind in ("mos", "lora")}
    write_tenants(tmp_path / "mos", base, MOS, 12)
    write_tenants(tmp_path / "lora", base, LoRAConfig(MOS.rank), 12, distinct=3)
    contestants = contestants_of("tenants", {**folders, "lora-budget": ""}, sizes)
    side = Engines(sizes.base, contestants)
    facts = side.prepare()
    pools, tables = pool_bytes(MOS, base.sites, "bfloat16")
    factors = factor_bytes(MOS.rank, base.sites, "bfloat16")
    for count in sizes.tenants:
        assert facts[f"MoS, {count}"]["bank_bytes"] == (count + 1) * pools + tables + 9 * factors
    lora = f"LoRA r={MOS.rank}, 12"
    assert facts[lora]["bank_bytes"] == (facts[lora]["slots"] + 1) * factors
    made = {}
    for contestant in contestants:
        side.run(contestant.name)
        made[contestant.name] = side.told(contestant.name)
    for name, one in made.items():
        assert one["compiled"] == one["failed"] == 0
        assert one["requests"] == sizes.requests
        assert 0 < one["tokens"] <= sizes.requests * sizes.short_answer
        assert one["placed"] == 0 or name == lora
    assert made[lora]["placed"] > 0
    side.close()


def test_the_program_goes_on_where_it_stopped(tmp_path):
    flags = ["--quick", f"--workdir={tmp_path}", "--part=swap", f"--out={tmp_path / 'out'}"]
    first = call("bench_serving", *flags).stdout
    assert "round 1/1" in first
    assert "| mos, host |" in first
    (made,) = json.loads((tmp_path / "swap.json").read_text())["rounds"]
    assert {one["swaps"] for one in made.values()} == {SIZES.swaps}
    before = (tmp_path / "swap.json").read_bytes()
    again = call("bench_serving", *flags[:3]).stdout
    assert "round 1/1" not in again
    assert (tmp_path / "swap.json").read_bytes() == before
    assert "| mos, host |" in (tmp_path / "out" / "serving.md").read_text()


@pytest.mark.parity
def test_peft_answers_the_same_prompts_with_the_same_tokens(tmp_path, base):
    pytest.importorskip("peft")
    from experiments.bench.peft_mixed import PeftMixed

    names = write_tenants(tmp_path, base, MOS, 3, size=0.1)
    contestant = Contestant("mixed", str(tmp_path), 3, 3, 3, 3, "different", 6)
    ours = Engines(SIZES.base, [contestant], dtype="float32")
    prompts = [list(request.prompt) for request in ours.requests("mixed")]
    ours.run("mixed")
    theirs = PeftMixed(SIZES.base, {n: str(tmp_path / n) for n in names}, prompts, 6, 1)
    theirs.run("peft, all different")
    assert ours.answers("mixed") == theirs.told("peft, all different")["answers"]
    theirs.run("peft, base")
    assert ours.answers("mixed") != theirs.told("peft, base")["answers"]
    ours.close()
