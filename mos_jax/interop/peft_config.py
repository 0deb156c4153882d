"""What PEFT's `adapter_config.json` says: which modules of a Llama a LoRA changes, and how much.

The rules by which PEFT matches names (targets, patterns, layers) are kept to the letter, since a
file that is read by other rules is a different adapter. A *module* is the dotted name of one
linear layer, `model.layers.3.self_attn.q_proj`; a *site* is (site type, block index).
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.adapters.sites import module_name
from mos_jax.errors import InputError, suggest

CONFIG_FILE = "adapter_config.json"
PICKLE_FILE = "adapter_model.bin"

Site = tuple[str, int]
Number = int | float

# Fields that say something else than what the adapted model computes: provenance, training, and
# settings of variants that are themselves refused below.
_SILENT = frozenset(
    """auto_mapping base_model_name_or_path revision peft_version inference_mode lora_dropout
    megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config
    ensure_weight_tying runtime_config""".split()
)
# Fields that are read.
_READ = frozenset(
    """peft_type task_type bias init_lora_weights r lora_alpha use_rslora rank_pattern alpha_pattern
    target_modules exclude_modules layers_to_transform layers_pattern""".split()
)
# Initialisations that leave the base's weights alone; others (PiSSA, OLoRA, CorDA, LoftQ, ...)
# change them, so that the factors alone are not the change from the base.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _short_name(site: Site) -> str:
    """The module as patterns and targets name it; PEFT looks at the end of a name only."""
    return module_name(*site).removeprefix("model.")


def tensor_name(site: Site, part: str) -> str:
    """Name of a site's tensor in the file of weights; `part` is "A" or "B"."""
    return f"base_model.model.{module_name(*site)}.lora_{part}.weight"


