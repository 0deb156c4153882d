"""One adapter on disk: a folder with `adapter.safetensors` and `adapter.json`.

The arrays are everything the adapter holds, trained and frozen, each once: a pool is one array and
a routing table is stored, never drawn again. The JSON says what they are and carries checksums, so
that a wrong base, a changed table or a torn pair of files is refused in words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from mos_jax.adapters import routing
from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.methods import METHODS, create_adapter, make_config
from mos_jax.adapters.mos import MoS
from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError

FORMAT = "mos_jax.adapter"
FORMAT_VERSION = 1
ARRAYS_FILE = "adapter.safetensors"
CARD_FILE = "adapter.json"


@dataclasses.dataclass(frozen=True)
class AdapterCard:
    """What `adapter.json` says.

    Attributes:
      method: name in `METHODS`.
      config: the method's configuration.
      sites: the adapted sites.
      scale: by site type, the scale of every adapted block (equal to alpha / rank and the like;
        stored since tools compute it differently).
      routing_checksum: of all routing tables, or None for methods without.
      base_fingerprint: of the base it was trained on, or None when unknown.
      arrays_sha256: of the file of arrays.
      metadata: free: base name, task, steps, versions.
    """

    method: str
    config: dict[str, Any]
    sites: dict[str, SiteShape]
    scale: dict[str, list[float]]
    routing_checksum: str | None
    base_fingerprint: str | None
    arrays_sha256: str
    metadata: dict[str, Any]


def adapter_arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every array of the adapter on the host, by its path (`"pool_a/q_proj"`)."""
    return {
        "/".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(adapter))
    }


