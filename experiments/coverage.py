r"""Prints how often the intervals of reports hold the truth, by simulation; aim: 95%.

python experiments/coverage.py
python experiments/coverage.py --replications=100 --items=64

Scores of known truth are drawn from 100 designs: 2 to 8 seeds, whose spread and mean vary. The
table has a line for each, printed when it is done. Columns:

  seeds, seed spread, mean   the design; spreads are in log-odds
  interval of the mean       share of draws in which an arm's 95% interval holds its true accuracy
  its width                  mean width of that interval
  crossed bootstrap          the same share for the interval of a bootstrap, to compare
  difference                 for the paired difference of two arms that are equally good
  ... moving together        the same where the seeds of both arms are good or bad together
  same, as independent       the same draws, by an interval that does not pair the seeds

Nothing is loaded or written. The defaults take about 3 minutes on one CPU core, in proportion to
--replications; a share near 95% of 4,000 draws is then good to about 0.7 points.
"""

from collections.abc import Sequence

from absl import flags

from mos_jax import app

REPLICATIONS = flags.DEFINE_integer("replications", 4000, "Draws of each design.", lower_bound=1)
ITEMS = flags.DEFINE_integer("items", 256, "Items of each design.", lower_bound=2)
ITEM_SPREAD = flags.DEFINE_float("item_spread", 1.5, "Spread of the items' log-odds.", 0.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the simulation.")

SEEDS = (2, 3, 4, 5, 8)
SPREADS = (0.0, 0.1, 0.4, 0.8)
MEANS = (0.1, 0.3, 0.5, 0.9, 0.98)
HEADER = (
    "seeds",
    "seed spread",
    "mean",
    "interval of the mean",
    "its width",
    "crossed bootstrap",
    "difference",
    "difference, seeds moving together at 0.9",
    "same, taken as independent",
)


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    import dataclasses

    import numpy as np

    from mos_jax.statistics.simulation import Design, bootstrap_coverage, coverage

    rng = np.random.default_rng(SEED.value)
    print("| " + " | ".join(HEADER) + " |")
    print("|---" * len(HEADER) + "|", flush=True)
    for seeds in SEEDS:
        for spread in SPREADS:
            for mean in MEANS:
                design = Design(seeds, mean, spread, ITEM_SPREAD.value, items=ITEMS.value)
                found = coverage(design, REPLICATIONS.value, rng)
                together = dataclasses.replace(design, seed_correlation=0.9)
                moved = coverage(together, REPLICATIONS.value, rng)
                bootstrap = bootstrap_coverage(design, REPLICATIONS.value // 4 + 1, rng)
                shares = (found.difference, moved.difference, moved.independent)
                print(
                    f"| {seeds} | {spread} | {mean} | {found.mean:.1%} | {found.width:.3f} | "
                    f"{bootstrap:.1%} | " + " | ".join(f"{share:.1%}" for share in shares) + " |",
                    flush=True,
                )


if __name__ == "__main__":
    app.run(main)
