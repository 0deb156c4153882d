r"""Every method at one budget of trained parameters: that of LoRA of rank 1, 2 or 8.

Command: python experiments/sweep.py --config=configs/methods/equal_budget.py:2 \
             --workdir=runs/equal_budget_2
Hardware: 2 CPU cores. Time: --dry_run says. Result: not run as a whole.
The number behind the colon is the rank of that LoRA. A method whose sizes do not meet the budget
gets the nearest one below it, and the report shows the ratio. Rows called unequal stand apart:
RaSA at LoRA's rank is a little above the budget, and VeRA would need a rank of hundreds to
thousands for it, each as costly as one of LoRA's, so it is run at rank 256. Its seeds differ in
the order of the data alone: its projections have a seed of their own, its vectors start constant.
Rates are three to a method, around what each method's own paper uses.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import study
from mos_jax.adapters.budget import fit
from mos_jax.adapters.sites import Sites, SiteShape
from mos_jax.errors import InputError
from mos_jax.models.known import known_config
from mos_jax.sweeps.combinators import arm
from mos_jax.training.config import RunConfig

VERA_RANK = 256
RATES = {
    "vera": "3e-3,1e-2,3e-2",
    "vb_lora": "1e-3,3e-3,1e-2",
    "uni_lora": "1e-3,3e-3,1e-2",
}


def get_config(budget_rank: str = "2") -> ConfigDict:
    if not budget_rank.isdecimal() or int(budget_rank) < 1:
        raise InputError(f"a rank stands behind the colon, such as :2, not {budget_rank!r}")
    config = study.base_config()
    config.sweep.budget_rank = int(budget_rank)
    config.sweep.baseline = "LoRA"
    config.sweep.learning_rates = "1e-3,3e-3,9e-3"
    return config


def get_arms(config: ConfigDict) -> Iterator[dict[str, Any]]:
    sites, rank = sites_of(config), config.sweep.budget_rank
    unit = sum(site.num_layers * (site.d_in + site.d_out) for site in sites.values())
    # With rank 1 in all there is nothing to keep private.
    mos = {"shards_per_vector": 2, "private_rank": min(rank - 1, 1)}
    unequal = {"sweep.unequal": True}

    def fitted(name: str, method: str, **fixed: Any) -> dict[str, Any]:
        found = fit(method, sites, rank * unit, **fixed)
        rates = {"sweep.learning_rates": RATES[method]} if method in RATES else {}
        fields = found.config.to_dict()
        fields.pop("routing_seed", None)  # a run's seed is its routing seed too
        return arm(name, rates, method=method, **fields)

    yield fitted("LoRA", "lora")
    yield fitted("rsLoRA", "lora", rslora=True)
    yield fitted("MoS", "mos", **mos)
    yield fitted("MoS balanced", "mos", **mos, balanced_routing=True)
    yield fitted("PRoLoRA", "prolora")
    if rank > 1:
        yield fitted("RaSA", "rasa")
    # Its diagonal comes on top of LoRA's parameters, so at LoRA's rank it is 1 to 2% above.
    yield arm(f"RaSA r={rank}", unequal, method="rasa", rank=rank)
    yield fitted("ShareLoRA (A shared)", "share_lora", shared="a")
    yield fitted("ShareLoRA (B shared)", "share_lora", shared="b")
    yield fitted("Tied-LoRA", "tied_lora")
    yield fitted("Uni-LoRA", "uni_lora")
    yield fitted("VB-LoRA", "vb_lora")
    rates = {"sweep.learning_rates": RATES["vera"]}
    yield arm(f"VeRA r={VERA_RANK}", {**rates, **unequal}, method="vera", rank=VERA_RANK)


def sites_of(config: ConfigDict) -> Sites:
    """The adapted sites of the config's base, from its known sizes where it is the default one."""
    run = RunConfig.from_mapping(config.to_dict())
    if run.base.name == "smollm2-135m-instruct":
        shapes = known_config("smollm2-135m").site_shapes()
        return run.sites.select({name: SiteShape(*shape) for name, shape in shapes.items()})
    from mos_jax.models.base import load_base

    return run.sites.select(
        load_base(run.base.name, run.base.dtype, quantize=run.base.quantize).sites
    )
