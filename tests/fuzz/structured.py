"""Mutations that know a format: a safetensors header, a GGUF key or tensor.

The parsers here are written for sound files only, apart from the readers under test.
"""

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import DEEP, NUMBERS, choose, edit_json, mutate_bytes, pick

NAMES = (
    *("", "..", "../../outside/secret", "/etc/passwd", "x" * 70_000, "\0", "\n\x1b[31m", "a/b"),
    *("\u00e9", "blk.0.attn_q.weight", "lm_head.weight", "q_proj", "{}", "%s"),
)
BAD_FLOATS = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45)


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the payload of a sound file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict) or not all(isinstance(v, dict) for v in header.values()):
        raise ValueError("damaged before")
    return header, data[8 + length :]


def join_safetensors(header: str, payload: bytes, length: int | None = None) -> bytes:
    text = header.encode("utf-8", errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def _damaged_range(rng: random.Random, begin: int, end: int, size: int) -> Any:
    ranges: tuple[Any, ...] = (
        [-8, end - begin - 8],
        [end, begin],
        [begin + 1, end + 1],
        [begin, end - 1],
        [begin, size + 4],
        [0, end - begin],
        [begin + 4, end + 4],
        [1 << 63, (1 << 63) + end - begin],
        [begin, 1 << 64],
        [begin, begin],
        [begin],
        [],
        [begin, end, end],
        [begin + 0.5, end + 0.5],
        None,
    )
    return rng.choice(ranges)


def _damaged_shape(rng: random.Random, shape: list[int]) -> Any:
    return rng.choice(
        (
            [],
            [0],
            [0, *shape],
            shape[::-1],
            [-n for n in shape],
            [*shape, 1],
            [math.prod(shape)],
            [1 << 40, 1 << 40],
            [1 << 63, 2],
            [1 << 32, 1 << 32],
            [*shape[:-1], shape[-1] + 1] if shape else [1],
            [n + 0.5 for n in shape],
            [1] * 10_000,
            None,
            "wide",
        )
    )


def mutate_safetensors(rng: random.Random, folder: Path) -> str:
    """Rewrites the header, or a value, of a safetensors file that is otherwise whole."""
    file = pick(rng, folder, (".safetensors",))
    if file is None:
        return mutate_bytes(rng, folder)
    data = file.read_bytes()
    try:
        header, payload = split_safetensors(data)
        names = sorted(name for name in header if name != "__metadata__")
        name = rng.choice(names)
        entry = header[name]
        begin, end = map(int, entry["data_offsets"])
    except (ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError):
        return mutate_bytes(rng, folder)
    action = choose(
        rng,
        "dtype, dtype, shape, shape, range, range, exchange, name, length, length, "
        "metadata, value, value, hole, same place, drop, add, json, twice, spaces, retype",
    )
    length = None
    text = None
    if action == "dtype":
        kinds = (
            "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 F4 C64 f32 F128 U16".split()
        )
        entry["dtype"] = rng.choice((*kinds, "", None, 32, "x" * 5000, ["F32"]))
    elif action == "retype":
        # Sound, but of another type: every size agrees.
        entry["dtype"] = rng.choice(("I32", "U32", "F32"))
    elif action == "shape":
        entry["shape"] = _damaged_shape(rng, entry["shape"])
    elif action == "range":
        entry["data_offsets"] = _damaged_range(rng, begin, end, len(payload))
    elif action == "exchange":
        other = header[rng.choice(names)]
        part = rng.choice(("data_offsets", "shape", "dtype"))
        entry[part], other[part] = other[part], entry[part]
    elif action == "name":
        del header[name]
        header[rng.choice((*NAMES, rng.choice(names), "\ud800"))] = entry
    elif action == "length":
        now = len(json.dumps(header))
        length = rng.choice((*NUMBERS, now - 1, now + 1, now + 8, len(data), len(data) - 8))
    elif action == "metadata":
        header["__metadata__"] = rng.choice(
            ({"format": 1}, {"format": "x" * 9999}, {"a": {"b": "c"}}, [], "text", 7, {}, DEEP)
        )
    elif action == "value":
        bad, changed = rng.choice(BAD_FLOATS), bytearray(payload)
        kind, width = {"F16": ("e", 2), "BF16": ("f", 4)}.get(entry["dtype"], ("f", 4))
        if end - begin >= 4:
            at = begin + rng.randrange((end - begin) // width) * width
            try:
                changed[at : at + width] = struct.pack("<" + kind, bad)
            except OverflowError:
                changed[at : at + width] = b"\xff" * width
        payload = bytes(changed)
    elif action == "hole":
        gap = rng.choice((1, 4, 64))
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [n + gap for n in other["data_offsets"]]
        payload = payload[:end] + bytes(gap) + payload[end:]
    elif action == "same place":
        like = [n for n in names if header[n].get("shape") == entry["shape"]]
        entry["data_offsets"] = header[rng.choice(like)]["data_offsets"]
    elif action == "drop":
        # Taken out cleanly, so that only its absence is wrong.
        del header[name]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [n - (end - begin) for n in other["data_offsets"]]
        payload = payload[:begin] + payload[end:]
    elif action == "add":
        size = rng.choice((0, 4, 400))
        place = [len(payload), len(payload) + size]
        header[rng.choice(NAMES)] = {"dtype": "F32", "shape": [size // 4], "data_offsets": place}
        payload += bytes(size)
    elif action == "twice":
        twin = rng.choice((entry, {**entry, "data_offsets": [0, 4], "shape": [1]}))
        text = "{" + json.dumps(name) + ":" + json.dumps(twin) + "," + json.dumps(header)[1:]
    elif action == "spaces":
        text = json.dumps(header) + " " * rng.choice((1, 7, 100_000))
    else:
        text, done = edit_json(rng, header)
        action += f" {done}"
    content = text if text is not None else json.dumps(header)
    content = content.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    file.write_bytes(join_safetensors(content, payload, length))
    return f"{file.name}: {action} of {name[:80]!r}: {entry!r:.100} length {length}"


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
SCALARS[12] = "d"


class GGUFParts:
    """A sound GGUF file in parts: its fields, its tensors, and where each number of them stands.

    Attributes:
        numbers: (what, struct code, position) of every number of the header.
        strings: (what, start, stop) of every key, name and text, the length before it included.
        fields: (key, start, stop) of every pair of key and value.
        tensors: (name, start, stop) of every tensor's entry.
        data: position of the first tensor's values.
    """

    def __init__(self, raw: bytes):
        self.raw = raw
        self.at = 0
        self.numbers: list[tuple[str, str, int]] = []
        self.strings: list[tuple[str, int, int]] = []
        self.fields: list[tuple[str, int, int]] = []
        self.tensors: list[tuple[str, int, int]] = []
        if raw[:4] != b"GGUF":
            raise ValueError("damaged before")
        self.at = 4
        self.number("version", "I")
        num_tensors, num_fields = self.number("tensors", "Q"), self.number("fields", "Q")
        if num_tensors > 1000 or num_fields > 1000:
            raise ValueError("damaged before")
        for _ in range(num_fields):
            start = self.at
            key = self.string("key")
            self.value(key, self.number(f"type of {key}", "I"))
            self.fields.append((key, start, self.at))
        for _ in range(num_tensors):
            start = self.at
            name = self.string("name")
            axes = self.number(f"axes of {name}", "I")
            for axis in range(min(axes, 8)):
                self.number(f"axis {axis} of {name}", "Q")
            self.number(f"type of tensor {name}", "I")
            self.number(f"offset of {name}", "Q")
            self.tensors.append((name, start, self.at))
        self.data = -(-self.at // 32) * 32

    def number(self, what: str, code: str) -> Any:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self.raw[self.at : self.at + size])
        self.numbers.append((what, code, self.at))
        self.at += size
        return value

    def string(self, what: str) -> str:
        start = self.at
        length = self.number(f"length of a {what}", "Q")
        text = self.raw[self.at : self.at + length].decode()
        self.at += length
        self.strings.append((f"{what} {text[:40]}", start, self.at))
        return text

    def value(self, key: str, kind: int) -> None:
        if kind == 8:
            self.string(f"text of {key}")
        elif kind == 9:
            inner, count = self.number(f"type in {key}", "I"), self.number(f"count in {key}", "Q")
            if count > 100_000:
                raise ValueError("damaged before")
            before = len(self.numbers), len(self.strings)
            for _ in range(count):
                self.value(key, inner)
            # Of a long list its ends will do.
            for listed, start in zip((self.numbers, self.strings), before, strict=True):
                _thin(listed, start)
        else:
            self.number(key, SCALARS[kind])


def _thin(listed: Any, start: int) -> None:
    del listed[start + 4 : max(start + 4, len(listed) - 4)]


def _packed(code: str, value: Any) -> bytes:
    if code in "fd":
        return struct.pack("<" + code, value if abs(value) < 3e38 or code == "d" else math.inf)
    bits = 8 * struct.calcsize("<" + code)
    return (int(value) % (1 << bits)).to_bytes(bits // 8, "little")


def _text(value: str) -> bytes:
    content = value.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _field(rng: random.Random, key: str) -> bytes:
    """A pair of `key` and an odd value of a random type."""
    kind = rng.choice((*SCALARS, 8, 9, 13, 99))
    head = _text(key) + struct.pack("<I", kind)
    if kind in SCALARS:
        code = SCALARS[kind]
        return head + _packed(code, rng.choice(BAD_FLOATS if code in "fd" else NUMBERS))
    if kind == 8:
        return head + _text(rng.choice(NAMES))
    inner = rng.choice((0, 4, 6, 8, 9))
    if inner == 9:  # lists in lists, as deep as it gets
        return head + (struct.pack("<IQ", 9, 1) * rng.choice((1, 5000))) + struct.pack("<IQ", 4, 0)
    count = rng.choice((0, 1, 3, 1 << 31, 1 << 40, 1 << 61, (1 << 64) - 1))
    return head + struct.pack("<IQ", inner, count) + bytes(24)


def mutate_gguf(rng: random.Random, folder: Path) -> str:
    """Changes a number, a string, a field or a tensor of a GGUF file that is otherwise whole."""
    file = pick(rng, folder, (".gguf",))
    if file is None:
        return mutate_bytes(rng, folder)
    raw = file.read_bytes()
    try:
        parts = GGUFParts(raw)
    except (ValueError, KeyError, struct.error):
        return mutate_bytes(rng, folder)
    if not parts.fields or not parts.tensors:
        return mutate_bytes(rng, folder)
    # Everything before the data, in one place, so that lengths may change; the padding is redone.
    head, data = bytearray(raw[: parts.at]), raw[parts.data :]
    action = choose(
        rng,
        "number, number, number, number, number, count, string, string, drop field, twin "
        "field, odd field, odd field, known field, known field, drop tensor, twin tensor, "
        "overlap, overlap, unaligned, retype, value, value, alignment, order",
    )

    def put(code: str, at: int, value: Any) -> None:
        new = _packed(code, value)
        head[at : at + len(new)] = new

    what = ""
    if action == "number":
        what, code, at = rng.choice(parts.numbers)
        (old,) = struct.unpack_from("<" + code, head, at)
        if code in "fd":
            value = rng.choice((*BAD_FLOATS, 0.0, -1.0, old * 2))
        else:
            value = rng.choice((*NUMBERS, int(old) + 1, int(old) - 1, int(old) * 2, -1))
        put(code, at, value)
        what += f" = {value}"
    elif action == "count":
        what, code, at = rng.choice(parts.numbers[1:3])
        put(code, at, rng.choice(NUMBERS))
    elif action == "string":
        what, start, stop = rng.choice(parts.strings)
        new = rng.choice((*NAMES, rng.choice(parts.strings)[0], "a\ud800"))
        head[start:stop] = _text(new)
        what += f" -> {new[:40]!r}"
    elif action in ("drop field", "twin field", "odd field", "known field"):
        what, start, stop = rng.choice(parts.fields)
        (count,) = struct.unpack_from("<Q", head, 16)
        if action == "drop field":
            del head[start:stop]
            put("Q", 16, count - 1)
        elif action == "twin field":
            head[start:start] = head[start:stop]
            put("Q", 16, count + 1)
        elif action == "known field":
            head[start:stop] = _field(rng, what)
        else:
            key = rng.choice((*NAMES, "llama.rope.scaling.type", "general.alignment", what + "x"))
            head[start:start] = _field(rng, key)
            put("Q", 16, count + 1)
    elif action in ("drop tensor", "twin tensor"):
        what, start, stop = rng.choice(parts.tensors)
        (count,) = struct.unpack_from("<Q", head, 8)
        if action == "drop tensor":
            del head[start:stop]
        else:
            entry = bytes(head[start:stop])
            name = rng.choice((what, "more", *NAMES))
            head[start:start] = _text(name) + entry[len(_text(what)) :]
        put("Q", 8, count + (-1 if action == "drop tensor" else 1))
    elif action in ("overlap", "unaligned", "retype"):
        offsets = [n for n in parts.numbers if n[0].startswith("offset of ")]
        kinds = [n for n in parts.numbers if n[0].startswith("type of tensor ")]
        what, code, at = rng.choice(kinds if action == "retype" else offsets)
        (old,) = struct.unpack_from("<" + code, head, at)
        if action == "overlap":
            value = struct.unpack_from("<Q", head, rng.choice(offsets)[2])[0] + rng.choice((0, 32))
        elif action == "unaligned":
            value = old + rng.choice((1, 4, 16, -1))
        else:
            value = rng.randrange(45)
        put(code, at, value)
        what += f" = {value}"
    elif action == "value":
        changed = bytearray(data)
        at = rng.randrange(max(1, len(changed) // 4)) * 4
        changed[at : at + 4] = struct.pack("<f", rng.choice(BAD_FLOATS))
        data, what = bytes(changed), f"float at {at} of the data"
    elif action == "alignment":
        (count,) = struct.unpack_from("<Q", head, 16)
        value = rng.choice((0, 1, 7, 8, 32, 64, 96, 1 << 20, 1 << 31, (1 << 32) - 1))
        entry = _text("general.alignment") + struct.pack("<II", 4, value)
        head[24:24] = entry
        put("Q", 16, count + 1)
        what = str(value)
    else:
        starts = [(start, stop) for _, start, stop in parts.tensors]
        entries = [bytes(head[a:b]) for a, b in starts]
        rng.shuffle(entries)
        head[starts[0][0] : starts[-1][1]] = b"".join(entries)
    file.write_bytes(bytes(head) + bytes(-len(head) % 32) + data)
    return f"{file.name}: {action} {what[:120]}"
