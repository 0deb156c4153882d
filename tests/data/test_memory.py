import json
import math

import numpy as np
import pytest

from mos_jax.data import DataConfig, MemoryOptions, Task, load_data, load_task
from mos_jax.data.memory import MemoryTask, draw_pairs
from mos_jax.data.tokens import answer_ids, prompt_ids
from mos_jax.errors import InputError
from mos_jax.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.byte_level()


def config(pairs: int = 64, **section: object) -> DataConfig:
    options = {"pairs": pairs, **section.pop("options", {})}  # type: ignore[dict-item]
    return DataConfig.create(task="memory", task_options=options, **section)


def memory_task(pairs: int = 64, **section: object) -> MemoryTask:
    task = load_task(config(pairs, **section), TOKENIZER)
    assert isinstance(task, MemoryTask)
    return task


def test_pairs_are_three_key_tokens_and_two_value_tokens() -> None:
    task: Task = memory_task()
    assert len(task.train) == 64
    keys = set()
    for example in task.train:
        assert example.ids is not None
        assert (len(example.ids.prompt), len(example.ids.answer)) == (3, 2)
        keys.add(example.ids.prompt)
    assert len(keys) == 64
    assert len({e.question_key for e in task.train}) == len({e.id for e in task.train}) == 64
    assert task.train == task.validation == task.test


def test_the_draw_is_fixed() -> None:
    """These pairs are in results and checkpoints: another draw would be other data."""
    first = [tuple(ids) for ids in draw_pairs(MemoryOptions(pairs=64), range(49135), 0)[:2]]
    assert first == FIRST
    assert [tuple(p) for p in draw_pairs(MemoryOptions(pairs=64), range(49135), 1)[:2]] != first


FIRST = [((11550, 24131, 14993), (12233, 37796)), ((28306, 42529, 34475), (26549, 38340))]


def test_fewer_pairs_are_the_first_of_more() -> None:
    few, many = (draw_pairs(MemoryOptions(pairs=n), range(1000), 3) for n in (64, 200))
    assert many[:64] == few


def test_tokens_are_uniform_over_the_ordinary_ones() -> None:
    vocabulary = TOKENIZER.ordinary_ids()
    pairs = draw_pairs(MemoryOptions(pairs=4096), vocabulary, 0)
    counts = np.bincount(np.concatenate([np.concatenate(p) for p in pairs]).astype(int))
    assert set(np.flatnonzero(counts)) == set(vocabulary) == set(range(256))
    expected = 4096 * 5 / 256
    # Chi square with 255 degrees of freedom: mean 255, deviation 22.6.
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6


def test_keys_stay_distinct_in_a_vocabulary_with_no_key_to_spare() -> None:
    pairs = draw_pairs(MemoryOptions(pairs=64, key_tokens=3), range(4), 0)
    assert len({ids.prompt for ids in pairs}) == 64


def test_the_model_reads_the_ids_themselves() -> None:
    """Byte ids that are no text would not survive being decoded and encoded again."""
    data = load_data(config(), TOKENIZER)
    assert any("\ufffd" in e.answer for e in data.train)
    for example, made in zip(data.train, data.tokens["train"].examples, strict=True):
        assert example.ids is not None
        assert made.tokens.tolist() == [*example.ids.prompt, *example.ids.answer]
        assert made.is_target.tolist() == [False] * 3 + [True] * 2
        assert prompt_ids(example, TOKENIZER) == list(example.ids.prompt)
        assert answer_ids(example, TOKENIZER) == list(example.ids.answer)


