"""Whether an adapter on disk belongs to a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mos_jax.adapters.sites import SiteShape
from mos_jax.errors import InputError

if TYPE_CHECKING:
    from mos_jax.adapters.storage import AdapterCard


def check_base(
    path: Path,
    card: AdapterCard,
    sites: Mapping[str, SiteShape] | None,
    base_fingerprint: str | None,
) -> None:
    """Raises InputError if the adapter is for another base; None is not compared."""
    if base_fingerprint and card.base_fingerprint and base_fingerprint != card.base_fingerprint:
        raise InputError(
            f"{path} was trained on another base ({card.metadata.get('base', 'name unknown')}, "
            f"fingerprint {card.base_fingerprint[:12]}) than the one given (fingerprint "
            f"{base_fingerprint[:12]})"
        )
    if sites is None:
        return
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
