"""Between the tensors of a PEFT folder, one for each module, and the arrays of an adapter.

Axis legend: L adapted blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from mos_jax.adapters.adapter import Adapter, AdapterConfig
from mos_jax.adapters.methods import create_adapter
from mos_jax.adapters.sites import SITE_TYPES, Sites, SiteShape
from mos_jax.adapters.storage import with_arrays
from mos_jax.interop.peft_config import Site, site_tensor
from mos_jax.interop.peft_folder import take

Arrays = dict[str, np.ndarray]


def filled_adapter(
    config: AdapterConfig, sites: Sites, arrays: Mapping[str, np.ndarray]
) -> Adapter:
    """The adapter of this configuration whose arrays are `arrays`, by their paths."""
    shapes = jax.eval_shape(lambda key: create_adapter(config, sites, key), jax.random.key(0))
    return with_arrays(shapes, arrays)


def module_order(sites: Sites) -> list[Site]:
    """All adapted sites in the order of PEFT's modules: block after block."""
    chosen = [(name, layer) for name, site in sites.items() for layer in site.blocks]
    return sorted(chosen, key=lambda site: (site[1], SITE_TYPES.index(site[0])))


def stack_tensors(
    arrays: Arrays, name: str, site: SiteShape, part: str, shape: tuple[int, ...]
) -> np.ndarray:
    """A tensor of all blocks of a site type, fp32 [L, ...]."""
    return np.stack([take(arrays, site_tensor((name, k), part), shape) for k in site.blocks])
