r"""Combines trained adapters of one base, of any methods, into one, with weights.

python experiments/combine.py --adapter=a=runs/a/adapter --adapter=b=runs/b/adapter \
  --weights=0.7,0.3 --out=runs/both
python experiments/combine.py --adapter=a=runs/a/adapter --adapter=b=runs/b/peft \
  --weights=1,1 --how=ties --density=0.2 --rank=8 --out=runs/both

What is written is a PEFT LoRA folder, which the other programs take like an adapter. How far it is
from the exact weighted sum of the changes is printed for every site type.
"""

from collections.abc import Sequence

from absl import flags

from mos_jax import app

ADAPTER = flags.DEFINE_multi_string(
    "adapter", None, "Folder of an adapter, ours or PEFT's, or NAME=FOLDER; give it for each."
)
WEIGHTS = flags.DEFINE_list("weights", None, "One for each, with commas; below 0 subtracts.")
HOW = flags.DEFINE_string("how", "exact", "exact, linear, ties, dare_linear or dare_ties.")
DENSITY = flags.DEFINE_float("density", None, "Share of entries that ties and dare keep.")
RANK = flags.DEFINE_integer("rank", None, "Largest rank of the result; default: that of --how.")
SEED = flags.DEFINE_integer("seed", 0, "Of dare's choice.")
BASE = flags.DEFINE_string("base", None, "Name or path of the base; default: the one trained on.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what stands at --out.")


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from mos_jax.adapters.combine import combine
    from mos_jax.errors import InputError
    from mos_jax.interop.peft import export_peft
    from mos_jax.several import load_several

    if not ADAPTER.value:
        raise InputError("--adapter is missing; for example --adapter=a=runs/a/adapter")
    if not WEIGHTS.value:
        raise InputError("--weights is missing; for example --weights=0.7,0.3")
    if not OUT.value:
        raise InputError("--out is missing; for example --out=runs/both")
    try:
        weights = [float(weight) for weight in WEIGHTS.value]
    except ValueError:
        raise InputError(f"--weights must be numbers, got {','.join(WEIGHTS.value)}") from None
    several = load_several(ADAPTER.value, BASE.value)
    combined = combine(
        list(several.factors.values()),
        weights,
        HOW.value,
        density=DENSITY.value,
        rank=RANK.value,
        seed=SEED.value,
    )
    settings = {"density": DENSITY.value, "rank": RANK.value, "seed": SEED.value}
    export_peft(
        OUT.value,
        combined.factors,
        base_name=several.base.name,
        num_layers=several.base.config.num_layers,
        card={
            "combination": HOW.value,
            "weights": dict(zip(several.factors, weights, strict=True)),
            **{name: value for name, value in settings.items() if value is not None},
            "distance_to_the_weighted_sum": f"{combined.error:.3g}",
            **{f"adapter {name}": card for name, card in several.cards.items()},
        },
        overwrite=OVERWRITE.value,
    )
    for site, error in combined.errors.items():
        print(f"{site:<10} rank {combined.factors[site].rank:>3}  distance {error:.2g}")
    print(
        f"wrote {OUT.value}: the distance to the weighted sum of the changes is "
        f"{combined.error:.2g} of its norm"
    )


if __name__ == "__main__":
    app.run(main)
