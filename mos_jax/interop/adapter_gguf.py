"""Adapters as GGUF files for llama.cpp (`--lora`), written and read back.

Any method's factors are a LoRA there: for each site a `lora_a` [r, h] and a `lora_b` [o, r]. The
format has one alpha for the whole file, and llama.cpp multiplies the change of a site by alpha /
rank, both in fp32. Where that is not the scale of a site, what is missing is multiplied into its B.

In files of the Llama architecture llama.cpp rotates neighbouring pairs (2i, 2i+1) of a head, so the
rows of `lora_b` of queries and keys have that order, as the rows of the base have there.

Axis legend: L adapted blocks, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.patterns import differ
from mos_jax.errors import InputError, suggest
from mos_jax.files import check_space, fresh_file
from mos_jax.interop.peft import check_factors
from mos_jax.models.config import DecoderConfig
from mos_jax.models.gguf import GGUFFile, open_gguf, tensor_names

# llama.cpp's name of the architecture. Mistral's files are those of a Llama.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
ALPHA_KEY = "adapter.lora.alpha"
_PARTS = ("lora_a", "lora_b")
Site = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds.

    Attributes:
      alpha: of all sites; 0 means that their scale is 1, as llama.cpp reads it.
      sites: number of sites.
      rank: largest rank of a site.
      folded: number of sites whose scale is not alpha / rank, so that a factor went into B.
      rounding: largest error that this caused, relative to the largest entry of the site's scaled
        B; 0 where all such factors are powers of two.
      bytes: size of all tensors.
    """

    alpha: float
    sites: int
    rank: int
    folded: int
    rounding: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """One site: a [r, h], b [r, o], both fp32 on the host, and its scale."""

    a: np.ndarray
    b: np.ndarray
    scale: np.float32

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def plan_adapter_gguf(factors: Mapping[str, LowRank], config: DecoderConfig) -> AdapterFile:
    """Works out what `write_adapter_gguf` would write, without writing anything; see there."""
    return _prepare(factors, config)[0]


