"""Mutations of files whose meaning is not looked at: bytes, files and folders, JSON.

A mutation is a function of a random source and a folder. It changes the folder and returns what it
did, in words. The same seed and the same folder give the same change.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, Path], str]
# Beside the folder under test; nothing in it may be opened.
OUTSIDE = "outside"
NUMBERS = (
    *(0, 1, 2, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40),
    *((1 << 53) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)


def files_of(folder: Path) -> list[Path]:
    """The plain files of the folder, in a fixed order."""
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())


def choose(rng: random.Random, names: str) -> str:
    """One of the names, which are separated by commas; one named twice comes twice as often."""
    return rng.choice(names.split(", "))


def pick(rng: random.Random, folder: Path, suffixes: tuple[str, ...] = ()) -> Path | None:
    found = [p for p in files_of(folder) if not suffixes or p.suffix in suffixes]
    found = [p for p in found if p.stat().st_size < 1 << 24]
    return rng.choice(found) if found else None


def mutate_bytes(rng: random.Random, folder: Path) -> str:
    """Damages one file without looking at it, as often in its first bytes as anywhere."""
    file = pick(rng, folder)
    if file is None:
        return "nothing to damage"
    data = bytearray(file.read_bytes())
    reach = max(1, min(len(data), rng.choice((8, 64, 512, 4096, len(data)))))
    at = min(rng.randrange(reach), len(data))
    length = rng.choice((1, 2, 4, 8, 16, 100))
    action = choose(
        rng,
        "cut, cut, flip, flip, flip, run, run, delete, insert, append, repeat, number, "
        "number, swap",
    )
    if action == "cut":
        at = rng.choice((at, rng.randrange(len(data) + 1), max(len(data) - length, 0)))
        data = data[:at]
    elif action == "flip":
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            if data:
                data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif action == "run":
        fill = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length), b"9" * length))
        data[at : at + length] = fill
    elif action == "delete":
        del data[at : at + length]
    elif action == "insert":
        data[at:at] = rng.choice((b"\0" * length, rng.randbytes(length), b"[" * length))
    elif action == "append":
        data += rng.choice((b"\0", b"\0" * length, rng.randbytes(length), bytes(data[:4096])))
    elif action == "repeat":
        data[at:at] = data[at : at + 4096]
    elif action == "number":
        at -= at % rng.choice((1, 4, 8))
        data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
    else:
        other = rng.randrange(len(data) + 1)
        data[at : at + length], data[other : other + length] = (
            data[other : other + length],
            data[at : at + length],
        )
    file.write_bytes(data)
    return f"{file.name}: {action} at {at}, {length} bytes"


class Witness:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def a_pickle(folder: Path) -> bytes:
    return pickle.dumps(Witness(folder.parent / OUTSIDE / "a pickle was loaded"))


def a_torch_file(folder: Path) -> bytes:
    """A zip with a pickle inside, as torch.save writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", a_pickle(folder))
    return stream.getvalue()


def mutate_files(rng: random.Random, folder: Path) -> str:
    """Puts something else in the place of a file."""
    file = pick(rng, folder)
    if file is None:
        return "nothing to replace"
    content = file.read_bytes()
    action = choose(
        rng,
        "empty, missing, folder, dangling link, loop, device, zeros, pipe, linked, "
        "swapped, sparse, garbage, pickle, torch, only a pickle, zip, stranger, linked "
        "outside",
    )
    outside = folder.parent / OUTSIDE
    if action in ("empty", "garbage", "pickle", "torch", "zip"):
        new = {
            "empty": b"",
            "garbage": rng.randbytes(rng.choice((1, 9, 100, 3000))),
            "pickle": a_pickle(folder),
            "torch": a_torch_file(folder),
            "zip": b"PK\x03\x04" + bytes(200),
        }
        file.write_bytes(new[action])
    elif action == "swapped":
        other = pick(rng, folder)
        assert other is not None
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        action = f"swapped with {other.name}"
    elif action == "sparse":
        with file.open("r+b") as stream:
            stream.truncate(rng.choice((1 << 33, 1 << 40)))
    elif action == "stranger":
        name = rng.choice(("adapter_model.bin", "x.safetensors", "pytorch_model.bin", "a.gguf"))
        target = folder / name
        target.write_bytes(a_pickle(folder) if name.endswith(".bin") else content)
        action = f"beside it {name}"
    elif action == "only a pickle":
        names = {".safetensors": file.with_suffix(".bin").name, ".gguf": "m.pt"}
        name = rng.choice((names.get(file.suffix, "m.pth"), "pytorch_model.bin", "model.pt"))
        file.unlink()
        (folder / name).write_bytes(a_torch_file(folder))
        action = f"missing, but {name} is there"
    else:
        file.unlink()
        if action == "folder":
            file.mkdir()
        elif action == "dangling link":
            file.symlink_to("nowhere")
        elif action == "loop":
            file.symlink_to(file.name)
        elif action == "device":
            file.symlink_to("/dev/zero")
        elif action == "zeros":
            file.symlink_to("/dev/null")
        elif action == "pipe":
            os.mkfifo(file)
        elif action == "linked":  # as a cache of downloads has it: a link to the same content
            store = folder / "blobs"
            store.mkdir(exist_ok=True)
            (store / "0123").write_bytes(content)
            file.symlink_to("blobs/0123")
        elif action == "linked outside":
            file.symlink_to(outside / "nothing.safetensors")
    return f"{file.name}: {action}"


