import random
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from mos_jax.data import DataConfig, Example, commonest_answer, load_task
from mos_jax.data.examples import question_and_answer
from mos_jax.data.gym import FIRST_SEED, MAX_SEED, SEED_STRIDE
from mos_jax.data.scoring import is_plain_expression
from mos_jax.errors import InputError


def config(task: str, train: int = 30, held_out: int = 10, **section: Any) -> DataConfig:
    return DataConfig.create(
        task=task,
        train_examples=train,
        validation_examples=held_out,
        test_examples=held_out,
        **section,
    )


def questions(examples: tuple[Example, ...]) -> set[str]:
    return {example.question for example in examples}


@dataclass
class SmallConfig:
    """A task with `answers` distinct questions and their answers."""

    answers: int = 60
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.answers > 0, "answers must be positive"


class Small(ProceduralDataset):
    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, i: int) -> dict[str, Any]:
        number = random.Random(self.seed + i).randrange(self.config.answers)
        return {"question": f"What is {number}?", "answer": str(number), "metadata": {}}


class Unsure(Small):
    """A task whose scorer reads only numbers and changes what it is given."""

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        entry["metadata"]["seen"] = True
        return float(str(answer)) / 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(DATASETS, "small", (Small, SmallConfig))
    monkeypatch.setitem(DATASETS, "unsure", (Unsure, SmallConfig))
    return "small"


def test_both_names_give_one_task_of_the_sizes_asked_for() -> None:
    task = load_task(config("reasoning_gym/family_relationships"))
    same = load_task(config("family_relationships"))
    assert (task.name, task.scoring) == ("family_relationships", "exact")
    assert (len(task.train), len(task.validation), len(task.test)) == (30, 10, 10)
    assert task.train == same.train
    assert task.test == same.test
    assert len({e.id for e in (*task.train, *task.validation, *task.test)}) == 50


def test_sets_do_not_meet_and_hold_no_question_twice(small: str) -> None:
    task = load_task(config(small))
    sets = [questions(task.train), questions(task.validation), questions(task.test)]
    assert [len(s) for s in sets] == [30, 10, 10]
    assert len(set.union(*sets)) == 50
    # Of 60 questions, drawing 50 cannot but meet repeats and held-out questions.
    assert task.dropped["train"]["repeated"] > 0
    assert task.dropped["train"]["held_out"] > 0
    assert task.dropped["test"]["held_out"] == 0


def test_neighbouring_seeds_are_not_shifted_copies() -> None:
    first = load_task(config("family_relationships", seed=0))
    second = load_task(config("family_relationships", seed=1))
    trap = [
        reasoning_gym.create_dataset("family_relationships", seed=s, size=20)[1 - s]["question"]
        for s in (0, 1)
    ]
    assert trap[0] == trap[1], "reasoning_gym no longer draws item i from seed + i"
    for one in (first.train, first.validation, first.test):
        for other in (second.train, second.validation, second.test):
            assert not questions(one) & questions(other)


def test_ranges_of_seeds_stay_apart() -> None:
    starts = sorted(
        first + seed * SEED_STRIDE for first in FIRST_SEED.values() for seed in (0, 1, MAX_SEED)
    )
    assert min(b - a for a, b in pairwise(starts)) >= SEED_STRIDE
    assert starts[-1] + SEED_STRIDE < 2**32
    with pytest.raises(InputError, match=f"at most {MAX_SEED}"):
        load_task(config("family_relationships", seed=MAX_SEED + 1))


def test_chunks_continue_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_task(config("family_relationships"))
    monkeypatch.setattr("mos_jax.data.gym._LARGEST_CHUNK", 7)
    assert load_task(config("family_relationships")).train == whole.train


def test_too_few_distinct_questions(small: str) -> None:
    with pytest.raises(InputError, match=r"data\.train_examples is 50, .* only 40 distinct"):
        load_task(config(small, train=50))