def write_adapter_gguf(
    path: str | os.PathLike[str],
    factors: Mapping[str, LowRank],
    config: DecoderConfig,
    *,
    name: str = "adapter",
    overwrite: bool = False,
) -> AdapterFile:
    """Writes factors as an adapter that llama.cpp loads beside a base of this architecture.

    A and B are written in fp32 as they are, each site's with its own rank. The alpha is the one
    that fits most sites. At the others B is multiplied by what is missing: exactly where that is a
    power of two, else rounded once to fp32, which is reported.

    Args:
      path: the file.
      factors: `adapter.factors()`.
      config: of the base.
      name: `general.name` of the file.
      overwrite: replace an adapter that stands there.

    Raises:
      InputError: if the file exists and `overwrite` is not set or it is no GGUF adapter; for no
        factors, factors that do not fit the base, or that are not finite.
    """
    path = Path(path)
    check_adapter_destination(path, overwrite)
    plan, tensors = _prepare(factors, config)
    check_space(path, plan.bytes)
    with fresh_file(path) as fresh:
        writer = gguf.GGUFWriter(fresh, ARCHITECTURES[config.family])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(ALPHA_KEY, plan.alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for tensor, array in tensors.items():
            writer.add_tensor(tensor, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return plan


def read_adapter_gguf(path: str | os.PathLike[str], config: DecoderConfig) -> dict[str, LowRank]:
    """Reads an adapter GGUF as llama.cpp would.

    Args:
      path: the file.
      config: of the base.

    Returns:
      By site type that the adapter changes: a fp32 [L, r, h], b fp32 [L, r, o], scale fp32 [L] and
      `layers`, None for all blocks. Where blocks differ in rank, r is the largest, the others end
      in rows of zeros, which change nothing, and `ranks` says how many are real.

    Raises:
      InputError: as `open_gguf`; if it is no LoRA adapter, is for another architecture, or has a
        tensor that is no site of the base, lacks its other half, is misshapen or is not finite.
    """
    header = open_gguf(path)
    _check_header(header, config)
    alpha = np.float32(header.fields.get(ALPHA_KEY, 0.0))
    shapes, names = config.site_shapes(), tensor_names(config)
    known = {
        f"{names[f'blocks/{site}'].format(layer)}.{part}": (site, layer, part)
        for site in shapes
        for layer in range(config.num_layers)
        for part in _PARTS
    }
    found: dict[Site, dict[str, np.ndarray]] = {}
    for tensor in header.tensors:
        if tensor not in known:
            raise InputError(
                f"{header.path}: tensor {tensor} is none of the base's sites; "
                f"{suggest(tensor, known)}"
            )
        site, layer, part = known[tensor]
        found.setdefault((site, layer), {})[part] = _read_tensor(header, tensor)
    sites: dict[Site, _Matrices] = {}
    for (site, layer), parts in found.items():
        tensor = names[f"blocks/{site}"].format(layer)
        for part in _PARTS:
            if part not in parts:
                raise InputError(f"{header.path}: tensor {tensor}.{part} is missing")
        a, b = (parts[part] for part in _PARTS)
        _, d_in, d_out = shapes[site]
        if a.shape != (len(a), d_in) or b.shape != (d_out, len(a)):
            raise InputError(
                f"{header.path}: {tensor} has lora_a {list(a.shape)} and lora_b {list(b.shape)}; "
                f"they must be [r, {d_in}] and [{d_out}, r]"
            )
        b = b[_pairs_to_halves(config, site, d_out)]
        sites[site, layer] = _Matrices(a, b.T, _llama_scale(alpha, len(a)))
    return _stack(sites, config)


def check_adapter_destination(path: Path, overwrite: bool) -> None:
    """Raises InputError if `path` holds what must not be replaced by an adapter."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file, for example {path / 'adapter.gguf'}")
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{path} exists; set overwrite=True (--overwrite) or choose another file")
    try:
        kind = open_gguf(path).fields.get("general.type")
    except InputError:
        kind = None
    if kind != "adapter":
        raise InputError(f"{path} is no GGUF adapter, so it is not overwritten; choose another")


def _prepare(
    factors: Mapping[str, LowRank], config: DecoderConfig
) -> tuple[AdapterFile, dict[str, np.ndarray]]:
    """What is to be written, and the tensors."""
    sites = _split(factors, config)
    alpha = _choose_alpha(list(sites.values()))
    names, tensors = tensor_names(config), {}
    folded, rounding = 0, 0.0
    for (site, layer), matrices in sites.items():
        b, error = _fold(matrices, alpha)
        if b is not matrices.b:
            folded, rounding = folded + 1, max(rounding, error)
        if not np.isfinite(b).all():
            raise InputError(
                f"{site} of layer {layer}: its B overflows float32 when it takes up the scale "
                f"{matrices.scale}"
            )
        order = np.argsort(_pairs_to_halves(config, site, b.shape[1]))
        tensor = names[f"blocks/{site}"].format(layer)
        tensors[f"{tensor}.lora_a"] = np.ascontiguousarray(matrices.a)
        tensors[f"{tensor}.lora_b"] = np.ascontiguousarray(b.T[order])
    plan = AdapterFile(
        float(alpha),
        len(sites),
        max(m.rank for m in sites.values()),
        folded,
        rounding,
        sum(array.nbytes for array in tensors.values()),
    )
    return plan, tensors


def _split(factors: Mapping[str, LowRank], config: DecoderConfig) -> dict[Site, _Matrices]:
    """The factors of each site on the host, checked: the rows that its rank says are real."""
    if not factors:
        raise InputError("there are no factors to write; give adapter.factors()")
    shapes = config.site_shapes()
    sites = {}
    for name, low_rank in factors.items():
        if name not in shapes:
            raise InputError(f"unknown site type {name!r}; {suggest(name, shapes)}")
        depth, d_in, d_out = shapes[name]
        a, b, scale, layers = check_factors(name, low_rank, depth)
        if (a.shape[2], b.shape[2]) != (d_in, d_out):
            raise InputError(
                f"factors of {name!r} are for {a.shape[2]} -> {b.shape[2]}, the base has {d_in} -> "
                f"{d_out}"
            )
        for position, layer in enumerate(layers):
            rank = low_rank.rank if low_rank.ranks is None else low_rank.ranks[position]
            sites[name, layer] = _Matrices(a[position, :rank], b[position, :rank], scale[position])
    return sites


def _llama_scale(alpha: np.float32, rank: int) -> np.float32:
    """The scale that llama.cpp gives a site, in its arithmetic."""
    return np.float32(alpha) / np.float32(rank) if alpha else np.float32(1.0)


def _choose_alpha(sites: Iterable[_Matrices]) -> np.float32:
    """The alpha that leaves most sites as they are, then most with a power of two to fold."""
    counts = collections.Counter((site.rank, float(site.scale)) for site in sites)
    infinity = np.float32(np.inf)
    candidates = [np.float32(0.0)]  # with which llama.cpp's scale is 1
    for rank, scale in counts:
        with np.errstate(over="ignore"):
            near = np.float32(scale * rank)
        # Rounding the product may miss the quotient by one step either way.
        candidates += [near, np.nextafter(near, infinity), np.nextafter(near, -infinity)]

    def fit(alpha: np.float32) -> tuple[int, int]:
        exact = doubled = 0
        for (rank, scale), count in counts.items():
            given = float(_llama_scale(alpha, rank))
            exact += count * (given == scale)
            doubled += count * _is_power_of_two(scale / given)
        return exact, doubled

    # Neither overflown nor so small that it vanishes when divided by a rank.
    ranks = {rank for rank, _ in counts}
    usable = [
        alpha
        for alpha in candidates
        if np.isfinite(alpha) and all(_llama_scale(alpha, rank) for rank in ranks)
    ]
    return max(usable, key=fit)


def _fold(site: _Matrices, alpha: np.float32) -> tuple[np.ndarray, float]:
    """B for this alpha, the site's own array if the scale fits, and the relative rounding."""
    given = float(_llama_scale(alpha, site.rank))
    if given == float(site.scale):
        return site.b, 0.0
    exact = site.b.astype(np.float64) * (float(site.scale) / given)
    with np.errstate(over="ignore"):
        folded = exact.astype(np.float32)
    largest = float(np.abs(exact).max(initial=0.0))
    if not largest:
        return folded, 0.0
    # The quotient itself is rounded in fp64, far below what is reported here.
    with np.errstate(invalid="ignore"):
        return folded, float(np.abs(folded - exact).max()) / largest


def _is_power_of_two(value: float) -> bool:
    return value == 0 or abs(math.frexp(value)[0]) == 0.5


def _pairs_to_halves(config: DecoderConfig, site: str, rows: int) -> np.ndarray:
    """Where each row of our order stands in the file's: rows[i] of the file is our row i."""
    order = np.arange(rows)
    if site not in ("q_proj", "k_proj") or ARCHITECTURES[config.family] != "llama":
        return order
    return order.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _check_header(header: GGUFFile, config: DecoderConfig) -> None:
    fields, want = header.fields, ARCHITECTURES[config.family]
    for key, value in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fields.get(key) != value:
            raise InputError(
                f"{header.path}: {key} = {fields.get(key)!r} is not supported; only {value!r} is"
            )
    if fields.get("general.architecture") != want:
        raise InputError(
            f"{header.path} is for the architecture {fields.get('general.architecture')!r}; the "
            f"base has {want!r}"
        )
    alpha = fields.get(ALPHA_KEY, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise InputError(f"{header.path}: {ALPHA_KEY} = {alpha!r} must be a finite number")
    for key in sorted(key for key in fields if key.startswith("adapter.")):
        if key not in ("adapter.type", ALPHA_KEY):
            raise InputError(f"{header.path}: {key} is not supported; only a plain LoRA is")
    if not header.tensors:
        raise InputError(f"{header.path} has no tensors")


def _read_tensor(header: GGUFFile, name: str) -> np.ndarray:
    """A tensor of a file in fp32, [rows, columns]."""
    tensor = header.tensors[name]
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise InputError(f"{header.path}: tensor {name} has shape {list(tensor.shape)}, not [r, d]")
    rows = tensor.shape[0]
    data = np.fromfile(
        header.path, np.uint8, rows * tensor.row_bytes, offset=tensor.offset
    ).reshape(rows, tensor.row_bytes)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values = gguf.dequantize(data, tensor.type).astype(np.float32)
    except NotImplementedError as error:
        raise InputError(
            f"{header.path}: tensor {name} has type {tensor.type.name}, which is not read"
        ) from error
    if not np.isfinite(values).all():
        raise InputError(f"{header.path}: tensor {name} holds values that are not finite")
    return values


def _stack(sites: Mapping[Site, _Matrices], config: DecoderConfig) -> dict[str, LowRank]:
    factors = {}
    for name, (depth, d_in, d_out) in config.site_shapes().items():
        layers = tuple(sorted(layer for site, layer in sites if site == name))
        if not layers:
            continue
        own = [sites[name, layer] for layer in layers]
        rank = max(matrices.rank for matrices in own)
        a = np.zeros((len(own), rank, d_in), np.float32)
        b = np.zeros((len(own), rank, d_out), np.float32)
        for position, matrices in enumerate(own):
            a[position, : matrices.rank] = matrices.a
            b[position, : matrices.rank] = matrices.b
        scale = np.array([matrices.scale for matrices in own], np.float32)
        ranks = tuple(matrices.rank for matrices in own)
        factors[name] = LowRank(
            jnp.asarray(a),
            jnp.asarray(b),
            jnp.asarray(scale),
            None if len(layers) == depth else layers,
            ranks if differ(ranks) else None,
        )
    return factors
