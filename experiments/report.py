r"""Writes the report of a sweep: Markdown, one HTML file, pictures and data files.

python experiments/report.py --workdir=runs/strategies
python experiments/report.py --workdir=runs/strategies --baseline="LoRA e=2,LoRA e=8"
python experiments/report.py --workdir=runs/equal_e1,runs/equal_e2 --out=runs/equal

It can be called at any time: runs that are missing or failed are listed as such, and an arm's
numbers are from the seeds that are there. Takes some seconds, and about a minute more to look into
the pools of one MoS run (--nosharing leaves that out, and needs neither base nor data).

In --out, by default the folder `report` in the first --workdir, are then report.html, to be read
first, one file with its pictures in it; report.md, the same with its pictures as PNG beside it;
results.json, a record for each run; and summary.json, the numbers of the tables. An earlier report
there is replaced.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mos_jax import app

WORKDIR = flags.DEFINE_list("workdir", [], "Folder of the sweep, or several with commas.")
OUT = flags.DEFINE_string("out", None, "Folder of the report; default: report in the workdir.")
BASELINE = flags.DEFINE_list(
    "baseline", [], "Arms to compare with, with commas; default: those of the sweep's config."
)
SHARING = flags.DEFINE_bool(
    "sharing", True, "Look into the pools of one MoS run; loads base and data, needs a minute."
)


def main(_: Sequence[str]) -> None:
    # Imported here so that --help and mistyped flags answer at once.
    from rich.console import Console

    from mos_jax.errors import InputError
    from mos_jax.reporting.results import load_results
    from mos_jax.reporting.style import require_matplotlib
    from mos_jax.reporting.write import look_into_sharing, write_report

    if not WORKDIR.value:
        raise InputError("--workdir is missing; for example --workdir=runs/strategies")
    require_matplotlib()
    results = load_results(WORKDIR.value, BASELINE.value)
    shared = look_into_sharing(results) if SHARING.value else None
    page = write_report(results, OUT.value or Path(WORKDIR.value[0]) / "report", shared)
    console = Console()
    for record in results.lacking:
        console.print(
            f"{record['status']}: {record['folder']} {record['error'] or ''}".rstrip(),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.print(f"The report is in {page}.", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
