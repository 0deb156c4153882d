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
from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.belonging import check_base
from mos_jax.adapters.methods import METHODS, create_adapter, make_config
from mos_jax.adapters.sites import SiteShape, check_sites
from mos_jax.errors import InputError, naming
from mos_jax.files import fresh_folder, write_file
from mos_jax.reading import MAX_TEXT_BYTES, read_bytes, read_json, refuse_pickle

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
      routing_checksum: of all index tables, or None for methods without.
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


_CARD_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "config": (dict,),
    "sites": (dict,),
    "scale": (dict,),
    "routing_checksum": (str, type(None)),
    "base_fingerprint": (str, type(None)),
    "arrays_sha256": (str,),
    "metadata": (dict,),
}


def adapter_arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    """Every array of the adapter on the host, by its path (`"pool_a/q_proj"`)."""
    return {path: np.asarray(array) for path, array in arrays_by_path(adapter).items()}


def arrays_by_path(adapter: Adapter) -> dict[str, jax.Array]:
    """Every array of the adapter where it lies, by its path."""
    return {
        "/".join(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(adapter))
    }


def with_arrays(adapter: Adapter, arrays: Mapping[str, np.ndarray]) -> Adapter:
    """Returns the adapter, which may be an abstract one, with all its arrays those of `arrays`.

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
        have, want = arrays[name], flat[path].get_value()
        if have.shape != want.shape or have.dtype != want.dtype:
            raise InputError(
                f"array {name!r} must be {want.dtype} {want.shape}, got {have.dtype} {have.shape}"
            )
        flat[path] = flat[path].replace(jnp.asarray(have))
    filled = nnx.merge(graphdef, nnx.from_flat_state(flat))
    _check_values(filled, arrays)
    return filled


def _check_values(adapter: Adapter, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises InputError if `arrays`, those of the adapter, hold values that no adapter may have."""
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.all(np.isfinite(array)):
            raise InputError(f"array {name!r} holds values that are not finite")
    adapter.check()


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
      path: the folder, or a link to it.
      adapter: what to write.
      base_fingerprint: of the base it belongs to; checked when it is loaded onto a base.
      metadata: JSON values to keep with it.

    Returns:
      The folder, as an absolute path without links.

    Raises:
      InputError: if `path` is something other than an adapter's folder or holds other files too,
        if values are not finite or routing tables do not fit the configuration, or if
        `base_fingerprint` is not a string or `metadata` not JSON.
    """
    path = Path(path).resolve()
    _check_destination(path)
    arrays = adapter_arrays(adapter)
    _check_values(adapter, arrays)
    payload = format_safetensors(arrays, metadata={"format": FORMAT})
    digest = hashlib.sha256(payload).hexdigest()
    made = make_card(adapter, digest, base_fingerprint=base_fingerprint, metadata=metadata)
    card = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(made)}
    _check_types(card, "the card to write")
    try:
        text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata must be JSON values ({error}), got {metadata!r}") from None
    with fresh_folder(path) as fresh:
        write_file(fresh / ARRAYS_FILE, payload)
        write_file(fresh / CARD_FILE, text.encode())
    return path


def make_card(
    adapter: Adapter,
    arrays_sha256: str,
    *,
    base_fingerprint: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> AdapterCard:
    """The card of an adapter whose arrays lie in a file of this SHA-256, "" for none."""
    return AdapterCard(
        method=adapter.config.method,
        config=adapter.config.to_dict(),
        sites=adapter.sites,
        scale={name: np.asarray(f.scale).tolist() for name, f in adapter.factors().items()},
        routing_checksum=_routing_checksum(adapter),
        base_fingerprint=base_fingerprint,
        arrays_sha256=arrays_sha256,
        metadata=dict(metadata) if isinstance(metadata, Mapping) else metadata or {},
    )


def read_card(path: str | os.PathLike[str]) -> AdapterCard:
    """Reads and checks `adapter.json` of the folder `path`.

    Raises:
      InputError: if there is no adapter, the file is malformed, or its format is newer.
    """
    file = Path(path) / CARD_FILE
    raw = _read_json(file)
    version = raw.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{file} has format version {version!r}, this mos_jax reads 1 up to {FORMAT_VERSION}; "
            "a newer one needs a newer mos_jax"
        )
    fields = [field.name for field in dataclasses.fields(AdapterCard)]
    missing = [name for name in fields if name not in raw]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}")
    _check_types(raw, str(file))
    for name, scale in raw["scale"].items():
        if not isinstance(scale, list):
            raise InputError(f"{file}: 'scale' of {name!r} must be a list, got {scale!r}")
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
        check_sites(sites)
    except (KeyError, TypeError):
        raise InputError(f"{file}: 'sites' is malformed: {raw['sites']!r}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return AdapterCard(**{**{name: raw[name] for name in fields}, "sites": sites})


def _read_json(file: Path) -> dict[str, Any]:
    refuse_pickle(file.parent)
    if not file.exists():
        raise InputError(f"no adapter at {file.parent}: {CARD_FILE} is missing")
    raw = read_json(file)
    if raw.get("format") != FORMAT:
        raise InputError(f"{file} is not the card of a mos_jax adapter (format {FORMAT!r})")
    return raw


def _check_types(card: Mapping[str, Any], where: str) -> None:
    for name, types in _CARD_TYPES.items():
        if not isinstance(card[name], types):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            raise InputError(f"{where}: {name!r} must be {wanted}, got {card[name]!r}")


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
    with naming(path):
        return _load_adapter(path, read_card(path), sites, base_fingerprint)


def _load_adapter(
    path: Path,
    card: AdapterCard,
    sites: Mapping[str, SiteShape] | None,
    base_fingerprint: str | None,
) -> Adapter:
    if card.method not in METHODS:
        raise InputError(f"{path}: unknown method {card.method!r}; known: {', '.join(METHODS)}")
    check_base(path, card, sites, base_fingerprint)
    config = make_config(card.method, card.config)
    stored = _check_sizes(path, card, config)
    # Shapes only, and any key: every array is the stored one.
    with routing.drawing_at_most(stored):
        shapes = jax.eval_shape(
            lambda key: create_adapter(config, card.sites, key), jax.random.key(0)
        )
    arrays = read_arrays(path, card, _bytes_of(shapes))
    adapter = with_arrays(shapes, arrays)
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


def _check_sizes(path: Path, card: AdapterCard, config: AdapterConfig) -> int:
    """Returns the bytes of the file of arrays, and raises InputError for sizes far above it.

    All that an adapter is built of is stored, so its sizes cannot exceed that. A damaged card may
    state any, and what it asks for must not be made before it is compared with the arrays.
    """
    file = path / ARRAYS_FILE
    if not file.is_file():
        raise InputError(f"no adapter at {path}: {ARRAYS_FILE} is missing, or no regular file")
    stored = max(file.stat().st_size, 1 << 16)  # an empty file is refused for what it is
    sizes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.name.endswith("seed") and type(getattr(config, field.name)) is int
    }
    for name, site in card.sites.items():
        if len(card.scale.get(name) or ()) != site.num_layers:
            raise InputError(
                f"{path / CARD_FILE}: {name!r} has num_layers={site.num_layers}, so 'scale' must "
                f"have as many numbers for it, got {card.scale.get(name)!r}"
            )
        sizes |= {f"{name}: d_in": site.d_in, f"{name}: d_out": site.d_out}
    ranks = getattr(config, "rank_pattern", None) or {}
    sizes |= {f"rank_pattern of {pattern!r}": rank for pattern, rank in ranks.items()}
    for name, size in sizes.items():
        # Not far above: a width may be cut into chunks that repeat.
        if isinstance(size, int) and size > 64 * stored:
            raise InputError(
                f"{path / CARD_FILE}: {name} = {size} does not fit {ARRAYS_FILE}, which has "
                f"{file.stat().st_size} bytes"
            )
    return stored


def _bytes_of(adapter: Adapter) -> int:
    """Bytes of all arrays of an adapter, which may be an abstract one."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(adapter)))


