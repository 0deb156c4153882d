"""What a folder's `adapter_config.json` says: which linear layers are adapted, and how.

The rules by which PEFT matches names (targets, patterns, layers) are kept to the letter, since a
file that is read by other rules is a different adapter. Four types are read, in their plain form;
whatever else a file asks for is refused by the name of its field.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mos_jax.adapters.sites import module_name
from mos_jax.errors import InputError, suggest
from mos_jax.interop.peft_config import CONFIG_FILE, Site
from mos_jax.reading import read_json

# Fields that say something else than what the adapted model computes: provenance, training, and
# settings of variants that are themselves refused below.
_SILENT = frozenset(
    """auto_mapping base_model_name_or_path revision peft_version inference_mode
    ensure_weight_tying runtime_config""".split()
)
# Fields that are read, of every type.
_READ = frozenset(
    """peft_type task_type bias r target_modules exclude_modules layers_to_transform
    layers_pattern""".split()
)
# Initialisations that leave the base's weights alone; others (PiSSA, OLoRA, CorDA, LoftQ, ...)
# change them, so that the factors alone are not the change from the base.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# What fields of PEFT's stand for, where their names do not say it.
_VARIANTS = {
    "use_dora": "DoRA, whose magnitudes are no low-rank change",
    "modules_to_save": "whole modules that were trained with it",
    "trainable_token_indices": "trained rows of the embeddings",
    "target_parameters": "LoRA on parameters that are no linear layer",
    "alora_invocation_tokens": "activated LoRA (aLoRA), which acts on a part of the tokens",
    "megatron_config": "layers of Megatron",
    "lora_bias": "a bias beside B",
    "layer_replication": "a base whose blocks are used several times",
    "use_qalora": "QA-LoRA, with pooled inputs",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, a router over several adapters",
    "fan_in_fan_out": "weights of Conv1D",
}
# The largest fp32 number.
LARGEST = float(np.finfo(np.float32).max)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # An int of JSON may have any number of digits.
    return -LARGEST <= value <= LARGEST


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


_RANK = (_is_rank, "an integer >= 1")
_NUMBER = (_is_number, "a finite number")
_SEED = (_is_seed, "an integer >= 0")
_SWITCH = (_is_switch, "true or false")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A type of adapter that PEFT has and this reads.

    Attributes:
      name: what is read, for messages.
      fields: those of its own that are read, each with a check and what it wants.
      more: fields that are read and checked elsewhere.
      silent: fields without effect on what is computed.
    """

    name: str
    fields: Mapping[str, tuple[Callable[[Any], bool], str]]
    more: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()


KINDS = {
    "LORA": _Kind(
        "a plain LoRA",
        {"lora_alpha": _NUMBER, "use_rslora": _SWITCH},
        frozenset(["init_lora_weights", "rank_pattern", "alpha_pattern"]),
        frozenset(
            """lora_dropout megatron_core qalora_group_size loftq_config eva_config corda_config
            lora_ga_config""".split()
        ),
    ),
    "VERA": _Kind(
        "a plain VeRA",
        {"projection_prng_key": _SEED, "save_projection": _SWITCH, "d_initial": _NUMBER},
        silent=frozenset(["vera_dropout", "init_weights"]),
    ),
    "VBLORA": _Kind(
        "a plain VB-LoRA",
        {
            "num_vectors": _RANK,
            "vector_length": _RANK,
            "topk": _RANK,
            "save_only_topk_weights": _SWITCH,
        },
        silent=frozenset(["vblora_dropout", "init_vector_bank_bound", "init_logits_std"]),
    ),
    "UNILORA": _Kind(
        "a plain Uni-LoRA",
        {"theta_d_length": _RANK, "proj_seed": _SEED, "save_indices": _SWITCH},
        silent=frozenset(["unilora_dropout", "init_weights", "init_theta_d_bound"]),
    ),
}


