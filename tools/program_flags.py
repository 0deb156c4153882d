"""The page of all programs and their flags, from the programs themselves."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Flag(NamedTuple):
    """A flag that a program defines.

    Attributes:
      name: without its dashes.
      default: as it is written on a command line; empty for none.
      values: those allowed, of a flag with a list of them.
      text: its help.
    """

    name: str
    default: str
    values: tuple[str, ...]
    text: str


def programs() -> list[Path]:
    """The programs, by name."""
    return sorted((ROOT / "experiments").glob("*.py"))


def flags_of(tree: ast.Module | ast.FunctionDef) -> list[Flag]:
    """Every flag that a program defines.

    Raises:
      ValueError: for a default, values or help that is neither a literal nor a name of one.
    """
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        kind = node.func.attr
        if kind == "define_config":
            default = _word(_value(node.args[0], constants))
            found.append(Flag("config", default, (), config_help()))
        elif kind == "define_hosts":
            found += flags_of(_app_function("define_hosts"))
        elif kind.startswith("DEFINE_"):
            # Of an enum, the values stand before the help.
            names = ["name", "default", *(["values"] if "enum" in kind else []), "help"]
            given = {
                **dict(zip(names, node.args, strict=False)),
                **{word.arg: word.value for word in node.keywords if word.arg},
            }
            name, default, text = (_value(given[key], constants) for key in (*names[:2], "help"))
            values = _value(given["values"], constants) if "values" in given else ()
            found.append(Flag(name, _word(default), tuple(values), text))
    return found


def config_help() -> str:
    """The help of `--config`, which mos_jax/app.py defines for all programs."""
    for node in ast.walk(_app_function("define_config")):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "DEFINE_config_file":
            return ast.literal_eval(node.args[2])
    raise LookupError("define_config() in mos_jax/app.py defines no flag")


def _app_function(name: str) -> ast.FunctionDef:
    """The function of mos_jax/app.py that defines flags for several programs."""
    tree = ast.parse((ROOT / "mos_jax" / "app.py").read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


def _value(node: ast.expr, constants: Mapping[str, ast.expr]) -> Any:
    """What an argument stands for."""
    if isinstance(node, ast.Name) and node.id in constants:
        node = constants[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"line {node.lineno}: {ast.unparse(node)} is no literal") from None


def _word(value: Any) -> str:
    """A default as it is written on a command line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _row(flag: Flag) -> str:
    text = flag.text.replace("|", r"\|")
    if flag.values:
        text = f"{', '.join(f'`{value}`' for value in flag.values)}. {text}"
    default = f"`{flag.default}`" if flag.default else ""
    return f"| `--{flag.name}` | {default} | {text} |"


def program_page() -> str:
    """The page, in Markdown."""
    lines = [
        "# Programs and their flags",
        "",
        "`--help` of each shows the same; [a field of a config](config.md) is a flag too, as in",
        "`--config.adapter.rank=16`. All fail with one line that says what to mend, and take",
        "`--compilation_cache`, the folder of compiled programs, or `off`.",
    ]
    for path in programs():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first, _, rest = (ast.get_docstring(tree) or "").partition("\n")
        lines += ["", f"## experiments/{path.name}", "", first, "", "```text", rest.strip(), "```"]
        flags = flags_of(tree)
        if flags:
            lines += ["", "| flag | default | |", "|---|---|---|", *map(_row, flags)]
    return "\n".join(lines) + "\n"