DEEP, DIGITS = "@deep@", "@digits@"
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 63, 1 << 64, -(1 << 63), 10**400,
    0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), "", ".", "..",
    "../outside/secret.safetensors", "/etc/passwd", "a/b", "a\\b", "x" * 5000, "\0", "\n\x1b[31m",
    "\ud800", "secret.bin", "1", "nan", "(", "(a+)+$", [], {}, [None], {"a": None}, [[[[]]]],
    [1] * 1000, [-1], [1 << 40], ["q_proj", "q_proj"], {"q_proj": -1}, DEEP, DIGITS,
)  # fmt: skip


def dump(value: Any) -> str:
    """JSON as `json.dumps` writes it, with what it cannot write in the place of the marks."""
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{DIGITS}"', "9" * 5000)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`, long lists only by their ends."""
    found = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    for key, inner in items if len(items) < 60 else items[:8] + items[-8:]:
        found += [(*path, key), *_places(inner, (*path, key))]
    return found


def edit_json(rng: random.Random, root: Any) -> tuple[str, str]:
    """Returns the text of `root` with one change, and the change in words."""
    places = _places(root)
    # Those near the root count as much as the many deep inside.
    depth = rng.choice((1, 1, 2, 9))
    near = [place for place in places if len(place) <= depth] or places
    if not near:
        return dump(rng.choice(ODD_VALUES)), "another root"
    place = rng.choice(near)
    action = choose(
        rng,
        "odd, odd, odd, odd, near, near, remove, rename, add, twice, swap, root, number, number",
    )
    if action == "number":

        def at(place: tuple[Any, ...]) -> Any:
            value = root
            for key in place:
                value = value[key]
            return value

        numbers = [p for p in places if type(at(p)) is int]
        place = rng.choice(numbers or near)
        action = "value"
    parent = root
    for key in place[:-1]:
        parent = parent[key]
    key, where = place[-1], "/".join(map(str, place))[:100]
    if action == "value":
        parent[key] = rng.choice(NUMBERS if type(parent[key]) is int else ODD_VALUES)
        return dump(root), f"{where} = {parent[key]!r:.60}"
    if action == "odd":
        parent[key] = rng.choice(ODD_VALUES)
        return dump(root), f"{where} = {parent[key]!r:.60}"
    if action == "near":
        old = parent[key]
        if isinstance(old, bool):
            parent[key] = not old
        elif isinstance(old, int):
            parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, old + 0.5, str(old)))
        elif isinstance(old, float):
            parent[key] = rng.choice((old * 2, -old, old + 1e-9, str(old)))
        elif isinstance(old, str):
            parent[key] = rng.choice((old + "x", old[:-1], old.upper(), f"../{old}", [old], " "))
        elif isinstance(old, list):
            parent[key] = rng.choice((old[1:], old + old[:1], old[::-1], {"0": old}, old * 3))
        elif isinstance(old, dict):
            parent[key] = rng.choice((list(old), {}, {**old, "more": old}, list(old.values())))
        else:
            parent[key] = rng.choice(ODD_VALUES)
        return dump(root), f"{where}: {old!r:.40} -> {parent[key]!r:.60}"
    if action == "root":
        root = rng.choice(([], [root], {"a": root}, None, "text", 1, [root, root], {}))
        return dump(root), "another root"
    if action == "swap":
        other = rng.choice([p for p in near if p[:-1] == place[:-1]])[-1]
        parent[key], parent[other] = parent[other], parent[key]
        return dump(root), f"{where} and {str(other)[:40]} swapped"
    if not isinstance(parent, dict):
        del parent[key]
        return dump(root), f"{where} removed"
    if action == "twice":
        # Put first, so that a reader that takes the last one still sees the old value.
        mark, twin = "@twin@", rng.choice((parent[key], rng.choice(ODD_VALUES)))
        items = list(parent.items())
        parent.clear()
        parent.update({mark: twin, **dict(items)})
        text = dump(root).replace(json.dumps(mark), json.dumps(key), 1)
        return text, f"{where} twice, first {twin!r:.40}"
    old = parent[key]
    if action == "add":
        name = rng.choice(("", "..", "/etc/passwd", "x" * 5000, "use_dora", "\ud800", "more"))
        parent[name] = rng.choice((old, rng.choice(ODD_VALUES)))
        return dump(root), f"{where}: beside it {name[:20]!r}"
    del parent[key]
    if action == "rename":
        name = rng.choice(("", "..", str(key) + "x", str(key)[:-1], str(key).upper(), "a/b", "\0"))
        parent[name] = old
        return dump(root), f"{where} renamed {name!r:.60}"
    return dump(root), f"{where} removed"


def mutate_json(rng: random.Random, folder: Path) -> str:
    """Changes one value, or the form, of a JSON file."""
    file = pick(rng, folder, (".json",))
    if file is None:
        return "no JSON to change"
    try:
        text = file.read_text(encoding="utf-8")
        root = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, folder)
    if rng.random() < 0.9:
        text, done = edit_json(rng, root)
        file.write_text(text, encoding="utf-8")
        return f"{file.name}: {done}"
    form = rng.choice(("mark", "UTF-16", "comma", "tail", "quotes", "deep", "comment", "objects"))
    data = text.encode()
    if form == "mark":
        data = b"\xef\xbb\xbf" + data
    elif form == "UTF-16":
        data = text.encode("utf-16")
    elif form == "comma":
        data = data.rstrip()[:-1] + b",}"
    elif form == "tail":
        data += data
    elif form == "quotes":
        data = data.replace(b'"', b"'")
    elif form == "deep":
        data = rng.choice((b"[", b'{"a":', b"[{},")) * 200_000
    elif form == "comment":
        data = b"// a comment\n" + data
    else:
        data = b"{}" + data
    file.write_bytes(data)
    return f"{file.name}: as JSON {form}"


def clear(folder: Path) -> None:
    """Removes the folder, whatever has been put in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