class PeftConfig:
    """A checked `adapter_config.json`.

    Attributes:
      file: where it was read, for messages.
      raw: the parsed object.
      kind: its peft_type, one of `KINDS`.
    """

    def __init__(self, file: Path, raw: Mapping[str, Any]):
        self.file = file
        self.raw = raw
        self.kind: str = str(raw.get("peft_type"))
        self._check_kind()
        self._check_types()

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Reads it from `folder`.

        Raises:
          InputError: if it is missing or malformed, or asks for what is not read here.
        """
        return cls(folder / CONFIG_FILE, read_raw(folder))

    def targets(self, sites: Iterable[Site]) -> list[Site]:
        """Those of `sites`, the base's, that the adapter changes.

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
        rank: int = self._look_up("rank_pattern", "r", site)
        return rank

    def alpha(self, site: Site) -> int | float:
        """The alpha of a site of a LoRA."""
        alpha: int | float = self._look_up("alpha_pattern", "lora_alpha", site)
        return alpha

    def scale(self, site: Site) -> np.float32:
        """The scale of a site of a LoRA, as PEFT has it: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank(site)
        return np.float32(
            self.alpha(site) / (math.sqrt(rank) if self.raw.get("use_rslora") else rank)
        )

    def pattern(self, field: str, sites: Iterable[Site]) -> dict[str, Any]:
        """The entries of `rank_pattern` or `alpha_pattern` that match one of `sites`, in order."""
        modules = [module_name(*site) for site in sites]
        return {
            key: value
            for key, value in (self.raw.get(field) or {}).items()
            if any(map(self._key(key, field).match, modules))
        }

    def _look_up(self, field: str, default: str, site: Site) -> Any:
        module = module_name(*site)
        for key, value in (self.raw.get(field) or {}).items():
            if self._key(key, field).match(module):
                return value
        return self.raw[default]

    def _key(self, key: str, field: str) -> re.Pattern[str]:
        return self._compile(rf"(.*\.)?({key})$", field)

    def _changes(self, module: str) -> bool:
        """Whether PEFT would adapt `module`."""
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
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"{self.file}: {field} holds {expression!r}, which is not a regular expression "
                f"({error})"
            ) from None

    def _check_kind(self) -> None:
        """Refuses, by name, everything but the plain form of a known type on linear layers."""
        raw = self.raw
        if self.kind not in KINDS:
            raise InputError(
                f"{self.file}: peft_type = {raw.get('peft_type')!r} is not supported; "
                f"{', '.join(KINDS)} are"
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
        if self.kind == "LORA" and initial not in _INITIALISATIONS:
            raise InputError(
                f"{self.file}: init_lora_weights = {initial!r} also changes the base's weights; "
                "save the adapter from PEFT with path_initial_model_for_weight_conversion, which "
                "makes a plain LoRA of it"
            )
        kind = KINDS[self.kind]
        known = _READ | _SILENT | kind.fields.keys() | kind.more | kind.silent
        for field, value in raw.items():
            # Variants, and whatever a later PEFT adds: what is not known to be without effect must
            # be switched off.
            if field not in known and value not in (None, False, [], {}):
                meaning = f" ({_VARIANTS[field]})" if field in _VARIANTS else ""
                raise InputError(
                    f"{self.file}: {field} = {value!r}{meaning} is not supported; only {kind.name} "
                    "is"
                )

    def _check_types(self) -> None:
        raw = self.raw
        self._require("r", _is_rank(raw.get("r")), _RANK[1])
        for field, (check, want) in KINDS[self.kind].fields.items():
            self._require(field, check(raw.get(field)), want)
        if self.kind == "LORA":
            for field, (check, want) in (("rank_pattern", _RANK), ("alpha_pattern", _NUMBER)):
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


def read_raw(folder: Path) -> dict[str, Any]:
    """The JSON object in the folder's `adapter_config.json`, unchecked.

    Raises:
      InputError: if it is missing or is no JSON object.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        raise InputError(f"no PEFT adapter at {folder}: {CONFIG_FILE} is missing")
    return read_json(file)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )
