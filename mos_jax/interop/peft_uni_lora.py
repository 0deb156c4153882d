"""Uni-LoRA in PEFT's form: its index, saved or drawn, and the scales that go with it.

PEFT draws which entries of theta are used once more than the others (`used_more="drawn"` here). A
folder has the index of each module and the scale of each place if it was saved with
`save_indices`; if not, PEFT draws the index again from `proj_seed` when it loads it.

Axis legend: r rank, h = d_in, o = d_out, D entries of theta, N places in all factors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mos_jax.adapters.adapter import Adapter
from mos_jax.adapters.sites import Sites
from mos_jax.adapters.uni_lora import UniLoRAConfig, scales_of
from mos_jax.errors import InputError
from mos_jax.interop.peft_arrays import Arrays, filled_adapter, module_order
from mos_jax.interop.peft_config import Site, site_tensor
from mos_jax.interop.peft_fields import PeftConfig
from mos_jax.interop.peft_folder import check_names, read_arrays, take, take_index

THETA = "base_model.unilora_theta_d"
# By site: the entry of theta at every place of A [r, h] and of B [o, r].
Places = dict[Site, list[np.ndarray]]


def import_uni_lora(folder: Path, config: PeftConfig, sites: Sites) -> Adapter:
    """The adapter in a folder whose configuration was read, for the sites it adapts.

    Raises:
      InputError: for missing, extra or misshapen tensors, an index that is not balanced, scales
        that do not go with it, or more entries of theta than places.
    """
    raw = config.raw
    ours = UniLoRAConfig(
        theta_length=raw["theta_d_length"],
        rank=raw["r"],
        routing_seed=raw["proj_seed"],
        used_more="drawn",
    )
    length, entries = ours.theta_length, ours.count_entries(sites)
    arrays = read_arrays(folder)
    saved = bool(raw.get("save_indices"))
    parts = [f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB"]
    names = {site_tensor(site, part) for site in module_order(sites) for part in parts if saved}
    check_names(folder, arrays, {THETA} | names)
    found = {"theta": take(arrays, THETA, (length,))}
    if saved:
        places = _saved_places(arrays, sites, ours)
        found["scales"] = _saved_scales(arrays, sites, places, scales_for(places, length))
    else:
        # Nothing else in such a folder says that its rank is one that fits in memory.
        widest = max(max(site.d_in, site.d_out) for site in sites.values())
        if ours.rank > widest:
            raise InputError(
                f"{config.file}: r = {ours.rank} is above every width of the base's sites "
                f"({widest}), and there is no index to draw for such a rank"
            )
        places = drawn_places(sites, ours, entries)
        found["scales"] = scales_for(places, length)
    index = _index_arrays(places, sites)
    return filled_adapter(ours, sites, found | index)


def drawn_places(sites: Sites, config: UniLoRAConfig, entries: int) -> Places:
    """The index that PEFT draws from a seed: by site, for A [r, h] and for B [o, r].

    PEFT draws it with NumPy when it loads a folder that does not have it, so that the folder means
    what NumPy's Generator of the day makes of the seed; the same calls are made here.
    """
    length = config.theta_length
    generator = np.random.default_rng(config.routing_seed)
    drawn = np.repeat(np.arange(length), entries // length)
    if more := entries % length:
        extra = generator.choice(length, size=more, replace=False)
        drawn = np.concatenate([drawn, extra])
    generator.shuffle(drawn)
    places, start = {}, 0
    for name, layer in module_order(sites):
        pair = []
        for shape in ((config.rank, sites[name].d_in), (sites[name].d_out, config.rank)):
            stop = start + shape[0] * shape[1]
            pair.append(drawn[start:stop].reshape(shape).astype(np.int32))
            start = stop
        places[name, layer] = pair
    return places


def scales_for(places: Places, length: int) -> np.ndarray:
    """fp32 [D], 1 / sqrt(how often each entry of theta is used), of an entry without use 1."""
    every = np.concatenate([side.ravel() for pair in places.values() for side in pair])
    return scales_of(np.maximum(np.bincount(every, minlength=length), 1))


def _saved_places(arrays: Arrays, sites: Sites, config: UniLoRAConfig) -> Places:
    return {
        (name, layer): [
            take_index(
                arrays,
                site_tensor((name, layer), f"unilora_indices_{side}"),
                (config.rank, site.d_in) if side == "A" else (site.d_out, config.rank),
                config.theta_length,
            )
            for side in "AB"
        ]
        for name, site in sites.items()
        for layer in site.blocks
    }


def _saved_scales(
    arrays: Arrays,
    sites: Sites,
    places: Places,
    scales: np.ndarray,
) -> np.ndarray:
    """The scale of each entry of theta as the file has it, fp32 [D]; it may be a rounded one.

    `scales` is what stands for entries that no place uses.
    """
    scales = scales.copy()
    for site, pair in places.items():
        for side, index in zip("AB", pair, strict=True):
            name = site_tensor(site, f"unilora_scales_{side}")
            scales[index] = take(arrays, name, index.shape)
    # Written entry by entry; only now is it known whether all places of an entry agree.
    for site, pair in places.items():
        for side, index in zip("AB", pair, strict=True):
            name = site_tensor(site, f"unilora_scales_{side}")
            if np.any(take(arrays, name, index.shape) != scales[index]):
                raise InputError(
                    f"tensor {name} has another scale for an entry of theta than an earlier "
                    "tensor; an entry has one"
                )
    return scales


def _index_arrays(places: Places, sites: Sites) -> Arrays:
    """The index of all blocks by our paths, int32 [L, r, h] and [L, r, o]."""
    index = {}
    for name, site in sites.items():
        pairs = [places[name, layer] for layer in site.blocks]
        index[f"index_a/{name}"] = np.stack([a for a, _ in pairs])
        index[f"index_b/{name}"] = np.stack([b.T for _, b in pairs])
    return index
