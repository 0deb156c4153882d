"""The task `jsonl`: examples from local files, one JSON object a line.

A line is either `{"messages": [{"role": ..., "content": ...}, ...]}`, ending in an assistant turn,
or `{"prompt": ..., "completion": ...}`. Other keys are ignored, and so are blank lines.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mos_jax.data.config import DataConfig
from mos_jax.data.examples import ROLES, Example, Message, Scoring, question_and_answer
from mos_jax.data.scoring import exact_score
from mos_jax.errors import InputError, suggest

_SPLIT_OFF_AT_MOST = {"validation": 128, "test": 256}
_SPLIT_OFF_SHARE = 10


@dataclass(frozen=True)
class JsonlTask:
    """Three sets read from files; the attributes are those of `Task`."""

    name: str
    scoring: Scoring
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    dropped: Mapping[str, Mapping[str, int]]

    def score(self, example: Example, answer: str) -> float:
        """Returns 1.0 if `answer` is the example's but for space around it, else 0.0."""
        return exact_score(self.name, example.answer, answer)


def _text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {value!r:.80}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start}, which "
            "is no text; write the character itself or the whole pair"
        ) from error
    return value


def _message(value: object, turn: int, where: str) -> Message:
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: turn {turn} of messages is {value!r:.80}; it must be an object with the "
            "keys 'role' and 'content'"
        )
    for key in ("role", "content"):
        if key not in value:
            raise InputError(
                f"{where}: turn {turn} of messages has no key {key!r}, only {sorted(value)}"
            )
    role = _text(value["role"], f"the role of turn {turn}", where)
    if role not in ROLES:
        raise InputError(f"{where}: turn {turn} has the role {role!r}; {suggest(role, ROLES)}")
    content = _text(value["content"], f"the content of turn {turn}", where)
    if role == "assistant" and not content.strip():
        raise InputError(f"{where}: turn {turn} is an empty answer; give it some text")
    return {"role": role, "content": content}


