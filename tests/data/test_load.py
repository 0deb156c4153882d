import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mos_jax.data import DataConfig, Tokenizer, load_data, tokenize_example


def small(**section: object) -> DataConfig:
    return DataConfig.create(
        train_examples=60, validation_examples=20, test_examples=20, batch_size=2, **section
    )


def test_a_generated_task(tokenizer: Tokenizer) -> None:
    data = load_data(small(), tokenizer)
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 20, 20)
    assert data.evaluation_layout.width >= data.layout.width
    batch = data.source(seed=0)[0]
    assert batch.tokens.shape == (2, data.layout.width)
    loader = data.loader(seed=0, accumulation=2, steps=1)
    assert next(loader).tokens.shape == (2, 2, data.layout.width)
    loader.close()
    for split, examples in (("validation", data.validation), ("test", data.test)):
        indices = {int(i) for b in data.batches(split) for i in b.loss_examples.ravel() if i >= 0}
        assert indices == set(range(20))
        for example, made in zip(examples, data.tokens[split].examples, strict=True):
            assert np.array_equal(made.tokens, tokenize_example(example, tokenizer).tokens)


def test_the_report_agrees_with_the_data(tokenizer: Tokenizer) -> None:
    data = load_data(small(), tokenizer)
    report = json.loads(json.dumps(data.report()))
    lengths = [len(e.tokens) for e in data.tokens["train"].examples]
    assert report["train_examples"] == 60
    assert report["mean_tokens"] == pytest.approx(np.mean(lengths))
    shared = report["shared_prefix_tokens"]
    own = sum(length - shared for length in lengths)
    room = report["rows_per_epoch"] * (report["width"] - shared)
    assert report["padding_share"] == pytest.approx(1 - own / room)
    answers = [e.answer for e in data.test]
    commonest = report["test_commonest_answer"]
    assert report["test_commonest_answer_rate"] == answers.count(commonest) / 20
    assert f"width: {data.layout.width}" in data.summary().splitlines()
    assert report["fingerprint"] == load_data(small(), tokenizer).fingerprint
    assert report["fingerprint"] != load_data(small(seed=1), tokenizer).fingerprint


def test_skipped_examples_leave_the_sets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "q" * (1 + 20 * (i % 2)) + str(i), "completion": "a"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig.create(
        task="jsonl", train_path=str(path), sequence_length=40, too_long="skip", test_examples=9
    )
    data = load_data(config, tokenizer)
    report = data.report()
    kept = [*data.train, *data.validation, *data.test]
    skipped = [report[f"{s}_skipped_too_long"] for s in ("train", "validation", "test")]
    assert {e.question[1] == "q" for e in kept} == {False}
    assert len(kept) + sum(int(s) for s in skipped) == 60
    assert [e.id for e in data.train] == [e.id for e in data.tokens["train"].examples]
    assert data.layout.width == 40


def test_data_is_the_same_in_every_process(tokenizer: Tokenizer) -> None:
    program = (
        "from mos_jax.data import DataConfig, load_task;"
        "t = load_task(DataConfig.create(train_examples=60, validation_examples=20,"
        " test_examples=20, batch_size=2));"
        "print([e.question for e in t.test])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    data = load_data(small(), tokenizer)
    assert result.stdout.strip() == str([e.question for e in data.test])


def test_importing_the_room_imports_neither_grain_nor_reasoning_gym() -> None:
    program = (
        "import sys, mos_jax.data;print(sorted({'grain', 'reasoning_gym'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
