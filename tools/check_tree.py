"""Checks the files of the checkout that no linter looks at.

Usage: `python tools/check_tree.py [ROOT]`. Looks at what git tracks or would add (in a tree without
git, at everything but caches and outputs), prints one line per offence, and exits with status 1
when there is one. What it refuses:

  * files over 1 MiB, and pickles and other weights;
  * paths of one machine in a text (tests may name temporary folders);
  * lines of constraints.txt that are not `name==version`, or that name a host;
  * modules of mos_jax over 400 lines;
  * links in the Markdown files of the root to files, folders or headings that do not exist;
  * modules of mos_jax that WORKSPACE.md does not name, and names there of none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

MAX_BYTES = 1 << 20
MAX_MODULE_LINES = 400
WEIGHT_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "runs", "site"}
MARKDOWN = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "WORKSPACE.md")

_START = r"(?<![\w.~\-/$}])"  # the path is absolute: nothing of a longer one stands before it
_HOMES = re.compile(_START + r"/(?:root|work|home/\w+|Users/\w+)/[\w.\-]*")
_TEMPORARY = re.compile(_START + r"/tmp/[\w.\-]+")
_PIN = re.compile(r"^[A-Za-z0-9][\w.\-]*==[\w.!]+(?:\s*;.*)?$")
_HOST = re.compile(r"://|\b[\w\-]+\.(?:com|dev|io|net|org)\b", re.IGNORECASE)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
_ROW = re.compile(r"^\| (`mos_jax/.*?) \|(.*)$", re.MULTILINE)
_MODULE = re.compile(r"`(?:[\w/]*/)?(\w+\.py)`")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def list_files(root: Path) -> list[str]:
    """Returns the files of the tree, as paths relative to `root` with forward slashes."""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return sorted(names)


def check_file(name: str, content: bytes) -> Iterator[str]:
    """Yields what is wrong with one file, whatever its kind."""
    if len(content) > MAX_BYTES:
        yield f"{name}: {len(content)} bytes, over {MAX_BYTES}"
    if Path(name).suffix.lower() in WEIGHT_SUFFIXES:
        yield f"{name}: weights and pickles do not belong in the tree"
    if b"\0" in content[:8192]:
        return
    lines = content.decode(errors="replace").splitlines()
    patterns = [_HOMES] if name.startswith("tests/") else [_HOMES, _TEMPORARY]
    for number, line in enumerate(lines, 1):
        for match in (pattern.search(line) for pattern in patterns):
            if match:
                yield f"{name}:{number}: a path of one machine: {match.group()}"
    if name.startswith("mos_jax/") and name.endswith(".py") and len(lines) > MAX_MODULE_LINES:
        yield f"{name}: {len(lines)} lines, over {MAX_MODULE_LINES}"


def check_constraints(name: str, text: str) -> Iterator[str]:
    """Yields the lines of a constraints file that are more than a name and a version."""
    for number, line in enumerate(text.splitlines(), 1):
        if _HOST.search(line):
            yield f"{name}:{number}: names a host: {line.strip()}"
        elif line.strip() and not line.startswith("#") and not _PIN.match(line.strip()):
            yield f"{name}:{number}: not name==version: {line.strip()}"


def heading_anchors(text: str) -> set[str]:
    """Returns the anchors a Markdown page has, by the rule of the common forges."""
    anchors: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in anchors:
            number += 1
        anchors.add(anchor)
    return anchors


def check_links(name: str, text: str, root: Path, files: set[str]) -> Iterator[str]:
    """Yields the relative links of a Markdown page that point nowhere."""
    folders = {parent.as_posix() for file in files for parent in Path(file).parents}
    for groups in _LINK.findall(_FENCE.sub("", text)):
        link = groups[0] or groups[1]
        if re.match(r"[a-z][a-z0-9+.\-]*:|//", link, re.IGNORECASE):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        if target not in files and target not in folders:
            yield f"{name}: a link to {link}, which is not in the tree"
        elif anchor and target.endswith(".md"):
            if anchor not in heading_anchors((root / target).read_text(encoding="utf-8")):
                yield f"{name}: a link to {link}, a heading that does not exist"


def check_map(name: str, text: str, files: set[str]) -> Iterator[str]:
    """Yields the modules of mos_jax/ that its row of the map does not name, and names of none.

    A folder's row names the files of its folders too: a name as often as there are such files.
    """
    named: dict[str, Counter[str]] = {}
    for place, row in _ROW.findall(text):
        folder = re.match(r"`(mos_jax/(?:\w+/)?)", place)
        own = row if place.endswith("/`") else place
        if folder:
            named.setdefault(folder[1], Counter()).update(_MODULE.findall(own))
    there: dict[str, Counter[str]] = {}
    for file in sorted(files):
        first, *path = file.split("/")
        if first == "mos_jax" and path[-1].endswith(".py") and path[-1] != "__init__.py":
            folder_name = f"mos_jax/{path[0]}/" if len(path) > 1 else "mos_jax/"
            there.setdefault(folder_name, Counter()).update(path[-1:])
    for place in sorted(named.keys() | there.keys()):
        stated, found = named.get(place, Counter()), there.get(place, Counter())
        for module in sorted((found - stated).keys()):
            yield f"{name}: the row of {place} does not name {module}"
        for module in sorted((stated - found).keys()):
            yield f"{name}: the row of {place} names {module}, which is not there"


def check_tree(root: Path) -> list[str]:
    """Returns all offences of the tree at `root`, one line each."""
    files = list_files(root)
    offences: list[str] = []
    for name in files:
        content = (root / name).read_bytes()
        offences += check_file(name, content)
        if name == "constraints.txt":
            offences += check_constraints(name, content.decode())
        if name in MARKDOWN:
            offences += check_links(name, content.decode(), root, set(files))
        if name == "WORKSPACE.md":
            offences += check_map(name, content.decode(), set(files))
    return offences


def main(argv: list[str]) -> int:
    """Runs the checks; returns the exit status."""
    root = Path(argv[1]) if len(argv) > 1 else Path(__file__).parent.parent
    offences = check_tree(root.resolve())
    print("\n".join(offences) if offences else "check_tree: the tree is in order")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
