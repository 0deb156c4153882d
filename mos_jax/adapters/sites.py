"""Sites: the linear layers of a model that an adapter may change.

A *site type* is a kind of linear layer (`q_proj`, `down_proj`, ...); a *site* is one such layer in
one transformer block. An adapter sees a model only as a mapping from site type to `SiteShape`, so
such a mapping can be written by hand, without any model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from flax import nnx

from mos_jax.errors import InputError, suggest

SITE_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
# Where a site type stands inside a block, as Hugging Face models of all families call it.
SITE_MODULES = {
    name: f"{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}"
    for name in SITE_TYPES
}


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """The shape of all sites of one type.

    Attributes:
      num_layers: number of adapted transformer blocks, L.
      d_in: input width of the linear layer, h.
      d_out: output width of the linear layer, o.
      layers: indices of the adapted blocks in the model, ascending; None means all blocks.
    """

    num_layers: int
    d_in: int
    d_out: int
    layers: tuple[int, ...] | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the adapted blocks in the model, ascending."""
        return tuple(range(self.num_layers)) if self.layers is None else self.layers


Sites = Mapping[str, SiteShape]


def module_name(name: str, block: int) -> str:
    """The module of a site: ("q_proj", 3) -> "model.layers.3.self_attn.q_proj"."""
    return f"model.layers.{block}.{SITE_MODULES.get(name, name)}"


def compile_key(key: str, where: str) -> re.Pattern[str]:
    r"""The expression that matches the modules of `key` as PEFT does: their end, from a dot on.

    Args:
      key: a name or a regular expression: `q_proj`, `layers\.[0-3]\..*`.
      where: what the key is a part of, for messages.

    Raises:
      InputError: if it is no regular expression.
    """
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: {key!r} is not a regular expression ({error})") from None


def check_sites(sites: Sites) -> dict[str, SiteShape]:
    """Returns `sites` as a dict after checking every name and number in it.

    Raises:
      InputError: if there are no sites, a name cannot be that of an array, a site is not a
        `SiteShape`, a width or a depth is not a positive integer, or `layers` is not a tuple of
        `num_layers` distinct, ascending block indices.
    """
    if not isinstance(sites, Mapping):
        raise InputError(f"sites must be a mapping from site type to SiteShape, got {sites!r}")
    if not sites:
        raise InputError("no sites to adapt: the mapping from site type to SiteShape is empty")
    for name, site in sites.items():
        _check_name(name)
        if not isinstance(site, SiteShape):
            raise InputError(f"site {name!r} must be a SiteShape, got {site!r}")
        for field in ("num_layers", "d_in", "d_out"):
            value = getattr(site, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"site {name!r}: {field} must be a positive integer, got {value!r}"
                )
        if site.layers is not None and (
            not isinstance(site.layers, tuple)
            or any(isinstance(k, bool) or not isinstance(k, int) for k in site.layers)
            or len(site.layers) != site.num_layers
            or list(site.layers) != sorted(set(site.layers))
            or site.layers[0] < 0
        ):
            raise InputError(
                f"site {name!r}: layers must be a tuple of num_layers={site.num_layers} distinct "
                f"block indices in ascending order, got {site.layers!r}"
            )
    return dict(sites)


def _check_name(name: str) -> None:
    # A name is a key of nnx.Dict, which keeps its entries as attributes, and a part of the path
    # under which an array is stored.
    if not isinstance(name, str) or not name or "/" in name or name.startswith("_"):
        raise InputError(
            "the name of a site type must be a string that is not empty, has no '/' and does not "
            f"start with '_', got {name!r}"
        )
    if hasattr(nnx.Dict, name):
        raise InputError(f"the name of a site type cannot be {name!r}, a method of nnx.Dict")


def select_sites(
    sites: Sites,
    include: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
) -> dict[str, SiteShape]:
    r"""Selects which sites are adapted.

    Args:
      sites: all sites of the model.
      include: "all-linear", names and regular expressions. An expression that matches the whole
        name of a site type (`"[qv]_proj"`) takes it in all blocks; one that matches none takes
        the single sites whose module it matches the end of, as PEFT does
        (`r"layers\.[0-3]\.self_attn\.q_proj"`, see `module_name`), so that types may differ in
        their blocks.
      exclude: the same, of what to leave out.
      layers: block indices to adapt, in any order; negative ones count from the end; None = all.

    Returns:
      The selected sites, in the order of `sites`. Where not all blocks are selected, `num_layers`
      counts the adapted ones only, since a pool belongs to the blocks that share it.

    Raises:
      InputError: if a pattern is malformed or matches nothing (with the candidates), if nothing
        is left, of all or of a type within `layers`, or if a block index is out of range or given
        twice.
    """
    sites = check_sites(sites)
    chosen = _matching(sites, _as_tuple(include), "include")
    chosen -= _matching(sites, _as_tuple(exclude), "exclude")
    selected = {}
    for name, site in sites.items():
        blocks = tuple(block for block in site.blocks if (name, block) in chosen)
        if blocks and layers is not None:
            blocks = _restrict(name, site, blocks, layers)
        if blocks:
            whole = blocks == site.blocks and layers is None
            own = site.layers if whole else blocks
            selected[name] = SiteShape(len(blocks), site.d_in, site.d_out, own)
    if not selected:
        raise InputError(
            f"no sites left: include={include!r} and exclude={exclude!r} select none of "
            f"{', '.join(sites)}"
        )
    return selected


def _as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(sites: Sites, patterns: tuple[str, ...], argument: str) -> set[tuple[str, int]]:
    """Site type and block of all sites that one of the patterns matches."""
    every = {
        (name, block): module_name(name, block) for name in sites for block in sites[name].blocks
    }
    matched: set[tuple[str, int]] = set()
    for pattern in patterns:
        of_module = compile_key(pattern, argument)
        of_type = re.compile(pattern)
        types = {name for name in sites if pattern == ALL_LINEAR or of_type.fullmatch(name)}
        hits = {
            place
            for place, module in every.items()
            if (place[0] in types if types else of_module.match(module))
        }
        if not hits:
            known = every.values() if "." in pattern else sites
            raise InputError(
                f"{argument}: {pattern!r} matches no site type and no module; "
                f"{suggest(pattern, known)}"
            )
        matched |= hits
    return matched


def _restrict(
    name: str, site: SiteShape, blocks: tuple[int, ...], layers: Sequence[int]
) -> tuple[int, ...]:
    """Those of the `blocks` of a site type that `layers` names, which are counted in the model."""
    available = site.blocks
    depth = available[-1] + 1
    chosen: list[int] = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InputError(f"layers: {layer!r} is not a block index (an integer)")
        index = layer + depth if layer < 0 else layer
        if index not in available:
            raise InputError(
                f"layers: block {layer} does not exist for {name!r}; it has blocks "
                f"{available[0]} to {available[-1]}"
            )
        if index in chosen:
            raise InputError(f"layers: block {index} is given twice")
        chosen.append(index)
    if not chosen:
        raise InputError("layers: the list is empty; leave it out to adapt every block")
    left = tuple(block for block in blocks if block in chosen)
    if not left:
        raise InputError(
            f"layers: {list(layers)} leaves nothing of {name!r}, of which include and exclude "
            f"select the blocks {list(blocks)}"
        )
    return left