def _conversation(value: object, example_id: str, where: str) -> Example:
    if not isinstance(value, list):
        raise InputError(f"{where}: messages is {value!r:.80}; it must be a list of turns")
    messages = tuple(_message(item, turn, where) for turn, item in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise InputError(
            f"{where}: messages has no turn of the role 'assistant', so there is nothing to "
            f"learn; its roles are {roles}"
        )
    if roles[-1] != "assistant":
        raise InputError(
            f"{where}: messages ends in a turn of the role {roles[-1]!r}; it must end in the "
            "answer, a turn of the role 'assistant'"
        )
    if roles[0] == "assistant":
        raise InputError(
            f"{where}: messages begins with an answer; put a turn of the role 'user' before it"
        )
    return Example(messages, example_id)


def _parse(record: Any, example_id: str, where: str) -> Example:
    if not isinstance(record, dict):
        raise InputError(f"{where}: the line is {record!r:.80}; it must be a JSON object")
    if "messages" in record:
        return _conversation(record["messages"], example_id, where)
    missing = [key for key in ("prompt", "completion") if key not in record]
    if missing:
        raise InputError(
            f"{where}: the keys are {sorted(record)}; give either 'messages', or both 'prompt' and "
            f"'completion' (missing: {', '.join(missing)})"
        )
    prompt = _text(record["prompt"], "prompt", where)
    completion = _text(record["completion"], "completion", where)
    if not completion.strip():
        raise InputError(f"{where}: completion is empty, so there is nothing to learn")
    return question_and_answer(prompt, completion, example_id)


def read_jsonl(path: str | Path) -> list[Example]:
    """Reads the examples of a file; their ids are the file's path and the line's number.

    Raises:
        InputError: the file cannot be read or holds no example, or a line is malformed; the
            message names the file and the line, counted from 1.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"the data file {path} cannot be read: {error.strerror}; give the path of a JSONL file"
        ) from error
    examples = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start} of the line is not UTF-8; save the file as UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON at column {error.colno}: {error.msg}; write one object a line"
            ) from error
        except RecursionError as error:
            raise InputError(f"{where}: the JSON is nested too deeply to be an example") from error
        examples.append(_parse(record, where, where))
    if not examples:
        raise InputError(f"{path} holds no example; write one JSON object a line")
    return examples


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    """Returns `examples` in an order that depends on their questions and `seed` alone."""

    def rank(example: Example) -> bytes:
        return hashlib.blake2b(f"{seed} {example.question_key}".encode()).digest()

    return sorted(examples, key=rank)


def _without_repeats(examples: list[Example]) -> list[Example]:
    """Leaves out examples equal to an earlier one in question and answer."""
    return list({(e.question_key, e.answer): e for e in reversed(examples)}.values())[::-1]


def _outside(examples: list[Example], held_out: set[str]) -> list[Example]:
    return [example for example in examples if example.question_key not in held_out]


def _part(split: str, examples: list[Example], config: DataConfig, split_off: bool) -> int:
    """Returns how many of `examples` the set `split` takes."""
    size = config.sizes[split]
    if split_off and size is None:
        return min(_SPLIT_OFF_AT_MOST[split], max(1, len(examples) // _SPLIT_OFF_SHARE))
    if size is None:
        return len(examples)
    if size > len(examples):
        source = "train" if split_off else split
        raise InputError(
            f"data.{split}_examples is {size}, but data.{source}_path leaves only {len(examples)} "
            "examples once repeats and held-out questions are dropped; ask for fewer"
        )
    return size


def load_jsonl(config: DataConfig) -> JsonlTask:
    """Reads the three sets.

    A set without a file is split off the training file, by the questions and data.seed alone. Its
    size, where not given, is a tenth of the file, at most 128 (validation) or 256 (test). A set
    smaller than its file is chosen in the same way.

    Raises:
        InputError: as `read_jsonl`, or a file has fewer examples than asked for.
    """
    assert config.train_path is not None, "DataConfig.create checks this"
    paths = {"test": config.test_path, "validation": config.validation_path}
    rest = read_jsonl(config.train_path)
    held_out: set[str] = set()
    sets: dict[str, list[Example]] = {}
    dropped: dict[str, dict[str, int]] = {}

    def clean(split: str, examples: list[Example]) -> list[Example]:
        distinct = _without_repeats(examples)
        outside = _outside(distinct, held_out)
        dropped[split] = {
            "repeated": len(examples) - len(distinct),
            "held_out": len(distinct) - len(outside),
        }
        return outside

    def take(split: str, examples: list[Example], split_off: bool) -> None:
        size = _part(split, examples, config, split_off)
        if size < len(examples):
            chosen = {id(e) for e in _shuffled(examples, config.seed)[:size]}
            examples = [example for example in examples if id(example) in chosen]
        sets[split] = examples
        held_out.update(example.question_key for example in examples)

    # Files first: what is split off must not hold questions of a file that was given.
    for split, path in paths.items():
        if path is not None:
            take(split, clean(split, read_jsonl(path)), split_off=False)
    train = clean("train", rest)
    for split, path in paths.items():
        if path is None:
            dropped[split] = {"repeated": 0, "held_out": 0}
            take(split, train, split_off=True)
            # Other answers to a question that was split off must not stay in training.
            left = _outside(train, held_out)
            dropped["train"]["held_out"] += len(train) - len(left) - len(sets[split])
            train = left
    if not train:
        raise InputError(
            f"no example of {config.train_path} is left to train on once held-out questions are "
            "dropped; ask for fewer with data.validation_examples and data.test_examples, or give "
            "data.validation_path and data.test_path"
        )
    take("train", train, split_off=False)
    return JsonlTask(
        config.task,
        "exact",
        tuple(sets["train"]),
        tuple(sets["validation"]),
        tuple(sets["test"]),
        dropped,
    )
