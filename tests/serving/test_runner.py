"""What the engine runs on the device: tokens, and that rows leave each other alone.

Compared bitwise wherever the same numbers are computed again: log-probabilities tell more than ids.
"""

import contextlib
import dataclasses
import gc
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import InputError, Sampling, generate, load_base, save_adapter
from mos_jax.adapters.bank import BASE_NAME
from mos_jax.models.base import Base
from mos_jax.models.tokenizer import Tokenizer
from mos_jax.serving.engine_options import EngineOptions
from mos_jax.serving.options import BankOptions
from mos_jax.serving.requests import TokenSampling
from mos_jax.serving.runner import Runner
from mos_jax.serving.tenants import TenantBank
from tests.models.fixtures_decoder import filled_adapter
from tests.models.fixtures_families import family_decoder
from tests.serving.fixtures_tenants import LORA, MOS

PIECE_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, heads, tokens, width, fp32
# Three blocks of the cache, of which the last lies over the second.
SIZES = EngineOptions(rows=4, length=300, pieces=(4, 16), prefix_bytes=4 * PIECE_BYTES)


def prompt_of(length, seed=0):
    return tuple(random.Random(seed).randrange(256) for _ in range(length))


@dataclasses.dataclass(frozen=True)
class Ask:
    tenant: str
    prompt: tuple
    sampling: TokenSampling


