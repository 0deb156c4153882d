"""The notebooks: their first cells, their pairs, and running them.

    python tools/notebooks.py               writes the first cells and the .ipynb of each .py
    python tools/notebooks.py --run         runs them all and keeps the outputs; takes long
    python tools/notebooks.py --run 02 05   those whose name starts so
    python tools/notebooks.py --check       says what a plain call would change, with status 1

A notebook is a pair: `notebooks/NAME.py` is what people edit (jupytext's percent format), and
`notebooks/NAME.ipynb` is the same with outputs. The badge and the cell that sets Colab up come from
here, and the repository's address from `[tool.mos_jax]` in pyproject.toml. Where no code of a .py
changed, the set-up aside, its .ipynb keeps its outputs.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
BADGE_TAG, SETUP_TAG, PARAMETERS_TAG = "badge", "setup", "parameters"
TIMEOUT = 7200  # seconds of one cell

_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}.ipynb)"
)
_SETUP = """\
# In a checkout there is nothing to do. On Colab: fetch one, install it and the default base.
import os
import runpy
import subprocess
import sys
from pathlib import Path

on_colab = "google.colab" in sys.modules
if on_colab and not Path("pyproject.toml").exists():
    if not Path("mos_jax").exists():
        address = "{repository}"
        subprocess.run(["git", "clone", "--depth=1", address, "mos_jax"], check=True)
    os.chdir("mos_jax")  # after a restart of the kernel, too
here = Path.cwd()
os.chdir(next(folder for folder in [here, *here.parents] if (folder / "pyproject.toml").exists()))
sys.path.insert(0, os.getcwd())  # configs/ is not part of the package
if on_colab:
    runpy.run_path("tools/colab.py", run_name="__main__")"""
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def names() -> list[str]:
    """All notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def repository() -> str:
    """The repository's address; the one place where it stands is pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["mos_jax"]["repository"].rstrip("/")


def first_cells(name: str) -> dict[str, str]:
    """What stands in the cells that are the same in all notebooks, by their tag."""
    slug = "/".join(repository().split("/")[-2:])
    return {
        BADGE_TAG: _BADGE.format(slug=slug, name=name),
        SETUP_TAG: _SETUP.format(repository=repository()),
    }


def read(name: str) -> nbformat.NotebookNode:
    """The notebook of a .py, with the first cells as they should be, and no outputs."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    wanted = first_cells(name)
    for cell in notebook.cells:
        for tag in set(cell.metadata.get("tags", ())) & set(wanted):
            cell.source = wanted.pop(tag)
    if wanted:
        raise ValueError(f"notebooks/{name}.py has no cell with the tag {', '.join(wanted)}")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        if cell.cell_type == "code":
            cell.setdefault("outputs", [])
            cell.setdefault("execution_count", None)
    notebook.metadata["kernelspec"] = dict(_KERNEL)
    notebook.metadata.setdefault("jupytext", {})["formats"] = "ipynb,py:percent"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def with_outputs(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """Gives it the outputs of its .ipynb, if every cell that computes is still the same."""
    path = FOLDER / f"{name}.ipynb"
    if path.exists():
        old = nbformat.read(path, as_version=4)
        if sources(old) == sources(notebook):
            before = iter(cell for cell in old.cells if cell.cell_type == "code")
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    ran = next(before)
                    cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    return notebook


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    """The code of every cell; of the one that sets up, only that it is there."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["" if SETUP_TAG in c.metadata.get("tags", ()) else c.source for c in code]


def run(
    notebook: nbformat.NotebookNode,
    parameters: Mapping[str, Any] | None = None,
    folder: Path = ROOT,
) -> nbformat.NotebookNode:
    """Runs a notebook in a new kernel, in `folder`, with other `parameters` where they are given.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
      ValueError: for a parameter that the cell does not set.
    """
    whole = nbformat.from_dict(notebook)
    if parameters:
        (cell,) = [c for c in whole.cells if PARAMETERS_TAG in c.metadata.get("tags", ())]
        known = {line.split(" = ")[0] for line in cell.source.splitlines()}
        if unknown := set(parameters) - known:
            raise ValueError(f"{sorted(unknown)} are no parameters of it; it has {sorted(known)}")
        cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    client = NotebookClient(
        whole,
        timeout=TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in whole.cells:
        cell.metadata.pop("execution", None)  # times of this machine
    return whole


def texts(name: str, notebook: nbformat.NotebookNode) -> dict[Path, str]:
    """Both files of the pair, as they should stand on disk."""
    plain = nbformat.from_dict(notebook)
    plain.metadata = nbformat.from_dict(
        {key: plain.metadata[key] for key in ("jupytext", "kernelspec")}
    )
    source = jupytext.writes(plain, fmt="py:percent")
    # The version of whoever wrote it says nothing.
    source = "".join(
        line for line in source.splitlines(keepends=True) if "jupytext_version" not in line
    )
    return {
        FOLDER / f"{name}.py": source,
        FOLDER / f"{name}.ipynb": nbformat.writes(plain) + "\n",
    }


def main() -> int:
    """Does what the flags say; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run them and keep the outputs")
    parser.add_argument("--check", action="store_true", help="only say what is not up to date")
    parser.add_argument("names", nargs="*", help="starts of names; default: all")
    flags = parser.parse_args()
    stale = []
    for name in names():
        if flags.names and not any(name.startswith(start) for start in flags.names):
            continue
        notebook = read(name)
        if flags.run:
            print(f"running {name}", flush=True)
            notebook = run(notebook)
        else:
            notebook = with_outputs(notebook, name)
        for path, text in texts(name, notebook).items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.relative_to(ROOT))
                if not flags.check:
                    path.write_text(text, encoding="utf-8")
    verb = "to write" if flags.check else "wrote"
    print("\n".join(f"{verb} {path}" for path in stale) or "all notebooks are up to date")
    return int(flags.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
