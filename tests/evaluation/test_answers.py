import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mos_jax import load_base
from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.evaluation.answers import evaluate, generate_answers, teacher_forced
from mos_jax.evaluation.compare import compare
from mos_jax.evaluation.loss import token_losses
from mos_jax.models.decoder import Decoder
from mos_jax.models.generation import Sampling, generate
from tests.models.fixtures_decoder import filled_adapter


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


def jsonl(path, pairs):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("data")
    test = jsonl(folder / "test.jsonl", [(f"question number {i}", "xy"[i % 2]) for i in range(6)])
    train = jsonl(folder / "train.jsonl", [(f"train {i}", "x") for i in range(6)])
    config = DataConfig.create(
        task="jsonl", train_path=train, test_path=test, validation_examples=1, batch_size=2
    )
    return load_data(config, base.tokenizer)


def test_exact_match_is_greedy_decoding_with_its_end_of_turn(base, data):
    """Teacher forcing says right exactly where decoding gives the answer and stops."""
    factors = filled_adapter(base.sites).factors()
    for chosen in (None, factors):
        found = teacher_forced(base.model, chosen, data.batches("test"), len(data.test))
        for example, token_example, score in zip(
            data.test, data.tokens["test"].examples, found.scores, strict=True
        ):
            learnt = np.flatnonzero(token_example.is_target)
            prompt = token_example.tokens[: learnt[0]].tolist()
            answer = token_example.tokens[learnt].tolist()
            got = generate(base.model, [prompt], [-1], Sampling.create(len(answer)), chosen)[0]
            assert score == float(got == answer), example.id
            assert answer[-1] == base.tokenizer.end_of_turn


def test_a_model_that_predicts_every_target_is_right(data):
    class Oracle(Decoder):
        """Predicts each next token of the row with near certainty."""

        def __init__(self):
            pass

        def hidden(self, tokens, *_args, **_kwargs):
            return jax.nn.one_hot(np.roll(np.asarray(tokens), -1, axis=1), 320) * 50.0

        def _head(self):
            return jnp.eye(320), 0

        mesh, logits_mib = None, 0.0

    for batch in data.batches("test"):
        losses, correct = token_losses(Oracle(), None, batch)
        assert np.asarray(correct)[batch.loss_weights > 0].all()
        assert np.asarray(losses)[batch.loss_weights > 0].max() < 1e-3


def test_loss_is_the_mean_over_answer_tokens_only(base, data):
    found = evaluate(base, None, data, "test", 4)
    total, count = 0.0, 0
    for example in data.tokens["test"].examples:
        logits = base.model(example.tokens[None], None)[0]
        for i in np.flatnonzero(example.is_target):
            row = np.asarray(logits[i - 1], np.float64)
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[example.tokens[i]]
            count += 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)


def test_tasks_with_many_right_answers_are_judged_by_their_scorer(base, data):
    judged = []

    class Lenient:
        scoring = "scorer"

        def score(self, example, answer):
            judged.append((example.id, answer))
            return 0.25

    found = evaluate(base, None, dataclasses.replace(data, task=Lenient()), "test", 4)
    assert found.accuracy == 0.25
    answers = generate_answers(base, None, data.test, 4)
    assert judged == [(e.id, a) for e, a in zip(data.test, answers, strict=True)]


def test_comparison_holds_base_and_adapter_and_survives_json(base, data):
    factors = filled_adapter(base.sites).factors()
    result = compare(base, factors, data, "validation", 4)
    assert json.loads(json.dumps(result)) == result
    assert result["base"]["loss"] != result["adapter"]["loss"]
    assert {"question", "right", "before", "after"} == set(result["samples"][0])
    assert "adapter" not in compare(base, None, data, "validation", 4)
