import json
from pathlib import Path
from typing import Any

import pytest

from mos_jax.data import DataConfig, load_task
from mos_jax.data.jsonl import read_jsonl
from mos_jax.errors import InputError


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(*numbers: int, answer: str = "a") -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "completion": f"{answer}{i}"} for i in numbers]


def config(**section: Any) -> DataConfig:
    return DataConfig.create(task="jsonl", **section)


def test_both_forms_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    path = tmp_path / "a.jsonl"
    lines = json.dumps({"messages": turns, "more": 1}) + "\r\n\n" + json.dumps(pairs(1)[0])
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    first, second = read_jsonl(path)
    assert list(first.messages) == turns
    assert [(m["role"], m["content"]) for m in second.messages] == [
        ("user", "q1"),
        ("assistant", "a1"),
    ]
    assert (first.id, second.id) == (f"{path}:1", f"{path}:3")


def messages(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON at column"),
        (b'{"prompt": "\xff"}', "byte 12 of the line is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        ("[1]", "must be a JSON object"),
        ('{"prompt": "a"}', "missing: completion"),
        ('{"text": "a"}', "missing: prompt, completion"),
        ('{"prompt": 1, "completion": "a"}', "prompt is 1; it must be text"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
        ('{"prompt": "\\ud800", "completion": "a"}', "surrogate"),
        ('{"messages": {}}', "must be a list"),
        (messages(), "no turn of the role 'assistant'"),
        (messages(USER), "no turn of the role 'assistant'"),
        (messages(USER, ANSWER, USER), "ends in a turn of the role 'user'"),
        (messages(ANSWER), "begins with an answer"),
        (messages(USER, {"role": "assistent", "content": "a"}), "did you mean 'assistant'"),
        (messages(USER, {"role": "assistant", "content": ""}), "turn 1 is an empty answer"),
        (messages(USER, {"role": "assistant", "content": None}), "content of turn 1 is None"),
        (messages(USER, {"role": "assistant"}), "turn 1 of messages has no key 'content'"),
        (messages("u", ANSWER), "turn 0 of messages is 'u'"),
    ],
)
def test_a_malformed_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(pairs(1)[0]).encode()
    path.write_bytes(good + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(InputError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_no_examples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no example"):
        read_jsonl(write(tmp_path / "empty.jsonl"))


def test_files_given_do_not_meet(tmp_path: Path) -> None:
    task = load_task(
        config(
            train_path=write(tmp_path / "a", *pairs(1, 2, 3, 4, 5, 6, 6)),
            validation_path=write(tmp_path / "b", *pairs(2, 7, answer="other")),
            test_path=write(tmp_path / "c", *pairs(3, 7)),
        )
    )
    assert task.scoring == "exact"
    assert [e.question for e in task.train] == ["q1", "q4", "q5", "q6"]
    assert [e.question for e in task.validation] == ["q2"]
    assert [e.question for e in task.test] == ["q3", "q7"]
    assert task.dropped == {
        "test": {"repeated": 0, "held_out": 0},
        "validation": {"repeated": 0, "held_out": 1},
        "train": {"repeated": 1, "held_out": 2},
    }
    assert task.score(task.test[0], " a3\n") == 1
    assert task.score(task.test[0], "A3") == 0


def test_sets_split_off_are_fixed_by_questions_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", *pairs(*range(40)))
    backwards = write(tmp_path / "b", *pairs(*reversed(range(40))))

    def sets(path: str, seed: int) -> list[set[str]]:
        task = load_task(config(train_path=path, validation_examples=5, test_examples=8, seed=seed))
        return [{e.question for e in s} for s in (task.train, task.validation, task.test)]

    first = sets(path, 0)
    assert [len(s) for s in first] == [27, 5, 8]
    assert len(set.union(*first)) == 40
    assert sets(backwards, 0) == first
    assert sets(path, 1) != first


def test_other_answers_to_a_held_out_question_leave_training(tmp_path: Path) -> None:
    records = [*pairs(*range(10)), *pairs(*range(10), answer="b")]
    task = load_task(
        config(train_path=write(tmp_path / "a", *records), validation_examples=2, test_examples=4)
    )
    held_out = {e.question for e in (*task.validation, *task.test)}
    assert not held_out & {e.question for e in task.train}
    total = len(task.train) + len(task.validation) + len(task.test)
    assert total + task.dropped["train"]["held_out"] == 20


def test_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", *pairs(*range(40)))
    task = load_task(config(train_path=path))
    assert (len(task.train), len(task.validation), len(task.test)) == (33, 3, 4)
    assert len(load_task(config(train_path=path, train_examples=5)).train) == 5
    with pytest.raises(InputError, match=r"data\.test_examples is 41, but data\.train_path"):
        load_task(config(train_path=path, test_examples=41))
    with pytest.raises(InputError, match="left to train on"):
        load_task(config(train_path=path, test_examples=30, validation_examples=10))