GREEDY = TokenSampling(seed=0)
ASKS = (
    Ask("a", prompt_of(150), TokenSampling(seed=0, logprobs=2)),
    Ask(
        "b", prompt_of(37), TokenSampling(temperature=0.9, top_p=0.8, top_k=20, seed=5, logprobs=1)
    ),
    Ask("c", prompt_of(1), TokenSampling(temperature=1.5, seed=9, logprobs=0)),
    Ask(BASE_NAME, prompt_of(270, 1), TokenSampling(seed=0, logprobs=0)),
    # The prompt of "a", of another tenant.
    Ask("b", prompt_of(150), TokenSampling(temperature=0.7, seed=1, logprobs=1)),
    Ask("a", prompt_of(49), TokenSampling(temperature=1.0, top_p=0.6, seed=2)),
)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def adapters(base):
    """Two of MoS, a LoRA, and a LoRA of finite numbers whose products are not."""
    configs = {"a": MOS, "b": MOS, "c": LORA, "broken": LORA}
    made = {n: filled_adapter(base.sites, c, i) for i, (n, c) in enumerate(configs.items())}
    huge = lambda x: x * 1e30 if x.dtype == jnp.float32 else x  # noqa: E731
    made["broken"] = jax.tree.map(huge, made["broken"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base, adapters):
    folder = tmp_path_factory.mktemp("tenants")
    for name, adapter in adapters.items():
        save_adapter(folder / name, adapter, base_fingerprint=base.fingerprint)
    return folder


@contextlib.contextmanager
def running(base, folder=None, sizes=SIZES, **bank_options):
    """A runner that is warm, with all tenants of a folder in use."""
    bank = TenantBank(base, BankOptions(**bank_options))
    if folder is not None:
        assert bank.register_folder(folder) == {}
    runner = Runner(base, bank, sizes)
    runner.warm_up()
    with bank.using(*bank.names):
        yield runner
    bank.close()


@pytest.fixture(scope="module")
def runner(base, folder):
    with running(base, folder) as runner:
        yield runner


@pytest.fixture(autouse=True)
def rows_are_free(request):
    yield
    if "runner" in request.fixturenames:
        runner = request.getfixturevalue("runner")
        for row in range(runner.rows):
            runner.free(row)


def begin(runner, row, ask):
    found = runner.start(row, ask.prompt, ask.tenant, ask.sampling)
    while not runner.prefill(row):
        pass
    return found


def told(info):
    """A token as it is compared, bitwise."""
    return info.token, None if np.isnan(info.logprob) else info.logprob, dict(info.top)


def answer(runner, ask, steps, row=0):
    """What a request gets alone in a row."""
    begin(runner, row, ask)
    got = []
    for _ in range(steps):
        ((at, info),) = runner.decode().fetch()
        assert at == row
        got.append(told(info))
    runner.free(row)
    return got


@pytest.fixture(scope="module")
def alone(runner):
    """What each request gets alone, with nothing kept of any prompt."""
    found = {}
    for ask in ASKS:
        runner.forget(ask.tenant)
        found[ask] = answer(runner, ask, 25)
    return found


@pytest.mark.parametrize("assembly", ["cached", "inside"])
def test_greedy_rows_of_many_tenants_are_what_generate_gives_each(base, adapters, folder, assembly):
    prompts = {"a": prompt_of(35), "b": (7,), "c": prompt_of(5), BASE_NAME: prompt_of(17)}
    sizes = EngineOptions(rows=4, length=64, pieces=(4, 16))
    found = {row: [] for row in range(4)}
    with running(base, folder, sizes, assembly=assembly) as runner:
        for row, (name, prompt) in enumerate(prompts.items()):
            begin(runner, row, Ask(name, prompt, GREEDY))
        for _ in range(6):
            for row, info in runner.decode().fetch():
                found[row].append(info.token)
    for row, (name, prompt) in enumerate(prompts.items()):
        factors = None if name == BASE_NAME else adapters[name].factors()
        want = generate(base.model, [prompt], [-1], Sampling.create(6), factors)
        assert found[row] == want[0], name


@pytest.mark.parametrize("seed", range(3))
def test_whatever_else_happens_a_request_gets_what_it_gets_alone(runner, alone, seed):
    """Requests of all kinds start, go on and are freed in any order, in any row."""
    rng = random.Random(seed)
    compiled, held = runner.compilations, runner.nbytes
    jobs, steps = [], None
    rows = {}  # by row: the job, and whether it is past prefill

    def fetch(step, took_part):
        for row, info in step.fetch():
            took_part[row][1].append(told(info))

    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    with jax.transfer_guard("disallow"):
        for _ in range(220):
            what = rng.choice(
                ("start", "prefill", "prefill", "prefill", "decode", "decode", "free")
            )
            if what == "start" and len(rows) < runner.rows:
                row = rng.choice([row for row in range(runner.rows) if row not in rows])
                job = (rng.choice(ASKS), [])
                runner.start(row, job[0].prompt, job[0].tenant, job[0].sampling)
                jobs.append(job)
                rows[row] = [job, False]
            elif what == "prefill":
                waiting = [row for row, (_, ready) in rows.items() if not ready]
                if waiting:
                    row = rng.choice(waiting)
                    rows[row][1] = runner.prefill(row)
            elif what == "decode":
                step = runner.decode()
                if steps is not None:
                    fetch(*steps)
                steps = step, {row: job for row, (job, ready) in rows.items() if ready}
            elif what == "free" and rows and rng.random() < 0.3:
                row = rng.choice(list(rows))
                runner.free(row)
                del rows[row]
            for row, (job, _) in list(rows.items()):
                if len(job[1]) >= 23:
                    runner.free(row)
                    del rows[row]
        fetch(*steps)
    assert sum(len(got) for _, got in jobs) > 40
    for ask, got in jobs:
        assert got == alone[ask][: len(got)]
    for row in rows:
        runner.free(row)
    assert (runner.compilations, runner.nbytes) == (compiled, held)
    del step, steps
    gc.collect()
    # What the bank remembers of batches is a few bytes.
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 10_000
    prefixes = runner.summary()["prefixes"]
    assert min(prefixes["hits"], prefixes["evictions"], prefixes["kept"]) > 0


def test_every_row_is_like_every_other(runner, alone):
    for row in range(runner.rows):
        for ask in ASKS[1:3]:
            assert answer(runner, ask, 6, row) == alone[ask][:6]


def test_prefixes_are_of_one_tenant_and_change_no_bit(runner, alone):
    first, other = ASKS[0], ASKS[4]
    assert first.prompt == other.prompt
    for name in ("a", "b", "c", BASE_NAME):
        runner.forget(name)
    assert begin(runner, 0, first) == 0
    assert begin(runner, 1, other) == 0  # the same tokens, of another tenant
    runner.free(0)
    runner.free(1)
    runner.forget("b")
    begin(runner, 1, first)
    runner.free(1)
    assert begin(runner, 2, first) == 4 * 16  # as much as is kept
    assert [told(runner.decode().fetch()[0][1])] == alone[first][:1]
    assert runner.start(3, other.prompt, "b", GREEDY) == 0
    runner.free(2)
    runner.forget("a")
    assert runner.start(2, first.prompt, "a", GREEDY) == 0


def test_a_prompt_that_is_computed_while_its_tenant_is_forgotten_leaves_nothing(runner):
    ask = Ask("a", prompt_of(60, 8), GREEDY)
    runner.forget("a")
    runner.start(0, ask.prompt, "a", GREEDY)
    runner.prefill(0)
    runner.forget("a")
    while not runner.prefill(0):
        pass
    assert runner.start(1, ask.prompt, "a", GREEDY) == 0


def test_numbers_that_overflow_harm_neither_neighbours_nor_who_comes_next(runner, alone):
    neighbour, broken = ASKS[0], Ask("broken", prompt_of(200), TokenSampling(seed=0, logprobs=0))
    begin(runner, 1, broken)
    begin(runner, 2, neighbour)
    for step in range(3):
        found = dict(runner.decode().fetch())
        assert told(found[2]) == alone[neighbour][step]
        assert not np.isfinite(found[1].logprob)
    runner.free(1)
    runner.free(2)
    for ask in (ASKS[2], ASKS[1], ASKS[0]):  # short ones first: the rest of the row is still there
        assert answer(runner, ask, 6, 1) == alone[ask][:6]


def test_log_probabilities_are_those_of_the_full_forward(runner, base, adapters, alone):
    ask, got = ASKS[0], alone[ASKS[0]]
    ids = [*ask.prompt, *(token for token, _, _ in got)]
    logits = base.model(jnp.asarray([ids], jnp.int32), adapters["a"].factors())[0]
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))[len(ask.prompt) - 1 :]
    for (token, logprob, top), row in zip(got, want, strict=False):
        assert token == np.argmax(row)
        assert logprob == pytest.approx(row[token], abs=1e-4)
        assert list(top) == np.argsort(-row)[:2].tolist()
        assert list(top.values()) == pytest.approx(np.sort(row)[::-1][:2].tolist(), abs=1e-4)


