"""Methods at equal budgets: the largest setting of a method that trains no more than a budget.

Every method has one field that sets its size. What else a setting needs has a default here, which
the caller may fix otherwise. Two of these defaults keep methods comparable: a site of MoS, Uni-LoRA
and PRoLoRA gets about `REACH` times the rank that LoRA has at the same budget.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from mos_jax.adapters.adapter import AdapterConfig, require_integer
from mos_jax.adapters.methods import METHODS, count_parameters, make_config
from mos_jax.adapters.sites import Sites, check_sites
from mos_jax.errors import InputError, suggest

REACH = 4
LONGEST_SUB_VECTOR = 256


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A setting that keeps a budget.

    Attributes:
      config: the method's configuration.
      trained: its trained parameters on the sites it was fitted to.
      ratio: trained / budget, at most 1.
    """

    config: AdapterConfig
    trained: int
    ratio: float


def fit(method: str, sites: Sites, budget: int, /, **fixed: Any) -> Fitted:
    """Finds the largest setting of a method with at most `budget` trained parameters.

    Only the method's size (`AdapterConfig.size_field`) is searched, from shapes alone. Fields that
    are neither fixed nor given a default below have those of the configuration:

    - MoS: `rank` is 4 times the equivalent rank, or as many vectors as there are.
    - PRoLoRA: `unshared_rank` is 1, or 0 where LoRA of rank 2 is above the budget; `chunks_a` and
      `chunks_b` are the power of 2, up to 8, that brings the rank nearest to 4 times that of LoRA.
    - Uni-LoRA: `rank` is the first at which all factors have 4 times the budget of entries.
    - VB-LoRA: `vector_length` is the greatest common divisor of all widths that is at most 256.

    Args:
      method: name in `METHODS`.
      sites: the adapted sites.
      budget: trained parameters.
      **fixed: other fields of the method's configuration.

    Raises:
      InputError: for an unknown method or field, a size that is fixed, as it is where
        `rank_pattern` names all sites, a setting that does not fit the sites, or a budget below
        the method's smallest setting, which is named with its count.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; {suggest(method, METHODS)}")
    require_integer("budget", "budget", budget, 1)
    field = METHODS[method].size_field
    if field in fixed:
        raise InputError(
            f"budget: {field}={fixed[field]!r} is what the budget decides for {method}; leave it "
            "out"
        )
    sites = check_sites(sites)

    def setting(size: int) -> AdapterConfig:
        return make_config(method, {field: size, **_defaults(method, size, sites, budget, fixed)})

    def count(size: int) -> int:
        return sum(count_parameters(setting(size), sites).values())

    smallest = _smallest_size(method, sites, budget, fixed)
    least = count(smallest)
    if least > budget:
        raise InputError(
            f"budget: {method} cannot keep a budget of {budget} trained parameters here; its "
            f"smallest setting, {field}={smallest}, has {least}"
        )
    if field == "rank" and setting(smallest).site_ranks(sites) == setting(smallest + 1).site_ranks(
        sites
    ):
        raise InputError(
            f"budget: rank decides nothing for {method} here, since "
            f"rank_pattern={fixed['rank_pattern']!r} names every site; leave a site out of it"
        )
    size, trained = _largest_within(count, budget, smallest, least)
    return Fitted(setting(size), trained, trained / budget)


def _largest_within(
    count: Callable[[int], int], budget: int, low: int, trained: int
) -> tuple[int, int]:
    """The largest size whose count, which grows with it, is within the budget; and its count.

    All methods' counts are straight lines, mostly, so following the slope takes few counts. A size
    that the sites cannot have is too large.
    """
    high: int | None = None
    slope: int | None = None
    while high is None or high - low > 1:
        guess = low + (1 if slope is None else max((budget - trained) // slope, 1))
        if high is not None and guess >= high:
            guess = (low + high) // 2
        try:
            found = count(guess)
        except InputError:
            found = budget + 1
        if found > budget:
            high = guess
        else:
            # Rounded up: rather a step too short than one too long.
            slope = max(-((trained - found) // (guess - low)), 1)
            low, trained = guess, found
    return low, trained


def _defaults(
    method: str, size: int, sites: Sites, budget: int, fixed: dict[str, Any]
) -> dict[str, Any]:
    """`fixed`, and the values of `fit` for what it leaves open."""
    per_rank = sum(site.num_layers * (site.d_in + site.d_out) for site in sites.values())
    values: dict[str, Any] = {}
    if method == "mos" and fixed.get("subset_selection", True) is not False:
        private = _whole(fixed.get("private_rank", 0), 0)
        vectors = private + (size - private) * _smallest_pool(sites, fixed)
        values["rank"] = min(REACH * size, vectors)
    elif method == "prolora":
        values["unshared_rank"] = 1 if budget >= 2 * per_rank else 0
        unshared = _whole(fixed.get("unshared_rank", values["unshared_rank"]), 0)
        lora = max(budget / per_rank, 1.0)
        # Unshared vectors take their part of LoRA's rank; the rest is repeated to fill the reach.
        left = lora - unshared
        # What is left may be next to nothing, and no chunk is narrower than one entry.
        repeats = min((REACH * lora - unshared) / left, 2.0 * REACH) if left > 0 else 1.0
        chunks = 2 ** round(math.log2(repeats))
        values |= {"chunks_a": chunks, "chunks_b": chunks}
    elif method == "uni_lora":
        values["rank"] = -(-REACH * budget // per_rank)
    elif method == "vb_lora":
        common = math.gcd(*(width for s in sites.values() for width in (s.d_in, s.d_out)))
        lengths = range(1, min(common, LONGEST_SUB_VECTOR) + 1)
        values["vector_length"] = max(length for length in lengths if common % length == 0)
    return {**values, **fixed}


def _smallest_size(method: str, sites: Sites, budget: int, fixed: dict[str, Any]) -> int:
    """The smallest size that a method can have beside its other fields."""
    if method == "mos":
        private = _whole(fixed.get("private_rank", 0), 0)
        named = fixed.get("rank_pattern") or {}
        ranks = [fixed.get("rank"), *(named.values() if isinstance(named, Mapping) else ())]
        public = max(_whole(rank, private) for rank in ranks) - private
        return max(private + -(-public // _smallest_pool(sites, fixed)), 1)
    beside = {"prolora": "unshared_rank", "rasa": "shared_rank", "vb_lora": "top_k"}
    if method not in beside:
        return 1
    known = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    fields = {**known, **_defaults(method, 1, sites, budget, fixed)}
    return max(_whole(fields[beside[method]], 1), 1)


def _smallest_pool(sites: Sites, fixed: dict[str, Any]) -> int:
    """Vectors that the smallest pool of MoS has for each rank that is public."""
    if fixed.get("pool_scope") != "width":
        return min(site.num_layers for site in sites.values())
    blocks: collections.Counter[tuple[str, int]] = collections.Counter()
    for site in sites.values():
        blocks["a", site.d_in] += site.num_layers
        blocks["b", site.d_out] += site.num_layers
    return min(blocks.values())


def _whole(value: Any, otherwise: int) -> int:
    """`value`; or `otherwise` where it is no whole number, which the configuration refuses."""
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
