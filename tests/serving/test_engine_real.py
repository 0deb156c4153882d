"""The engine on a real runner, with more tenants than slots and more requests than rows."""

import random
import shutil

import pytest

from mos_jax import (
    BankOptions,
    Engine,
    EngineOptions,
    LoRAConfig,
    Request,
    TenantBank,
    TokenSampling,
    load_base,
    save_adapter,
)
from mos_jax.adapters.bank import BASE_NAME
from tests.models.fixtures_decoder import filled_adapter

NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


def write(folder, base, name, seed):
    adapter = filled_adapter(base.sites, LoRAConfig(rank=2, alpha=40), seed)
    save_adapter(folder / name, adapter, base_fingerprint=base.fingerprint)


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    for seed, name in enumerate(NAMES):
        write(folder, base, name, seed)
    bank = TenantBank(base, BankOptions(slots=2, cached=3, host_bytes=0))
    assert bank.register_folder(folder) == {}
    options = EngineOptions(rows=3, length=64, pieces=(4, 8), prefix_bytes=1 << 20)
    with Engine(base, bank, options) as engine:
        engine.folder = folder
        yield engine
    bank.close()


def requests(count):
    draw = random.Random(count)
    return [
        Request(
            draw.choice([*NAMES, BASE_NAME]),
            tuple(draw.randrange(256) for _ in range(draw.randint(1, 40))),
            TokenSampling(
                max_tokens=draw.randint(1, 20), temperature=draw.choice([0.0, 1.0]), seed=number
            ),
        )
        for number in range(count)
    ]


def test_tokens_do_not_depend_on_order_nor_on_who_gives_up(engine):
    asked = requests(24)
    alone = [engine.complete(request) for request in asked]
    assert len({tuple(info.token for info in answer.tokens) for answer in alone}) > 12
    for seed in range(2):
        order = list(range(len(asked)))
        random.Random(seed).shuffle(order)
        streams = {}
        for number in order:
            streams[number] = engine.stream(asked[number])
            engine.stream(asked[number]).close()
        for number, stream in streams.items():
            answer = stream.answer()
            assert answer.tokens == alone[number].tokens
            assert answer.text == alone[number].text
    summary = engine.summary()
    assert summary["bank"]["slabs"][0]["evictions"] > 10
    assert summary["bank"]["slabs"][0]["in_use"] == 0


def test_a_drawn_seed_can_be_asked_for_again(engine):
    request = Request("a", (1, 2, 3), TokenSampling(max_tokens=12, temperature=1.5))
    first, second = engine.stream(request), engine.stream(request)
    seeds = [stream.ticket.seed for stream in (first, second)]
    tokens = [stream.answer().tokens for stream in (first, second)]
    assert tokens[0] != tokens[1]
    for seed, expected in zip(seeds, tokens, strict=True):
        again = TokenSampling(max_tokens=12, temperature=1.5, seed=seed)
        assert engine.complete(Request("a", (1, 2, 3), again)).tokens == expected


def test_other_weights_under_the_same_name_are_used(engine, base):
    prompt = tuple(range(40))
    ask = {name: Request(name, prompt, TokenSampling(max_tokens=10)) for name in "ab"}
    before = {name: engine.complete(request).tokens for name, request in ask.items()}
    assert before["a"] != before["b"]
    shutil.rmtree(engine.folder / "a")
    write(engine.folder, base, "a", NAMES.index("b"))
    assert engine.unload("a", wait=60)
    engine.load("a", engine.folder / "a")
    assert engine.complete(ask["a"]).tokens == before["b"]


def test_weights_never_change_while_a_tenant_is_known(engine, base):
    prompt = tuple(range(100, 140))
    greedy = TokenSampling(max_tokens=10)
    before = engine.complete(Request("c", prompt, greedy)).tokens
    other = engine.complete(Request("d", prompt, greedy)).tokens
    assert before != other
    shutil.rmtree(engine.folder / "c")
    write(engine.folder, base, "c", NAMES.index("d"))
    for name in "ab":  # take both slots
        engine.complete(Request(name, prompt, greedy))
    answer = engine.complete(Request("c", prompt, greedy))
    assert answer.done.reason == "error"
    assert "has changed on disk since it was registered" in answer.done.detail
    # Behind the engine's back, so that it forgets no prefixes by itself.
    engine.bank.remove("c")
    engine.bank.register("c", engine.folder / "c")
    answer = engine.complete(Request("c", prompt, greedy))
    assert (answer.tokens, answer.done.cached_tokens) == (other, 0)
    assert engine.complete(Request("c", prompt, greedy)).done.cached_tokens == 32


def test_bytes_and_programs_stay_as_they_were(engine):
    before = engine.nbytes, engine.summary()["runner"]["compilations"]
    for stream in [engine.stream(request) for request in requests(12)]:
        stream.answer()
    assert (engine.nbytes, engine.summary()["runner"]["compilations"]) == before
