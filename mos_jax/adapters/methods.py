"""The list of methods, and the one door through which adapters are made.

A new method is one module with its configuration and its adapter, and one entry in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.lora import LoRAConfig
from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.prolora import PRoLoRAConfig
from mos_jax.adapters.rasa import RaSAConfig
from mos_jax.adapters.share_lora import ShareLoRAConfig
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.tied_lora import TiedLoRAConfig
from mos_jax.adapters.uni_lora import UniLoRAConfig
from mos_jax.adapters.vb_lora import VBLoRAConfig
from mos_jax.adapters.vera import VeRAConfig
from mos_jax.errors import InputError, suggest

METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        MoSConfig,
        LoRAConfig,
        PRoLoRAConfig,
        RaSAConfig,
        ShareLoRAConfig,
        TiedLoRAConfig,
        UniLoRAConfig,
        VBLoRAConfig,
        VeRAConfig,
    )
}


def make_config(method: str, fields: Mapping[str, Any]) -> AdapterConfig:
    """Builds the configuration of the method named `method`.

    Raises:
      InputError: for an unknown method or field (with the nearest name) or a refused value.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    return METHODS[method].from_dict(fields)


def create_adapter(config: AdapterConfig, sites: Sites, key: jax.Array) -> Adapter:
    """Builds a fresh adapter.

    Args:
      config: the method's configuration, for example `MoSConfig`.
      sites: mapping from site type to `SiteShape`, `base.sites` or written by hand.
      key: JAX key; seeds the trained arrays and nothing else.

    Returns:
      The adapter; its trained arrays are its `nnx.Param`s, in fp32.

    Raises:
      InputError: if the configuration does not fit the sites, with the numbers.
    """
    return config.build(sites, key)


def count_parameters(config: AdapterConfig, sites: Sites) -> dict[str, int]:
    """Trained parameters by site type, from shapes alone: nothing is allocated on a device."""
    adapter = jax.eval_shape(lambda key: config.build(sites, key), jax.random.key(0))
    return adapter.count_trained_by_site()
