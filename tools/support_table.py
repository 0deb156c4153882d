"""Finds out what works with what, by trying it on tiny models, and writes docs/support.md.

Usage: `make support`. A cell says yes if the thing was done just now, and
otherwise gives the number of the reason with which it was refused. Anything but a refusal in words
(an `InputError`) ends the program. `tests/docs/test_support.py` compares the page with the code.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the fixtures that write model files are no part of the package
    sys.path.insert(0, str(ROOT))

from mos_jax.adapters.adapter import Adapter, AdapterConfig  # noqa: E402
from mos_jax.adapters.bank import BASE_NAME, AdapterBank  # noqa: E402
from mos_jax.adapters.combine import HOW, combine  # noqa: E402
from mos_jax.adapters.methods import METHODS, create_adapter  # noqa: E402
from mos_jax.adapters.sites import select_sites  # noqa: E402
from mos_jax.adapters.storage import save_adapter  # noqa: E402
from mos_jax.conversion.formats import FORMATS, Options, check_request, convert  # noqa: E402
from mos_jax.conversion.source import load_source  # noqa: E402
from mos_jax.errors import InputError  # noqa: E402
from mos_jax.interop.adapter_gguf import read_adapter_gguf, write_adapter_gguf  # noqa: E402
from mos_jax.interop.as_lora import lora_from_factors  # noqa: E402
from mos_jax.interop.huggingface_out import write_model  # noqa: E402
from mos_jax.interop.merged import merge  # noqa: E402
from mos_jax.interop.peft import export_peft, read_peft_factors  # noqa: E402
from mos_jax.interop.peft_import import import_peft  # noqa: E402
from mos_jax.interop.peft_native import NATIVE, export_native  # noqa: E402
from mos_jax.models import gguf  # noqa: E402
from mos_jax.models.base import Base, load_base  # noqa: E402
from mos_jax.models.config import FAMILIES, DecoderConfig  # noqa: E402
from mos_jax.models.gguf_tokenizer import PRE_TOKENIZERS  # noqa: E402
from mos_jax.models.huggingface_config import ARCHITECTURES  # noqa: E402
from mos_jax.models.quantized import SCHEMES  # noqa: E402
from mos_jax.models.tiny import tiny_weights  # noqa: E402
from mos_jax.models.tokenizer import Tokenizer  # noqa: E402
from tests.models.fixtures_families import family_config, family_decoder  # noqa: E402
from tests.models.fixtures_models import write_gguf  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
# What a configuration of each method needs beyond its defaults to fit a tiny base.
FIELDS: dict[str, dict[str, Any]] = {
    # Pools that two blocks fill, which is what "sites and blocks chosen" chooses.
    "mos": {"equivalent_rank": 2, "rank": 3, "private_rank": 1},
    "uni_lora": {"theta_length": 512},
    "vb_lora": {"vector_length": 16, "num_vectors": 8},
    "vera": {"projections": "shared"},
}
# Settings that a combination needs.
COMBINED: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}
MODELS = ("Hugging Face model folder", "GGUF model")
# What of a family's tiny config a GGUF cannot state: its converter leaves these out.
GGUF_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": None},
    "mistral": {"window": None},
    "qwen2": {"window": None, "windowed_layers": None},
    "gemma3": {"window": None, "windowed_layers": None, "local_rope_base": None,
               "query_scale": None, "embed_scale": 16.0},
}  # fmt: skip


class Reasons:
    """Refusals in the order they came up, for the notes below a table."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def cell(self, attempt: Callable[[], object]) -> str:
        """`yes`, or the note with which `attempt` was refused."""
        try:
            attempt()
        except InputError as error:
            return f"no [{self._numbers.setdefault(str(error), len(self._numbers) + 1)}]"
        return "yes"

    def lines(self) -> list[str]:
        """The notes, numbered."""
        notes = [f"{number}. {text}" for text, number in self._numbers.items()]
        return ["", *notes] if notes else []


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def tiny_base(family: str) -> Base:
    """A random base of a family, with the byte tokenizer."""
    return Base(f"tiny-{family}", family_decoder(family), Tokenizer.byte_level())


def must(good: object, what: str) -> None:
    """Ends the program unless `good`: what a cell calls done has to be right as well."""
    if not good:
        raise SystemExit(f"support table: {what}")


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """Ends the program unless two models have the same weights."""
    must(one.keys() == other.keys(), f"{what}: other weights")
    for name, array in one.items():
        must(np.array_equal(np.asarray(array), np.asarray(other[name])), f"{what}: {name} differs")