def with_arrays(adapter: Adapter, arrays: Mapping[str, np.ndarray]) -> Adapter:
    """Returns the adapter with all its arrays replaced by those of `arrays`.

    Raises:
      InputError: for missing, extra or misshapen arrays, other dtypes, values that are not
        finite, or routing tables that do not fit the configuration.
    """
    graphdef, state = nnx.split(adapter)
    flat = dict(nnx.to_flat_state(state))
    wanted = {"/".join(map(str, path)): path for path in flat}
    missing, extra = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or extra:
        raise InputError(
            "the arrays are not those of this adapter: "
            f"missing {', '.join(missing) or 'none'}; extra {', '.join(extra) or 'none'}"
        )
    for name, path in wanted.items():
        have, want = arrays[name], flat[path][...]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise InputError(
                f"array {name!r} must be {want.dtype} {want.shape}, got {have.dtype} {have.shape}"
            )
        if np.issubdtype(have.dtype, np.floating) and not np.all(np.isfinite(have)):
            raise InputError(f"array {name!r} holds values that are not finite")
        flat[path] = flat[path].replace(jnp.asarray(have))
    filled = nnx.merge(graphdef, nnx.from_flat_state(flat))
    if isinstance(filled, MoS):
        filled.check()
    return filled


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    *,
    base_fingerprint: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the adapter to the folder `path`, replacing an adapter that stands there.

    The folder is written beside its place and then renamed, so that a crash or a full disk leaves
    the old one whole.

    Args:
      path: the folder.
      adapter: what to write.
      base_fingerprint: of the base it belongs to; checked when it is loaded onto a base.
      metadata: JSON values to keep with it.

    Returns:
      The folder.

    Raises:
      InputError: if `path` is something other than an adapter's folder.
    """
    path = Path(path)
    if path.exists() and not (path / CARD_FILE).exists() and not _is_empty_folder(path):
        raise InputError(f"{path} exists and is not an adapter; choose another folder")
    arrays = adapter_arrays(adapter)
    payload = format_safetensors(arrays, metadata={"format": FORMAT})
    card = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": adapter.config.method,
        "config": adapter.config.to_dict(),
        "sites": {name: dataclasses.asdict(site) for name, site in adapter.sites.items()},
        "scale": {n: np.asarray(f.scale).tolist() for n, f in adapter.factors().items()},
        "routing_checksum": _routing_checksum(adapter),
        "base_fingerprint": base_fingerprint,
        "arrays_sha256": hashlib.sha256(payload).hexdigest(),
        "metadata": dict(metadata or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fresh.chmod(0o755)
        _write(fresh / ARRAYS_FILE, payload)
        _write(fresh / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())
        if path.exists():
            old = fresh.with_name(fresh.name + ".old")
            path.rename(old)
            fresh.rename(path)
            shutil.rmtree(old)
        else:
            fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return path


def read_card(path: str | os.PathLike[str]) -> AdapterCard:
    """Reads and checks `adapter.json` of the folder `path`.

    Raises:
      InputError: if there is no adapter, the file is malformed, or its format is newer.
    """
    file = Path(path) / CARD_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no adapter at {path}: {CARD_FILE} is missing") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{file} is not the card of a mos_jax adapter (format {FORMAT!r})")
    version = raw.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version!r}, this mos_jax reads up to {FORMAT_VERSION}; "
            "upgrade mos_jax"
        )
    fields = [field.name for field in dataclasses.fields(AdapterCard)]
    missing = [name for name in fields if name not in raw]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}")
    try:
        sites = {
            name: SiteShape(
                site["num_layers"],
                site["d_in"],
                site["d_out"],
                None if site["layers"] is None else tuple(site["layers"]),
            )
            for name, site in raw["sites"].items()
        }
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{file}: 'sites' is malformed: {raw['sites']!r}") from None
    return AdapterCard(**{**{name: raw[name] for name in fields}, "sites": sites})


def load_adapter(
    path: str | os.PathLike[str],
    *,
    sites: Mapping[str, SiteShape] | None = None,
    base_fingerprint: str | None = None,
) -> Adapter:
    """Loads the adapter from the folder `path`.

    Args:
      path: a folder written by `save_adapter`.
      sites: all sites of the base it will be used on, to check the shapes against.
      base_fingerprint: of that base, to check that it is the one it was trained on.

    Returns:
      The adapter, with its stored arrays and routing tables.

    Raises:
      InputError: for another base, another checksum, missing, extra or misshapen arrays, or a
        newer format.
    """
    path = Path(path)
    card = read_card(path)
    if card.method not in METHODS:
        raise InputError(f"{path}: unknown method {card.method!r}; known: {', '.join(METHODS)}")
    if sites is not None:
        _check_base_shapes(path, card, sites)
    if base_fingerprint and card.base_fingerprint and base_fingerprint != card.base_fingerprint:
        raise InputError(
            f"{path} was trained on another base ({card.metadata.get('base', 'name unknown')}, "
            f"fingerprint {card.base_fingerprint[:12]}) than the one given (fingerprint "
            f"{base_fingerprint[:12]})"
        )
    arrays = _read_arrays(path, card)
    config = make_config(card.method, card.config)
    # The key is irrelevant: every array is replaced by the stored one.
    adapter = with_arrays(create_adapter(config, card.sites, jax.random.key(0)), arrays)
    found = _routing_checksum(adapter)
    if found != card.routing_checksum:
        raise InputError(
            f"{path}: the routing tables have checksum {found}, the card says "
            f"{card.routing_checksum}; the trained shards belong to other tables"
        )
    for name, factor in adapter.factors().items():
        if np.asarray(factor.scale).tolist() != card.scale.get(name):
            raise InputError(
                f"{path}: {name!r} has scale {np.asarray(factor.scale)[0]}, the card says "
                f"{card.scale.get(name)!r}"
            )
    return adapter


def _read_arrays(path: Path, card: AdapterCard) -> dict[str, np.ndarray]:
    file = path / ARRAYS_FILE
    try:
        payload = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no adapter at {path}: {ARRAYS_FILE} is missing") from None
    if hashlib.sha256(payload).hexdigest() != card.arrays_sha256:
        raise InputError(
            f"{file} is not the file that {CARD_FILE} describes (its SHA-256 differs): it was "
            "truncated, changed, or belongs to another adapter"
        )
    try:
        return parse_safetensors(payload)
    except SafetensorError as error:
        raise InputError(f"{file} is not a safetensors file: {error}") from None


def _check_base_shapes(path: Path, card: AdapterCard, sites: Mapping[str, SiteShape]) -> None:
    for name, site in card.sites.items():
        if name not in sites:
            raise InputError(f"{path} adapts {name!r}, which the base does not have")
        base = sites[name]
        last = site.layers[-1] if site.layers is not None else site.num_layers - 1
        fits = last < base.num_layers and (
            site.layers is not None or site.num_layers == base.num_layers
        )
        if (site.d_in, site.d_out) != (base.d_in, base.d_out) or not fits:
            raise InputError(
                f"{path} belongs to another base: {name!r} is {site.num_layers} layers of "
                f"{site.d_in} -> {site.d_out} there, {base.num_layers} of {base.d_in} -> "
                f"{base.d_out} here"
            )


def _routing_checksum(adapter: Adapter) -> str | None:
    return routing.checksum(adapter.tables()) if isinstance(adapter, MoS) else None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write(file: Path, payload: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
