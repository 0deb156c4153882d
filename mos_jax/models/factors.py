"""Whether factors fit the sites of a base.

Axis legend: L adapted blocks, B rows, r rank, h = d_in, o = d_out.
"""

from __future__ import annotations

from mos_jax.adapters.low_rank import LowRank
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError, suggest


def check_blocks(sites: Sites, name: str, low_rank: LowRank) -> None:
    """Raises InputError unless these are factors of one rank for blocks of the site `name`."""
    site, layers = _site(sites, name), low_rank.layers
    blocks = list(range(site.num_layers) if layers is None else layers)
    a, b, scale = low_rank.a.shape, low_rank.b.shape, low_rank.scale.shape
    if (
        a != (len(blocks), low_rank.rank, site.d_in)
        or b != (len(blocks), low_rank.rank, site.d_out)
        or scale != (len(blocks),)
        or blocks != sorted(set(blocks) & set(range(site.num_layers)))
        or not blocks
    ):
        raise InputError(
            f"factors of {name!r} are a {list(a)}, b {list(b)} and scale {list(scale)} for "
            f"{'all blocks' if layers is None else f'the blocks {blocks}'}; the base has "
            f"{site.num_layers} of {site.d_in} -> {site.d_out}"
        )


def check_block(sites: Sites, name: str, low_rank: LowRank, rows: int) -> None:
    """Raises InputError unless these are one block's factors, for all `rows` or for each."""
    site, a, b = _site(sites, name), low_rank.a.shape, low_rank.b.shape
    if a[:-2] not in ((), (rows,)) or (a[-1], b[-1]) != (site.d_in, site.d_out):
        raise InputError(
            f"factors of {name!r} in one block must be a [r, {site.d_in}] and "
            f"b [r, {site.d_out}], or have an axis of the batch's {rows} rows before these; "
            f"got {list(a)} and {list(b)}"
        )


def _site(sites: Sites, name: str) -> SiteShape:
    if name not in sites:
        raise InputError(f"factors for unknown site {name!r}; {suggest(name, sites)}")
    return sites[name]
