"""What a request is answered does not depend, to the bit, on what else the engine does.

Each request is answered alone, in an engine that does nothing else, and again among 31 others of
other tenants, which come and go while it runs. Tokens and their log-probabilities must be equal as
numbers, not nearly: one program of fixed shapes computes every row in the same way, and a prompt is
cut into pieces that depend on it alone.
"""

import random
import threading

import pytest

from experiments.bench.tenant_folders import write_tenants
from mos_jax import LoRAConfig, MoSConfig, load_base
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.serving.engine import Engine
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import Request, TokenSampling
from mos_jax.serving.tenants import TenantBank

ROWS = 32
# Three kinds: two of MoS, each with a slab of its own, and LoRA, held as factors.
CONFIGS = {
    "mos": MoSConfig(equivalent_rank=2, rank=3, shards_per_vector=2, private_rank=1),
    "wide": MoSConfig(equivalent_rank=2, rank=2, pool_scope="width", rank_scaling=True),
    "lora": LoRAConfig(rank=2),
}
NAMES = [f"{kind}{number:04d}" for kind in CONFIGS for number in range(11)]
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 11}


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("tenants")
    for kind, config in CONFIGS.items():
        write_tenants(folder, base, config, 11, size=0.1, prefix=kind)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        ({"assembly": "cached", "dtype": "bfloat16"}, 1 << 20),
        ({"assembly": "inside"}, 0),
    ],
    ids=["cached in bfloat16, with prefixes", "inside"],
)
def engine(request, base, folder):
    options, prefix_bytes = request.param
    # As many slots of each kind as rows: so that 32 of one kind could be in use at a time.
    bank = TenantBank(base, BankOptions(slots=ROWS, cached=ROWS, **options))
    assert bank.register_folder(folder) == {}
    sizes = EngineOptions(rows=ROWS, length=96, pieces=(8, 32), prefix_bytes=prefix_bytes)
    with Engine(base, bank, sizes) as engine:
        yield engine
    bank.close()


def ask(tenant, rng, **sampling):
    prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 60)))
    sampling = {"max_tokens": 20, "logprobs": 2, **sampling}
    return Request(tenant, prompt, TokenSampling(**sampling))


def told(answer):
    """Ids, log-probabilities and alternatives as they are, and how it ended."""
    tokens = [(info.token, info.logprob, dict(info.top)) for info in answer.tokens]
    return answer.text, tokens, answer.done.reason, answer.done.completion_tokens


def others(engine, without, rng, count):
    """Requests of other tenants, of all lengths and kinds of sampling."""
    for name in rng.sample([name for name in [*NAMES, BASE_NAME] if name != without], count):
        yield ask(
            name,
            rng,
            max_tokens=rng.randint(1, 30),
            temperature=rng.choice([0.0, 0.7, 2.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=rng.randrange(1 << 32),
            logprobs=rng.choice([None, 1]),
        )


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("tenant", [NAMES[0], NAMES[11], NAMES[22], BASE_NAME])
def test_alone_and_among_31_others_of_other_tenants(engine, tenant, sampling):
    rng = random.Random(f"{tenant} {sampling}")
    mine = ask(tenant, rng, **sampling)
    alone = told(engine.complete(mine))
    assert alone[3] >= 1
    before = engine.summary()["runner"]["compilations"]
    for trial in range(2):
        # Half of the others are there already, the rest come with it, or after.
        company = list(others(engine, tenant, rng, ROWS - 1))
        at = [ROWS // 2, 0][trial]
        streams = [engine.stream(request) for request in company[:at]]
        own = engine.stream(mine)
        streams += [engine.stream(request) for request in company[at:]]
        assert told(own.answer()) == alone
        for stream in streams:
            assert stream.answer().done.reason in ("stop", "length")
    assert engine.summary()["runner"]["compilations"] == before


def test_all_32_at_once_are_what_each_is_alone(engine):
    rng = random.Random(3)
    requests = [
        ask(name, rng, **(SEEDED if number % 2 else GREEDY))
        for number, name in enumerate(rng.sample(NAMES, ROWS))
    ]
    alone = [told(engine.complete(request)) for request in requests]
    together = [engine.stream(request) for request in requests]
    assert [told(stream.answer()) for stream in together] == alone
    # The answers are those of the tenants: the same request of another is answered otherwise.
    swapped = Request(requests[1].tenant, requests[0].prompt, requests[0].sampling)
    assert told(engine.complete(swapped)) != alone[0]


def test_neighbours_that_are_cancelled_change_nothing(engine):
    rng = random.Random(4)
    mine = ask(NAMES[0], rng, **SEEDED)
    alone = told(engine.complete(mine))
    ended = threading.Event()
    streams = [engine.stream(request) for request in others(engine, NAMES[0], rng, ROWS - 1)]

    def cancel():
        for stream in streams:
            stream.close()
        ended.set()

    own = engine.stream(mine)
    next(own)  # it has begun
    thread = threading.Thread(target=cancel)
    thread.start()
    tokens = told(own.answer())[1]
    thread.join()
    assert ended.is_set()
    assert alone[1][-len(tokens) :] == tokens
    assert {stream.answer().done.reason for stream in streams} <= {"stop", "length", "cancelled"}
