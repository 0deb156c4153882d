"""OpenAI's own client against the real engine on the tiny base, whose answers mean nothing."""

import asyncio
import itertools
import math

import openai
import pytest

from mos_jax import Sampling, generate
from tests.serving.http.fixtures_http import ALL, ANNA, keyring, real_folder, real_server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
MODELS = ("tiny-random", "anna", "dora")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    return folder, *real_folder(folder)


@pytest.fixture(scope="module")
def live(made, tmp_path_factory):
    folder, base, _ = made
    with real_server(folder, base, keyring(tmp_path_factory.mktemp("keys"))) as live:
        yield live


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=ALL, max_retries=0) as client:
        yield client


def chat(client, model="anna", **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=MESSAGES, **options)


def text(answer):
    return answer.choices[0].message.content


@pytest.mark.parametrize("model", MODELS)
def test_an_answer_is_what_the_library_generates(client, made, model):
    _, base, adapters = made
    prompt = base.tokenizer.encode(base.tokenizer.render(MESSAGES, True))
    factors = adapters[model].factors() if model in adapters else None
    stop = [base.tokenizer.end_of_turn]
    (expected,) = generate(base.model, [prompt], stop, Sampling.create(max_new_tokens=12), factors)
    answer = chat(client, model)
    assert text(answer) == base.tokenizer.decode(expected)
    assert answer.model == model
    assert answer.usage.prompt_tokens == len(prompt)


def test_tenants_and_base_answer_differently(client):
    assert len({text(chat(client, model)) for model in MODELS}) == len(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_same_answer(client, model):
    options = {"temperature": 1.0, "seed": 5}
    whole = chat(client, model, **options)
    chunks = list(
        chat(client, model, stream=True, stream_options={"include_usage": True}, **options)
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == text(whole)
    reasons = [chunk.choices[0].finish_reason for chunk in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole.choices[0].finish_reason]
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1


def test_counts(client):
    answer = chat(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.system_fingerprint.startswith("fp_")


class TestSampling:
    def test_a_seed_repeats_an_answer(self, client):
        once, again, other = (text(chat(client, temperature=1.5, seed=seed)) for seed in (1, 1, 2))
        assert once == again != other
        assert text(chat(client, temperature=1.5, seed=1 - (1 << 32))) == once

    def test_without_a_seed_answers_differ(self, client):
        assert len({text(chat(client, temperature=1.5)) for _ in range(3)}) > 1

    def test_the_default_is_to_sample(self, client):
        seeded = {"seed": 3, "max_tokens": 12}
        (default, named) = (
            client.chat.completions.create(model="ben", messages=MESSAGES, **seeded, **options)
            for options in ({}, {"temperature": 1.0})
        )
        assert text(default) == text(named)

    @pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}])
    def test_one_token_to_choose_from_is_greedy(self, client, options):
        assert text(chat(client, temperature=1.0, **options)) == text(chat(client))

    def test_a_stop_text_ends_the_answer(self, client):
        whole = text(chat(client))
        stop = whole[3:5]
        answer = chat(client, stop=["not in it", stop])
        assert text(answer) == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        streamed = chat(client, stop=stop, stream=True)
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert shown == text(answer)

    def test_several_choices(self, client):
        answer = chat(client, n=3, temperature=1.5, seed=7)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert texts == [text(chat(client, temperature=1.5, seed=7 + i)) for i in range(3)]
        assert answer.usage.completion_tokens == 36
        assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens
        streamed = ["", "", ""]
        for chunk in chat(client, n=3, temperature=1.5, seed=7, stream=True):
            choice = chunk.choices[0]
            streamed[choice.index] += choice.delta.content or ""
        assert streamed == texts