def bases(folder: Path) -> list[str]:
    """Families by format and quantisation."""
    reasons = Reasons()

    def row(family: str) -> list[str]:
        base, path = tiny_base(family), folder / family

        def read() -> None:
            same_weights(load_base(path).model.weights, base.model.weights, family)

        return [
            family,
            f"`{ARCHITECTURES[family]}`",
            reasons.cell(lambda: write_model(path, base)),
            reasons.cell(read),
            reasons.cell(lambda: read_gguf(folder, family, "F32")),
            *(reasons.cell(functools.partial(quantised, path, scheme)) for scheme in SCHEMES),
            reasons.cell(lambda: adapter_file(folder, base)),
        ]

    head = ["family", "architecture", "folder out", "folder in", "GGUF in"]
    return [*table([*head, *SCHEMES, "adapter GGUF"], map(row, FAMILIES)), *reasons.lines()]


def gguf_config(family: str) -> DecoderConfig:
    """A config of a family whose rows hold whole blocks of every type."""
    wide = {"d_model": 256, "d_ff": 256, "head_dim": 64, "num_layers": 1}
    return family_config(family, **wide | GGUF_CHANGES.get(family, {}))


def read_gguf(folder: Path, family: str, kind: str) -> None:
    """Writes a GGUF of a family with matrices of type `kind` and reads it."""
    config = gguf_config(family)
    weights = tiny_weights(config)
    path = write_gguf(folder / f"{family}-{kind}.gguf", config, weights, kind)
    read = gguf.read_weights(path, gguf.read_config(path))
    if kind == "F32":
        same_weights(read, weights, f"GGUF of {family}")
    path.unlink()


def quantised(path: Path, scheme: str) -> None:
    """Loads a folder quantised and runs it."""
    base = load_base(path, quantize=scheme)
    must(base.quantization == scheme, f"{path.name} is not held in {scheme}")
    logits = base.model(jnp.zeros((1, 4), jnp.int32))
    must(np.isfinite(np.asarray(logits)).all(), f"{path.name} in {scheme} gives no numbers")


def adapter_file(folder: Path, base: Base) -> None:
    """Writes a LoRA for llama.cpp and reads it."""
    adapter = make("lora", base)
    path = folder / f"{base.name}-adapter.gguf"
    write_adapter_gguf(path, adapter.factors(), base.config)
    must(read_adapter_gguf(path, base.config).keys() == adapter.factors().keys(), path.name)


def config_of(method: str, **fields: Any) -> AdapterConfig:
    """A configuration that fits the tiny bases."""
    return METHODS[method].from_dict(FIELDS.get(method, {}) | fields)


def make(method: str, base: Base, **fields: Any) -> Adapter:
    """A fresh adapter of a method."""
    return create_adapter(config_of(method, **fields), base.sites, jax.random.key(0))


def methods(folder: Path) -> list[str]:
    """Methods by feature."""
    base, reasons = tiny_base("llama"), Reasons()
    place: dict[str, Any] = {"base_name": base.name, "num_layers": base.config.num_layers}
    some = select_sites(base.sites, include="[qv]_proj", layers=[0, 2])
    other = make("lora", base, rank=2)
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)

    def mixed(adapter: Adapter) -> None:
        bank = AdapterBank.holding(base.sites, {"one": adapter, "two": other})
        logits = np.asarray(base.model(tokens, bank.for_rows(["one", BASE_NAME])))
        must(np.array_equal(logits[1], np.asarray(base.model(tokens))[1]), "a row of the base")
        bank.replace("one", other)

    def combined(adapter: Adapter) -> None:
        for how in HOW:
            combine([adapter, adapter], [0.7, 0.3], how, **COMBINED.get(how, {}))

    def as_peft(path: Path, adapter: Adapter) -> None:
        export_peft(path, adapter.factors(), **place)
        must(read_peft_factors(path, base.sites).keys() == adapter.factors().keys(), path.name)

    def native(path: Path, adapter: Adapter) -> None:
        export_native(path, adapter, **place)
        must(type(import_peft(path, base)) is type(adapter), f"{path.name} read back")

    def row(method: str) -> list[str]:
        adapter = make(method, base)
        factors = adapter.factors()
        attempts: tuple[Callable[[], object], ...] = (
            lambda: make(method, base, rank_pattern={"q_proj": 2}),
            lambda: make(method, base, alpha_pattern={"q_proj": 4.0}),
            lambda: create_adapter(config_of(method), some, jax.random.key(0)),
            lambda: mixed(adapter),
            lambda: combined(adapter),
            lambda: merge(base, factors),
            lambda: lora_from_factors(factors, base.sites),
            lambda: as_peft(folder / f"peft-{method}", adapter),
            lambda: native(folder / f"native-{method}", adapter),
            lambda: write_adapter_gguf(folder / f"{method}.gguf", factors, base.config),
        )
        return [method, *map(reasons.cell, attempts)]

    head = ["method", "`rank_pattern`", "`alpha_pattern`", "sites and blocks chosen",
            "mixed batch, hot-swap", "combined", "merged", "as a LoRA to train on",
            "PEFT LoRA out", "PEFT's own type, out and in", "adapter GGUF out"]  # fmt: skip
    return [*table(head, map(row, METHODS)), *reasons.lines()]