def test_options_reach_the_task_and_are_checked(small: str) -> None:
    task = load_task(config(small, train=4, held_out=3, task_options={"answers": 10}))
    assert {int(e.answer) for e in (*task.train, *task.validation, *task.test)} == set(range(10))
    for options, message in (
        ({"answer": 3}, "did you mean 'answers'"),
        ({"seed": 3}, "set data.seed instead"),
        ({"size": 3}, "data.train_examples"),
        ({"answers": 0}, "answers must be positive"),
        ({"answers": "x"}, "which the task small refuses"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(config(small, task_options=options))


def test_unknown_task() -> None:
    with pytest.raises(InputError, match="did you mean 'family_relationships'"):
        load_task(config("family_relationship"))


def test_task_without_answers() -> None:
    with pytest.raises(InputError, match="graph_color has no oracle answer"):
        load_task(config("graph_color"))


def test_task_that_is_never_the_same() -> None:
    with pytest.raises(InputError, match="codeio gives other examples each time"):
        load_task(config("codeio"))


def test_task_that_depends_on_the_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(InputError, match="PYTHONHASHSEED=0"):
        load_task(config("ransom_note"))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load_task(config("ransom_note", train=3, held_out=2)).name == "ransom_note"


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"pip install 'mos_jax\[tasks\]'"):
        load_task(config("family_relationships"))


def test_an_exact_task_has_one_right_answer() -> None:
    task = load_task(config("family_relationships", train=1, held_out=2))
    example = task.test[0]
    assert task.score(example, f" {example.answer.upper()}\n") == 1
    assert task.score(example, f"{example.answer} {example.answer}") == 0
    assert task.score(example, "") == 0


@pytest.mark.parametrize(
    ("name", "scoring"),
    [
        ("gcd", "exact"),
        ("game_of_life_halting", "exact"),
        ("countdown", "scorer"),
        ("shortest_path", "scorer"),
    ],
)
def test_scoring(name: str, scoring: str) -> None:
    assert load_task(config(name, train=1, held_out=1)).scoring == scoring


def test_any_text_is_not_right_where_the_scorer_takes_all() -> None:
    task = load_task(config("game_of_life_halting", train=1, held_out=2))
    example = task.test[0]
    assert task.score(example, example.answer) == 1
    assert task.score(example, "perhaps") == 0


def test_a_scorer_accepts_other_right_answers() -> None:
    task = load_task(config("countdown", train=1, held_out=2))
    example = task.test[0]
    assert task.score(example, example.answer) == 1
    assert task.score(example, f"({example.answer})") == 1
    assert task.score(example, f"{example.answer} + 1") < 0.5
    with pytest.raises(InputError, match="not one of the task"):
        task.score(question_and_answer("a", "b", "c"), "b")


def test_a_scorer_is_bounded_and_changes_nothing(small: str) -> None:
    task = load_task(config("unsure", train=1, held_out=2))
    example = task.test[0]
    scores = [task.score(example, text) for text in ("5", "500", "-5", "nan", "five")]
    assert scores == [0.5, 1, 0, 0, 0]
    assert task.entries[example.id]["metadata"] == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["countdown", "n_queens"])
def test_no_answer_is_run_as_a_program(task: str, tmp_path: Path) -> None:
    loaded = load_task(config(task, train=1, held_out=1))
    made = tmp_path / "made"
    assert loaded.score(loaded.test[0], f"open({str(made)!r}, 'w')") == 0
    assert not made.exists()


@pytest.mark.parametrize(
    "text", ["94*4 - 61 - 6", "-4*(-2*x - 8)**(3/2)/3 + C", "exp(-x)*sin(2*x)", "(x**2 + 1)**3"]
)
def test_plain_expressions(text: str) -> None:
    assert is_plain_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9**(9*99)",
        "2**1000",
        "((9**9)**9)**9",
        "__import__('os')",
        "x.real",
        "exit()",
        "[1][0]",
        "1 +",
        "(" * 500,
        "1+" * 600 + "1",
    ],
)
def test_other_expressions(text: str) -> None:
    assert not is_plain_expression(text)


def test_commonest_answer() -> None:
    examples = [question_and_answer(str(i), a, str(i)) for i, a in enumerate("bab a")]
    assert commonest_answer(examples[:3]) == ("b", 2 / 3)
    # Equally often: the first in alphabetical order, whatever came first.
    assert commonest_answer([examples[0], examples[1]]) == ("a", 0.5)
    with pytest.raises(InputError, match="empty set"):
        commonest_answer([])
