"""The figures of the documentation's pages, each made by a function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from mos_jax.adapters.mos import MoSConfig
from mos_jax.adapters.sites import SiteShape
from mos_jax.models.known import known_config
from mos_jax.reporting import inside_pictures
from mos_jax.reporting.capacity_picture import capacity_picture
from mos_jax.reporting.style import png_bytes
from mos_jax.serving.capacity import Server, capacity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITE = "q_proj"
SITES = {SITE: SiteShape(8, 48, 48)}
MOS: dict[str, Any] = {
    "equivalent_rank": 2,
    "rank": 6,
    "shards_per_vector": 4,
    "private_rank": 1,
}
ARMS: dict[str, dict[str, Any]] = {
    "MoS": {},
    "without subset\nselection": {"subset_selection": False, "rank": None},
    "without pair\ndissociation": {"pair_dissociation": False},
    "without vector\nsharding": {"shards_per_vector": 1},
    "without\nprivatization": {"private_rank": 0},
}


def _mos(**fields: Any) -> Any:
    return MoSConfig(**{**MOS, **fields}).build(SITES, jax.random.key(0))


FIGURES: dict[str, Callable[[], Figure]] = {
    "pool": lambda: inside_pictures.pool_picture(_mos(), SITE),
    "mosaic": lambda: inside_pictures.mosaic(_mos(), SITE, layer=2),
    "routing": lambda: inside_pictures.routing_map(_mos(), SITE),
    "strategies": lambda: inside_pictures.strategy_map(
        {name: _mos(**fields) for name, fields in ARMS.items()}, SITE
    ),
    "capacity": lambda: capacity_picture(
        capacity(known_config("llama2-7b"), Server(memory=80 * 2**30))
    ),
}


def draw(name: str) -> bytes:
    """A figure as a PNG file."""
    return png_bytes(FIGURES[name]())
