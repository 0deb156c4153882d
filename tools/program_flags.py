"""The page of all programs and their flags, from the programs themselves."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def programs() -> list[Path]:
    """The programs, by name."""
    return sorted((ROOT / "experiments").glob("*.py"))


def flags_of(tree: ast.AST) -> list[tuple[str, str, str]]:
    """Name, default and help of every flag that a program defines."""
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "define_config":
            found.append(("config", ast.unparse(node.args[0]), "File of the configuration."))
        elif node.func.attr == "define_hosts":
            found += flags_of(_app_function("define_hosts"))
        elif node.func.attr.startswith("DEFINE_"):
            name, default, *rest = [_value(argument) for argument in node.args]
            found.append((name, default, rest[-1] if rest else ""))
    return found


def _app_function(name: str) -> ast.FunctionDef:
    """The function of mos_jax/app.py that defines flags for several programs."""
    tree = ast.parse((ROOT / "mos_jax" / "app.py").read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


def _value(node: ast.expr) -> str:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
    return value if isinstance(value, str) else repr(value)


def program_page() -> str:
    """The page, in Markdown."""
    lines = [
        "# Programs and their flags",
        "",
        "`--help` of each shows the same; a field of a configuration is a flag too, as in",
        "`--config.adapter.rank=16`. All fail with one line that says what to mend, and all take",
        "`--compilation_cache`, the folder of compiled programs, or `off`.",
    ]
    for path in programs():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first, _, rest = (ast.get_docstring(tree) or "").partition("\n")
        lines += ["", f"## experiments/{path.name}", "", first, "", "```text", rest.strip(), "```"]
        rows = flags_of(tree)
        if rows:
            lines += ["", "| flag | default | |", "|---|---|---|"]
            lines += [
                f"| `--{name}` | `{default or ' '}` | {text.replace('|', chr(92) + '|')} |"
                for name, default, text in rows
            ]
    return "\n".join(lines) + "\n"