def find_alpha(scale: float | np.floating, rank: int) -> Number:
    """Returns the shortest decimal alpha for which alpha / rank rounds to the fp32 `scale`.

    There always is one, and nothing ever has to be folded into B: the product of an fp32 number
    and a rank below 2^29 is exact in fp64, which is what JSON and PEFT hold alpha in. A whole
    alpha comes as an int.
    """
    wanted = np.float32(scale)
    exact = float(wanted) * rank
    for digits in range(1, 18):
        alpha = float(f"{exact:.{digits}g}")
        with np.errstate(over="ignore"):
            found = np.float32(alpha / rank)
        if found == wanted:
            break
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def make_config(
    ranks: Mapping[Site, int], alphas: Mapping[Site, Number], base_name: str, num_layers: int
) -> dict[str, Any]:
    """Returns the JSON object for a LoRA of these ranks and alphas.

    Only fields that every PEFT since 0.9 knows are in it; newer ones are left at their defaults.

    Args:
      ranks: rank of every adapted site.
      alphas: alpha of the same sites; their scale is alpha / rank.
      base_name: what PEFT shall load as the base.
      num_layers: blocks of the base.
    """
    names = list(dict.fromkeys(name for name, _ in ranks))
    blocks = {name: sorted(layer for n, layer in ranks if n == name) for name in names}
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(alphas)
    targets, layers = sorted(names), blocks[names[0]]
    if any(blocks[name] != layers for name in names):
        # `layers_to_transform` holds for all types alike, so each module is named instead.
        targets = [_short_name(site) for site in ranks]
        layers = list(range(num_layers))
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None if len(layers) == num_layers else layers,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _default_and_pattern(values: Mapping[Site, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by site type or, where a type is mixed, by module."""
    default = collections.Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in values):
        own = {site: value for site, value in values.items() if site[0] == name}
        if len(set(own.values())) == 1:
            pattern[name] = next(iter(own.values()))
        else:
            pattern |= {_short_name(site): value for site, value in own.items()}
    pattern = {key: value for key, value in pattern.items() if value != default}
    return default, pattern


class PeftConfig:
    """A checked `adapter_config.json` of a plain LoRA.

    Attributes:
      file: where it was read, for messages.
      raw: the parsed object.
    """

    def __init__(self, file: Path, raw: Mapping[str, Any]):
        self.file = file
        self.raw = raw
        self._check_kind()
        self._check_types()

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Reads it from `folder`.

        Raises:
          InputError: if it is missing or malformed, or asks for anything but a LoRA.
        """
        file = folder / CONFIG_FILE
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"no PEFT adapter at {folder}: {CONFIG_FILE} is missing") from None
        except (ValueError, OSError) as error:
            raise InputError(f"{file} cannot be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{file} must hold a JSON object, got {type(raw).__name__}")
        return cls(file, raw)

    def targets(self, sites: Iterable[Site]) -> list[Site]:
        """Those of `sites`, the base's, that the LoRA changes.

        Raises:
          InputError: if it targets a module that is none of them, or changes none at all.
        """
        sites = list(sites)
        wanted = self.raw["target_modules"]
        if isinstance(wanted, list):
            modules = [module_name(*site) for site in sites]
            for target in wanted:
                if not any(_ends_with(module, target) for module in modules):
                    known = dict.fromkeys(name for name, _ in sites)
                    raise InputError(
                        f"{self.file}: target_modules has {target!r}, which is none of the sites; "
                        f"{suggest(target, known)}"
                    )
        chosen = [site for site in sites if self._changes(module_name(*site))]
        if not chosen:
            raise InputError(
                f"{self.file}: target_modules = {wanted!r} with layers_to_transform = "
                f"{self.raw.get('layers_to_transform')!r} selects none of the base's sites"
            )
        return chosen

    def rank(self, site: Site) -> int:
        """The rank of a site."""
        return self._look_up("rank_pattern", "r", site)

    def scale(self, site: Site) -> np.float32:
        """The scale of a site, as PEFT computes it: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank(site)
        alpha = self._look_up("alpha_pattern", "lora_alpha", site)
        return np.float32(alpha / (math.sqrt(rank) if self.raw.get("use_rslora") else rank))

    def _look_up(self, pattern: str, default: str, site: Site) -> Any:
        module = module_name(*site)
        for key, value in (self.raw.get(pattern) or {}).items():
            if self._compile(rf"(.*\.)?({key})$", pattern).match(module):
                return value
        return self.raw[default]

    def _changes(self, module: str) -> bool:
        """Whether PEFT would put a LoRA on `module`."""
        excluded, wanted = self.raw.get("exclude_modules"), self.raw["target_modules"]
        if isinstance(excluded, str):
            if self._compile(excluded, "exclude_modules").fullmatch(module):
                return False
        elif any(_ends_with(module, name) for name in excluded or ()):
            return False
        if wanted == "all-linear":
            return True
        if isinstance(wanted, str):
            return bool(self._compile(wanted, "target_modules").fullmatch(module))
        if not any(_ends_with(module, target) for target in wanted):
            return False
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.raw.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._compile(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", "layers_pattern")
            if match := found.match(module):
                index = int(match["index"])
                return index in layers if isinstance(layers, list) else index == layers
        return False

    def _compile(self, expression: str, field: str) -> re.Pattern[str]:
        try:
            return re.compile(expression)
        except re.error as error:
            raise InputError(
                f"{self.file}: {field} holds {expression!r}, which is not a regular expression "
                f"({error})"
            ) from None

    def _check_kind(self) -> None:
        """Refuses, by name, everything but a plain LoRA on the linear layers."""
        raw = self.raw
        if raw.get("peft_type") != "LORA":
            raise InputError(
                f"{self.file}: peft_type = {raw.get('peft_type')!r} is not supported; only 'LORA' "
                "is"
            )
        if raw.get("task_type") not in (None, "CAUSAL_LM"):
            raise InputError(
                f"{self.file}: task_type = {raw['task_type']!r} is not supported; only 'CAUSAL_LM' "
                "is"
            )
        if raw.get("bias", "none") != "none":
            raise InputError(
                f"{self.file}: bias = {raw['bias']!r} is not supported; only 'none' is"
            )
        initial = raw.get("init_lora_weights", True)
        if initial not in _INITIALISATIONS:
            raise InputError(
                f"{self.file}: init_lora_weights = {initial!r} also changes the base's weights; "
                "save the adapter from PEFT with path_initial_model_for_weight_conversion, which "
                "makes a plain LoRA of it"
            )
        for field, value in raw.items():
            # DoRA, modules_to_save, biases, quantised, replicated and token adapters, and whatever
            # a later PEFT adds: what is not known to be without effect must be switched off.
            if field not in _READ | _SILENT and value not in (None, False, [], {}):
                raise InputError(
                    f"{self.file}: {field} = {value!r} is not supported; only a plain LoRA is"
                )

    def _check_types(self) -> None:
        raw = self.raw
        rank_ok, rank_want = _is_rank, "an integer >= 1"
        alpha_ok, alpha_want = _is_number, "a finite number"
        self._require("r", rank_ok(raw.get("r")), rank_want)
        self._require("lora_alpha", alpha_ok(raw.get("lora_alpha")), alpha_want)
        self._require("use_rslora", raw.get("use_rslora") in (None, True, False), "true or false")
        for field, check, want in (
            ("rank_pattern", rank_ok, rank_want),
            ("alpha_pattern", alpha_ok, alpha_want),
        ):
            pattern = raw.get(field)
            good = pattern is None or (
                isinstance(pattern, dict) and all(check(value) for value in pattern.values())
            )
            self._require(field, good, f"an object whose values are each {want}")
        names = "a name or a list of names"
        self._require("target_modules", _is_names(raw.get("target_modules")), names)
        for field in ("exclude_modules", "layers_pattern"):
            self._require(field, raw.get(field) is None or _is_names(raw[field]), names)
        layers = raw.get("layers_to_transform")
        good = layers is None or all(
            isinstance(layer, int) for layer in (layers if isinstance(layers, list) else [layers])
        )
        self._require("layers_to_transform", good, "block indices")

    def _require(self, field: str, good: bool, want: str) -> None:
        if not good:
            raise InputError(f"{self.file}: {field} must be {want}, got {self.raw.get(field)!r}")


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )
