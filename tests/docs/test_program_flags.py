"""What the page of programs says of their flags."""

import ast

import pytest

from tools.program_flags import flags_of, program_page, programs

ROWS = set(program_page().splitlines())


@pytest.mark.parametrize(
    "row",
    [
        "| `--item_spread` | `1.5` | Spread of the items' log-odds. |",
        "| `--parts` | `counts, devices, places, seconds` | `counts`, `devices`, `places`, "
        "`seconds`. What to find out. |",
        "| `--part` | `batch, rows, tenants, swap, peft` | `batch`, `rows`, `tenants`, `swap`, "
        "`peft`. What to measure; again for more. |",
        "| `--rows` | `1, 8, 32, 64, 128` | Rows of a step; again for more. |",
        "| `--dry_run` | `false` | Show where the memory would go, and end. |",
        "| `--workdir` |  | Folder of the sweep; made when missing. |",
    ],
)
def test_a_row(row):
    assert row in ROWS


def test_the_default_of_config_is_a_path():
    (row,) = {r for r in ROWS if r.startswith("| `--config` | `configs/paper/llama2_7b.py` |")}
    assert "Any field can be set" in row


def test_all_help_is_text_and_all_values_are_there():
    for path in programs():
        for flag in flags_of(ast.parse(path.read_text(encoding="utf-8"))):
            assert len(flag.text) > 8, flag
            assert flag.text.rstrip()[-1] in ".,)", flag
            assert not flag.values or set(flag.default.split(", ")) <= set(flag.values), flag


def test_what_cannot_be_read_is_not_guessed():
    tree = ast.parse('X = flags.DEFINE_string("x", elsewhere.default, "An x.")')
    with pytest.raises(ValueError, match=r"elsewhere\.default is no literal"):
        flags_of(tree)
    tree = ast.parse('X = flags.DEFINE_float("x", 1.5, lower_bound=0.0, help="An x.")')
    assert flags_of(tree) == [("x", "1.5", (), "An x.")]