def test_rows_are_full_of_whole_pairs_in_segments_of_their_own() -> None:
    data = load_data(config(96, batch_size=2), TOKENIZER)
    assert (data.layout.width, data.layout.targets, data.layout.prefix) == (80, 32, ())
    assert data.evaluation_layout == data.layout
    batch = data.source(seed=0)[0]
    assert batch.loss_weights.all()
    assert batch.segments.tolist() == [[i for i in range(1, 17) for _ in range(5)]] * 2
    assert batch.positions.tolist() == [[*range(5)] * 16] * 2
    # Three steps are one epoch of 96 pairs: each once.
    seen = np.concatenate([data.source(seed=0)[step].loss_examples.ravel() for step in range(3)])
    assert sorted(seen.tolist()) == sorted([*range(96)] * 2)
    assert {int(i) for b in data.batches("test") for i in b.loss_examples.ravel()} == set(range(96))


def test_a_width_of_choice_and_rows_of_one() -> None:
    assert load_data(config(sequence_length=40), TOKENIZER).layout.width == 40
    alone = load_data(config(packing=False), TOKENIZER)
    assert alone.layout.width == 8
    assert (alone.source(seed=0)[0].segments.max(axis=1) == 1).all()


def test_the_report_says_bits_and_that_the_sets_meet() -> None:
    data = load_data(config(200, validation_examples=64, test_examples=100), TOKENIZER)
    report = json.loads(json.dumps(data.report()))
    assert report["pairs"] == report["train_examples"] == 200
    assert (report["validation_examples"], report["test_examples"]) == (64, 100)
    assert report["bits"] == pytest.approx(200 * 2 * math.log2(256))
    assert "training set" in report["evaluated_on"]
    assert report["padding_share"] == pytest.approx(1 - 1000 / (13 * 80))
    assert data.validation == data.train[:64]
    assert data.test == data.train[:100]


def test_pairs_are_told_apart_by_ids_where_their_texts_are_equal() -> None:
    """Half of all two-byte values are no text and look alike; guessing one is right once."""
    data = load_data(config(256), TOKENIZER)
    answers = [e.ids.answer for e in data.test if e.ids is not None]
    commonest = max(answers.count(answer) for answer in answers)
    assert data.report()["test_commonest_answer_rate"] == commonest / 256
    assert data.fingerprint == load_data(config(256), TOKENIZER).fingerprint
    assert data.fingerprint != load_data(config(256, seed=1), TOKENIZER).fingerprint
    other = load_data(config(256, seed=1), TOKENIZER)
    assert data.source(0).fingerprint != other.source(0).fingerprint


def test_texts_for_people_fit_one_line() -> None:
    for example in memory_task(1024).train:
        assert example.ids is not None
        assert len(example.question.splitlines()) == 1
        assert example.question.startswith(" ".join(map(str, example.ids.prompt)))
    task = memory_task()
    assert task.score(task.test[0], task.test[0].answer) == 1.0
    assert task.score(task.test[0], "another") == 0.0


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"options": {"pair": 64}}, "pair is not an option of the task memory; did you mean 'pai"),
        ({"pairs": 63}, "pairs is 63; it must be an integer from 64 to 4096"),
        ({"pairs": 4097}, "pairs is 4097; it must be an integer from 64 to 4096"),
        ({"pairs": 64.0}, "pairs is 64.0; it must be an integer"),
        ({"options": {"key_tokens": True}}, "key_tokens is True; it must be an integer"),
        ({"options": {"value_tokens": 0}}, "value_tokens is 0; it must be an integer from 1"),
        ({"pairs": 300, "options": {"key_tokens": 1}}, "256 ordinary tokens make only 256 keys"),
        ({"train_examples": 32}, "train_examples is 32, but the task memory trains on all of its"),
        ({"validation_examples": 65}, "validation_examples is 65, but the task memory has 64"),
        ({"test_examples": 65}, "test_examples is 65, but the task memory has 64 pairs"),
        ({"sequence_length": 4, "too_long": "truncate"}, "sequence_length is 4, but a pair has 5"),
        ({"train_path": "a.jsonl"}, "data.task is 'memory', which reads no file"),
    ],
)
def test_what_cannot_be_is_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_data(config(**section), TOKENIZER)  # type: ignore[arg-type]


def test_a_draw_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="give load_task the tokenizer"):
        load_task(config())