def conversions(folder: Path) -> list[str]:
    """What `convert.py` makes of what."""
    base_path = folder / "base"
    write_model(base_path, tiny_base("llama"))
    base = load_base(base_path)
    place: dict[str, Any] = {"base_name": str(base_path), "num_layers": base.config.num_layers}
    adapter = make("mos", base)
    inputs: dict[str, Path] = {"mos_jax adapter": folder / "ours"}
    save_adapter(inputs["mos_jax adapter"], adapter, metadata={"base": str(base_path)})
    for method, kind in NATIVE.items():
        inputs[f"PEFT {kind}"] = folder / f"in-{method}"
        export_native(inputs[f"PEFT {kind}"], make(method, base), **place)
    inputs["GGUF adapter"] = folder / "in.gguf"
    write_adapter_gguf(inputs["GGUF adapter"], make("lora", base).factors(), base.config)
    inputs["Hugging Face model folder"] = base_path
    inputs["GGUF model"] = write_gguf(
        folder / "model.gguf", gguf_config("llama"), tiny_weights(gguf_config("llama")),
        vocabulary=True,
    )  # fmt: skip
    reasons = Reasons()

    def row(name: str, path: Path) -> list[str]:
        own = None if name in MODELS else str(base_path)
        source = load_source(str(path), own, "none", False)

        def attempt(kind: str) -> None:
            out = folder / f"out-{path.name}-{kind}"
            check_request(source, out, kind, Options())
            convert(source, out, kind, Options())

        return [name, *(reasons.cell(functools.partial(attempt, kind)) for kind in FORMATS)]

    head = ["from", *(f"`{kind}`" for kind in FORMATS)]
    return [*table(head, itertools.starmap(row, inputs.items())), *reasons.lines()]


def page() -> str:
    """The whole page. Reasons have the temporary folder's name taken out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        types = []
        for kind in gguf.GGUF_TYPES:
            read_gguf(folder, "llama", kind)
            types.append(f"`{kind}`")
        lines = [
            "# What works with what",
            "",
            "Made by `make support`, which tries every cell on a tiny random model; a"
            " test does so again and compares. A number in brackets is that of the reason below the"
            " table.",
            "",
            "## Bases",
            "",
            '"Folder" is a Hugging Face folder (config.json, safetensors, tokenizer.json). Every'
            " base trains and serves with every method below. Mistral's GGUF files call themselves"
            " `llama` and state no window.",
            "",
            *bases(folder),
            "",
            f"Types of GGUF tensors: {', '.join(types)}. Pre-tokenizers of GGUF vocabularies:"
            f" {', '.join(f'`{pre}`' for pre in PRE_TOKENIZERS)}, and SentencePiece (`llama`).",
            "",
            "## Methods",
            "",
            f"Combinations: {', '.join(f'`{how}`' for how in HOW)}. VeRA is tried with"
            ' `projections="shared"`, PEFT\'s form of it.',
            "",
            *methods(folder),
            "",
            "## Conversions",
            "",
            "`experiments/convert.py --in=... --format=...`, read back and compared each time.",
            "",
            *conversions(folder),
            "",
        ]
        return "\n".join(lines).replace(f"{folder}/", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