def read_arrays(path: Path, card: AdapterCard, size: int) -> dict[str, np.ndarray]:
    """The arrays of the folder `path`, at most `size` bytes. Raises InputError for other bytes."""
    file = path / ARRAYS_FILE  # compared before it is read: one with holes may have any size
    payload = read_bytes(file, size + MAX_TEXT_BYTES, "an adapter of this configuration")
    if hashlib.sha256(payload).hexdigest() != card.arrays_sha256:
        raise InputError(
            f"{file} is not the file that {CARD_FILE} describes (its SHA-256 differs): it was "
            "truncated, changed, or belongs to another adapter"
        )
    try:
        return parse_safetensors(payload)
    except SafetensorError as error:
        raise InputError(f"{file} is not a safetensors file: {error}") from None
    except KeyError as error:
        raise InputError(f"{file} holds arrays of dtype {error}, which no adapter has") from None


def _routing_checksum(adapter: Adapter) -> str | None:
    tables = adapter.tables()
    return routing.checksum(tables) if tables else None


def _check_destination(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        _read_json(path / CARD_FILE)
    except InputError:
        raise InputError(f"{path} exists and is not an adapter; choose another folder") from None
    others = sorted({entry.name for entry in path.iterdir()} - {ARRAYS_FILE, CARD_FILE})
    if others:
        raise InputError(
            f"{path} holds {', '.join(others)} beside an adapter, which would be deleted with it; "
            "move that away or choose another folder"
        )
