import importlib.util
import io
import json
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from mos_jax import load_base
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.methods import count_parameters, create_adapter
from mos_jax.data.config import DataConfig
from mos_jax.data.load import load_data
from mos_jax.errors import InputError
from mos_jax.evaluation.answers import evaluate, generate_answers
from mos_jax.evaluation.compare import compare
from mos_jax.evaluation.memory import bits_recalled
from mos_jax.training.config import RunConfig
from mos_jax.training.loop import train
from mos_jax.training.report import print_summary
from mos_jax.training.step import AdapterParts, initial_state, make_train_step
from tests.adapters.fixtures_adapters import model_sites

PROBE = Path(__file__).parents[2] / "configs/methods/memory_probe.py"

BITS = 31.0
KEY = 3


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-random")


@pytest.fixture(scope="module")
def data(base):
    config = DataConfig.create(task="memory", task_options={"pairs": 64}, batch_size=4)
    return load_data(config, base.tokenizer)


@pytest.fixture(scope="module")
def logits(base):
    """fp64 [5, V] of one pair alone, whose tokens are int32 [5]."""
    forward = jax.jit(lambda tokens: base.model(tokens[None], None)[0])
    return lambda tokens: np.asarray(forward(np.asarray(tokens, np.int32)), np.float64)


def test_bits_of_known_code_lengths():
    """Known by heart, half known, drawn uniformly, and worse than uniform."""
    code_bits = np.array([0.0, 15.5, BITS, 100.0])
    found = bits_recalled(code_bits * math.log(2), np.array([1.0, 0.0, 0.0, 0.0]), BITS)
    assert found.bits_recalled == pytest.approx(31.0 + 15.5)
    assert (found.pairs, found.pairs_recalled) == (4, 1)
    assert found.bits_counted == pytest.approx(31.0)
    assert found.bits_prior == pytest.approx(4 * 31.0)


def test_a_barely_likeliest_value_counts_in_full_but_is_not_all_known():
    found = bits_recalled(np.array([BITS / 2 * math.log(2)]), np.array([1.0]), BITS)
    assert found.bits_counted == pytest.approx(BITS)
    assert found.bits_recalled == pytest.approx(BITS / 2)


def test_rounding_below_zero_is_a_sure_pair():
    assert bits_recalled(np.array([-1e-6]), np.array([1.0]), BITS).bits_recalled == BITS


@pytest.mark.parametrize(
    ("nats", "scores", "bits", "words"),
    [
        ([1.0, 2.0], [1.0], BITS, "one shape"),
        ([1.0], [1.0], 0.0, "bits_per_pair is 0.0"),
        ([1.0], [1.0], math.inf, "bits_per_pair is inf"),
        ([math.nan], [1.0], BITS, "finite"),
        ([-1.0], [1.0], BITS, "not below 0"),
    ],
)
def test_what_is_no_code_length_is_refused(nats, scores, bits, words):
    with pytest.raises(InputError, match=words):
        bits_recalled(np.array(nats), np.array(scores), bits)


def test_code_lengths_are_those_of_each_value(base, data, logits):
    """Against the logits of each pair alone: packing and gathering lose nothing."""
    found = evaluate(base, None, data, "test", 2)
    for index in (0, 17, 63):
        tokens = data.tokens["test"].examples[index].tokens
        rows = logits(tokens)[KEY - 1 : -1]
        likelihoods = rows[[0, 1], tokens[KEY:]] - np.log(np.exp(rows).sum(axis=1))
        assert found.nats[index] == pytest.approx(-likelihoods.sum(), rel=1e-5)
    assert found.loss == pytest.approx(found.nats.sum() / 128)
    assert found.recall == bits_recalled(found.nats, found.scores, data.task.bits_per_pair)


def test_an_untrained_base_recalls_next_to_nothing(base, data):
    found = evaluate(base, None, data, "test", 2)
    assert found.recall is not None
    assert found.recall.pairs_recalled == 0
    assert found.recall.bits_recalled < 0.05 * found.recall.bits_prior


def test_generated_answers_have_the_length_of_a_value(base, data, logits):
    """Whatever max_new_tokens allows: a value has no end that could be learnt."""
    examples = data.test[:3]
    for example, answer in zip(examples, generate_answers(base, None, examples, 4), strict=True):
        ids = [*example.ids.prompt, 0, 0]
        for place in (KEY, KEY + 1):
            ids[place] = int(logits(ids)[place - 1].argmax())
        assert answer == base.tokenizer.decode(ids[KEY:])


def probe(method):
    spec = importlib.util.spec_from_file_location("memory_probe", PROBE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(method)


@pytest.mark.parametrize("method", ["mos", "lora"])
def test_the_probe_of_q_and_v_at_a_budget_of_one(method):
    """57,600 parameters against up to 4,096 pairs of 31 bits."""
    config = RunConfig.from_mapping(probe(method).to_dict())
    sites = config.sites.select(model_sites("smollm2-135m"))
    assert sorted(sites) == ["q_proj", "v_proj"]
    assert sum(count_parameters(config.adapter, sites).values()) == 57_600


def test_a_run_of_the_probe_reports_recall_and_bits(tmp_path):
    config = probe("lora")
    config.base.name = "tiny-random"
    config.data.task_options.pairs = 64
    config.data.validation_examples = 16
    config.data.batch_size = 4
    config.training.steps = 2
    config.evaluation.every = 1
    # A step of many tokens: what is generated is cut at the length of a value.
    config.evaluation.max_new_tokens = 4
    config.logging.tensorboard = False
    console = Console(file=io.StringIO())
    summary = train(RunConfig.from_mapping(config.to_dict()), tmp_path / "run", console)
    assert summary["data"]["bits"] == pytest.approx(1024.0)
    assert summary["test"]["adapter"]["bits_prior"] == pytest.approx(1024.0)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[0]["validation_bits_prior"] == pytest.approx(256.0)
    assert 0 <= steps[0]["validation_bits_recalled"] < 256.0
    print_summary(summary, tmp_path / "run", console)
    printed = console.file.getvalue()
    assert "memory: 64 questions of the test set" in printed
    assert "of 1,024 bits" in printed


def test_training_on_pairs_recalls_them(base, data):
    """The whole way, from ids to bits, on a base that is not even trained."""
    adapter = create_adapter(LoRAConfig(rank=16), base.sites, jax.random.key(0))
    parts, trained = AdapterParts.split(adapter)
    optimizer = optax.adam(2e-2)
    state = initial_state(trained, optimizer, jax.random.key(0))
    step, source = make_train_step(optimizer), data.source(seed=0)
    for i in range(40):
        state, _ = step(state, parts, base.model, source[i])
    factors = jax.jit(lambda trained: trained.factors())(parts.merge(state.trained))
    found = evaluate(base, factors, data, "validation", 2)
    assert found.accuracy > 0.5
    assert found.recall.bits_recalled > 0.5 * found.recall.bits_prior
    result = compare(base, factors, data, "test", 2)
    assert json.loads(json.dumps(result)) == result
    assert result["adapter"]["bits_recalled"] == pytest.approx(found.recall.bits_recalled)
    assert result["base"]["pairs_recalled"] == 0
    right = sum(s["after"] == s["right"] for s in result["samples"])
    assert right == found.scores[:3].sum()