class TestLogprobs:
    def test_of_a_chat(self, client):
        answer = chat(client, logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs.content
        assert len(entries) == 12
        assert "".join(entry.token for entry in entries) == text(answer)
        for entry in entries:
            top = [other.logprob for other in entry.top_logprobs]
            assert top == sorted(top, reverse=True)
            assert sum(map(math.exp, top)) <= 1 + 1e-5
            # Greedy, so the token is the likeliest.
            assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, top[0])
            assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token

    def test_of_a_stream(self, client):
        whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
        parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
        assert list(itertools.chain(*parts)) == whole

    def test_alone(self, client):
        entries = chat(client, logprobs=True).choices[0].logprobs.content
        assert all(entry.top_logprobs == [] and entry.logprob <= 0 for entry in entries)
        assert chat(client).choices[0].logprobs is None

    def test_of_a_completion(self, client):
        answer = client.completions.create(
            model="anna", prompt="Hello", logprobs=2, temperature=0, max_tokens=6
        ).choices[0]
        found = answer.logprobs
        assert "".join(found.tokens) == answer.text
        assert [found.text_offset[i] for i in (0, 1)] == [0, len(found.tokens[0])]
        for token, value, top in zip(
            found.tokens, found.token_logprobs, found.top_logprobs, strict=True
        ):
            assert top[token] == value


class TestCompletions:
    def create(self, client, prompt, **options):
        options = {"temperature": 0, "max_tokens": 8, **options}
        return client.completions.create(model="ben", prompt=prompt, **options)

    def test_text_and_ids_are_alike(self, client, made):
        ids = made[1].tokenizer.encode("Hello")
        one, other = self.create(client, "Hello"), self.create(client, ids)
        assert one.choices[0].text == other.choices[0].text
        assert one.usage == other.usage

    def test_several_prompts(self, client):
        alone = [self.create(client, prompt) for prompt in ("Hello", "x")]
        answer = self.create(client, ["Hello", "x"], n=2)
        assert [choice.text for choice in answer.choices] == [
            one.choices[0].text for one in alone for _ in range(2)
        ]
        assert answer.usage.prompt_tokens == 6

    def test_a_stream(self, client):
        shown = "".join(c.choices[0].text for c in self.create(client, "Hello", stream=True))
        assert shown == self.create(client, "Hello").choices[0].text

    def test_sixteen_tokens_unless_said(self, client):
        answer = client.completions.create(model="ben", prompt="Hello", temperature=0)
        assert answer.usage.completion_tokens == 16


class TestErrors:
    def test_each_is_the_clients_own(self, live, client):
        with pytest.raises(openai.NotFoundError) as error:
            chat(client, "nobody")
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            chat(client, temperature=3)
        with pytest.raises(openai.BadRequestError, match="200 tokens") as error:
            client.completions.create(model="anna", prompt="x" * 200)
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="'verbosity' is not supported"):
            chat(client, verbosity="low")
        with pytest.raises(openai.AuthenticationError):
            chat(client.with_options(api_key="wrong"))
        with pytest.raises(openai.PermissionDeniedError):
            chat(client.with_options(api_key=ANNA), "ben")

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == [
            "tiny-random", "anna", "ben", "carl", "dora",
        ]  # fmt: skip
        assert client.models.retrieve("anna").owned_by == "mos_jax"


def test_many_at_once(live):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=ALL) as client:
            models = ["anna", "ben", "carl", "dora", "tiny-random"] * 4
            return models, await asyncio.gather(*(chat(client, model) for model in models))

    models, answers = asyncio.run(ask())
    by_model = {}
    for model, answer in zip(models, answers, strict=True):
        by_model.setdefault(model, set()).add(text(answer))
    # Whoever was beside it, a model gives one answer.
    assert all(len(texts) == 1 for texts in by_model.values())


def test_what_it_counts(live, client):
    chat(client)
    with live.client("key-for-the-admin-44") as admin:
        lines = dict(
            line.rsplit(" ", 1)
            for line in admin.get("/metrics").text.splitlines()
            if not line.startswith("#")
        )
    found = {name: float(value) for name, value in lines.items()}
    assert found['mos_tokens_total{kind="completion"}'] >= 12
    assert found["mos_time_to_first_token_seconds_count"] >= 1
    assert found["mos_time_per_token_seconds_count"] >= 11
    assert found['mos_answers_total{reason="length"}'] >= 1
    for name in (
        "mos_queue_requests",
        "mos_rows_decode",
        "mos_runner_bytes",
        "mos_bank_bytes",
        "mos_bank_placed_total",
        'mos_bank_slab_resident{form="pools",slab="0"}',
        'mos_bank_slab_evictions_total{form="factors",slab="1"}',
        'mos_http_requests_total{route="/v1/chat/completions",status="200"}',
    ):
        assert name in found
