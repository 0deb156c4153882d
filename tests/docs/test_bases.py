"""docs/bases.md names what the code knows, all of it, and its example runs."""

import re
from pathlib import Path

from mos_jax.models.base import NAMED_BASES
from mos_jax.models.gguf import GGUF_TYPES
from mos_jax.models.gguf_config import GGUF_ARCHITECTURES
from mos_jax.models.gguf_tokenizer import GGUF_TOKENIZERS, PRE_TOKENIZERS
from mos_jax.models.huggingface_config import MODEL_TYPES

PAGE = (Path(__file__).parents[2] / "docs/bases.md").read_text(encoding="utf-8")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)


def column(text, number):
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    return [re.findall(r"`([^`]+)`", row[number]) for row in rows]


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    names: dict = {}
    exec(code, names)
    assert names["ids"] == list(b"Hello")


def test_names_and_families_are_those_of_the_code():
    assert [name for (name,) in column(section("Names"), 0)] == sorted(
        NAMED_BASES, key=["smollm2-135m-instruct", "gemma3-270m", "tiny-random"].index
    )
    families = section("Families")
    assert {name for cell in column(families, 1) for name in cell} == {*MODEL_TYPES, "gemma3"}
    assert {name for cell in column(families, 2) for name in cell} == set(GGUF_ARCHITECTURES)


def test_types_and_tokenizers_are_those_of_the_code():
    listed = section("GGUF files").split("mixed")[0]
    assert re.findall(r"[A-Z]+\d*_?\w*", listed.partition("be ")[2]) == list(GGUF_TYPES)
    tokenizers = section("Tokenizers")
    assert tuple(name for (name,) in column(tokenizers, 0)) == GGUF_TOKENIZERS
    row = next(line for line in tokenizers.splitlines() if line.startswith("| `gpt2`"))
    known = set(re.findall(r"`([^`]+)`", row.split("|")[3])) - {"tokenizer.ggml.pre"}
    assert known == set(PRE_TOKENIZERS)
