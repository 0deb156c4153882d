"""API keys: who may use which models. Only their SHA-256 is kept, and none is ever logged."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mos_jax.errors import InputError, naming
from mos_jax.reading import read_json

KEYS_VARIABLE = "MOS_JAX_API_KEYS"
ADMIN_VARIABLE = "MOS_JAX_ADMIN_KEYS"
MIN_KEY, MAX_KEY = 16, 256
# What may stand behind "Bearer" (RFC 6750).
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._*-]{1,64}")
_FIELDS = ("name", "key", "sha256", "models", "admin")


@dataclasses.dataclass(frozen=True)
class Key:
    """Who asks, and what they may.

    Attributes:
      name: for the log, in place of the key.
      digest: SHA-256 of the key.
      models: names of tenants and of the base; a "*" in one stands for any characters.
      admin: whether it may load and unload adapters and read all figures.
    """

    name: str
    digest: bytes
    models: tuple[str, ...]
    admin: bool = False

    def may_use(self, model: str) -> bool:
        """Whether it has a right to a model of this name, be there one or not."""
        return any(_matches(pattern, model) for pattern in self.models)


class Keyring:
    """All keys of a server."""

    def __init__(self, keys: Iterable[Key] = ()):
        """Raises InputError for a key that stands there twice."""
        self.keys = tuple(keys)
        for place, key in enumerate(self.keys):
            if any(key.digest == other.digest for other in self.keys[:place]):
                raise InputError(f"the key called {key.name!r} is given twice")

    def __len__(self) -> int:
        """Number of keys; none at all lets anybody in."""
        return len(self.keys)

    def find(self, token: str) -> Key | None:
        """The key that was shown, None for an unknown one.

        All keys are compared, each in constant time, so that how long it takes says nothing.
        """
        shown, found = _digest(token), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, shown):
                found = key
        return found


def read_keys(file: Path | None, environment: Mapping[str, str]) -> Keyring:
    """The keys of a file, and of the environment besides.

    The file is JSON: `{"keys": [{"name": "shop", "key": "...", "models": ["shop-*"]}]}`. In place
    of "key" there may be "sha256", in hex; `"admin": true` makes a key an administrator's. In the
    environment, MOS_JAX_API_KEYS has keys separated by spaces, each alone or followed by a colon
    and its models: `KEY KEY:anna,team-*`; MOS_JAX_ADMIN_KEYS has those of administrators.

    Raises:
      InputError: for a file that cannot be read, a field that is missing, unknown or malformed, or
        a key that is too short or long, or given twice. No message holds a key.
    """
    keys = _from_file(file) if file is not None else []
    for place, entry in enumerate(environment.get(KEYS_VARIABLE, "").split()):
        key, colon, models = entry.partition(":")
        name = f"env{place}"
        patterns = models.split(",") if colon else ["*"]
        keys.append(Key(name, _digest(_checked(key, name)), _patterns(patterns, name)))
    for place, key in enumerate(environment.get(ADMIN_VARIABLE, "").split()):
        name = f"admin{place}"
        keys.append(Key(name, _digest(_checked(key, name)), (), admin=True))
    return Keyring(keys)


def _from_file(file: Path) -> list[Key]:
    content = read_json(file)
    with naming(file):
        entries = content.get("keys")
        if set(content) != {"keys"} or not isinstance(entries, list) or not entries:
            raise InputError('must be {"keys": [...]} with at least one key')
        return [_entry(entry, place) for place, entry in enumerate(entries)]


def _entry(entry: Any, place: int) -> Key:
    if not isinstance(entry, dict):
        raise InputError(f"keys[{place}] must be an object")
    if not set(entry) <= set(_FIELDS):
        # Not shown: what stands there may be a key in the wrong place.
        raise InputError(f"keys[{place}] has an unknown field; known: {', '.join(_FIELDS)}")
    name = entry.get("name", f"key{place}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"keys[{place}]: name must be 1 to 64 letters, digits, '.', '_' and '-'")
    if ("key" in entry) == ("sha256" in entry):
        raise InputError(f"{name!r} needs either key or sha256")
    if "key" in entry:
        digest = _digest(_checked(entry["key"], name))
    elif isinstance(entry["sha256"], str) and _HASH.fullmatch(entry["sha256"].lower()):
        digest = bytes.fromhex(entry["sha256"])
    else:
        raise InputError(f"{name!r}: sha256 must be 64 hexadecimal digits")
    admin = entry.get("admin", False)
    if not isinstance(admin, bool):
        raise InputError(f"{name!r}: admin must be true or false")
    if "models" not in entry and not admin:
        raise InputError(f'{name!r} needs models, a list of names; ["*"] is all')
    return Key(name, digest, _patterns(entry.get("models", []), name), admin)


def _patterns(patterns: Sequence[Any], name: str) -> tuple[str, ...]:
    if not isinstance(patterns, list):
        raise InputError(f"{name!r}: models must be a list of names")
    for pattern in patterns:
        if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
            raise InputError(
                f"{name!r}: a model is a name of 1 to 64 letters, digits, '.', '_' and '-', with "
                "'*' for any of them"
            )
    return tuple(patterns)


def _checked(key: Any, name: str) -> str:
    if not isinstance(key, str) or not MIN_KEY <= len(key) <= MAX_KEY or not _KEY.fullmatch(key):
        raise InputError(
            f"{name!r}: a key has {MIN_KEY} to {MAX_KEY} letters, digits and the characters "
            "'.', '_', '~', '+', '/' and '-'; make one with: openssl rand -hex 24"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _matches(pattern: str, model: str) -> bool:
    regex = ".*".join(re.escape(part) for part in pattern.split("*"))
    return re.fullmatch(regex, model, re.DOTALL) is not None
