"""The support table says what the code does."""

import re

import pytest

from tools import support_table


@pytest.mark.slow
def test_the_page_is_what_the_code_can_do():
    made, committed = support_table.page(), support_table.PAGE.read_text(encoding="utf-8")
    assert made == committed, "run `make support`"


def test_a_method_is_not_refused_for_the_sizes_it_is_tried_with():
    """No of a method means that it has no such thing, not that a tiny base is too small for it."""
    text = support_table.PAGE.read_text(encoding="utf-8")
    notes = text.partition("## Methods")[2].partition("## Conversions")[0]
    reasons = re.findall(r"^\d+\. (.*)$", notes, re.MULTILINE)
    assert reasons
    for reason in reasons:
        assert re.search(r"PEFT has no type for|no alpha_pattern here: .* has no alpha", reason)


def test_a_refusal_becomes_a_numbered_reason():
    reasons = support_table.Reasons()

    def refuse() -> None:
        raise support_table.InputError("no such thing")

    assert reasons.cell(lambda: None) == "yes"
    assert [reasons.cell(refuse), reasons.cell(refuse)] == ["no [1]", "no [1]"]
    assert reasons.lines()[-1] == "1. no such thing"


def test_a_failure_that_is_no_refusal_is_not_a_cell():
    with pytest.raises(ZeroDivisionError):
        support_table.Reasons().cell(lambda: 1 / 0)
    with pytest.raises(SystemExit, match="differs"):
        support_table.same_weights({"a": 1}, {"a": 2}, "two models")