def test_a_seed_repeats_and_another_differs(runner):
    def sample(seed, temperature=3.0):
        ask = Ask("a", prompt_of(6), TokenSampling(temperature=temperature, seed=seed))
        return [token for token, _, _ in answer(runner, ask, 8)]

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in (3, 4, 2**32 - 1)}) == 3
    assert sample(3, 0.0) == sample(4, 0.0)


def test_a_row_is_used_to_its_last_position(runner):
    begin(runner, 0, Ask("a", prompt_of(runner.length - 1), GREEDY))
    begin(runner, 1, Ask("b", prompt_of(runner.length), GREEDY))
    taking = [[row for row, _ in runner.decode().fetch()] for _ in range(3)]
    assert taking == [[0, 1], [0], []]


def test_a_tenant_that_comes_later_compiles_nothing(base, folder, runner):
    """Reading it, placing, assembling, and a row of it."""
    compiled = runner.compilations
    bank = runner._bank
    for name in "abc":  # in this thread; the bank's own thread compiles no more
        bank._read(name, bank._tenant(name))
    bank.register("late", folder / "b")
    with jax.transfer_guard("disallow"), bank.using("late"):
        begin(runner, 0, Ask("late", prompt_of(20), GREEDY))
        runner.decode().fetch()
        runner.free(0)
    bank.remove("late")
    runner.forget("late")
    assert runner.compilations == compiled


def test_its_bytes_are_what_it_allocates(base):
    bank = TenantBank(base)
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    runner = Runner(base, bank, SIZES)
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) - before == runner.nbytes
    assert runner.summary()["prefixes"]["bytes"] == 4 * PIECE_BYTES
    assert runner.compilations == 0


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "gemma3"])
def test_other_bases_continue_with_their_likeliest_tokens(kind):
    if kind == "gemma3":  # windows in some of the layers
        base = Base("gemma3", family_decoder("gemma3"), Tokenizer.byte_level())
    elif kind == "nf4":
        base = load_base("tiny-random", quantize="nf4")
    else:
        base = load_base("tiny-random", dtype="bfloat16")
    asks = [Ask(BASE_NAME, prompt_of(length), GREEDY) for length in (41, 3)]
    with running(base, sizes=EngineOptions(rows=2, length=64, pieces=(8,))) as runner:
        got = {0: [], 1: []}
        for row, ask in enumerate(asks):
            begin(runner, row, ask)
        for _ in range(8):
            for row, info in runner.decode().fetch():
                got[row].append(info.token)
    for row, ask in enumerate(asks):
        ids = jnp.asarray([[*ask.prompt, *got[row]]], jnp.int32)
        logits = np.asarray(base.model(ids))[0, len(ask.prompt) - 1 : -1]
        chosen = logits[np.arange(8), got[row]]
        # In bfloat16 two ways to the same sum differ, and near ties may go either way.
        room = 0.1 if kind == "bfloat16" else 1e-4
        assert (chosen >= logits.max(-1) - room).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 600}, "length = 600 exceeds the 512 positions"),
        ({"rows": 9}, r"BankOptions.cached = 8 must be at least the 9 rows"),
        ({"prefix_bytes": 5}, "prefix_bytes = 5 holds no piece of 16 tokens"),
    ],
)
def test_sizes_that_cannot_be_are_refused(base, change, words):
    with pytest.raises(InputError, match=words):
        Runner(base, TenantBank(base), dataclasses.replace(SIZES, **change))


def test_calls_out_of_turn_and_prompts_that_cannot_run_are_refused(runner):
    for prompt, words in (
        ((), "1 to 300 tokens, got 0"),
        (prompt_of(301), "got 301"),
        ((5, 320), r"outside 0\.\.319"),
        ((-1,), r"outside 0\.\.319"),
    ):
        with pytest.raises(InputError, match=words):
            runner.start(0, prompt, "a", GREEDY)
    with pytest.raises(InputError, match="row 0 is free"):
        runner.prefill(0)
    runner.start(0, (5,), "a", GREEDY)
    with pytest.raises(InputError, match="row 0 is taken"):
        runner.start(0, (5,), "a", GREEDY)
    with pytest.raises(InputError, match="before the first row"):
        runner.warm_up()
