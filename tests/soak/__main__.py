"""`python -m tests.soak`: random load on an engine for a long while; see `make soak`."""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from experiments.bench.rounds import machine_facts
from mos_jax.reporting.style import png_bytes
from tests.soak.harness import soak
from tests.soak.picture import soak_picture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0, help="at least so long")
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for soak.json and soak.png")
    options = parser.parse_args()
    # Listeners that raise are a part of it.
    logging.getLogger("mos_jax.serving").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            folder,
            requests=options.requests,
            seconds=options.seconds,
            seed=options.seed,
            say=lambda text: print(text, flush=True),
        )
    report.numbers |= {
        "command": f"python -m tests.soak --seconds={options.seconds:.0f} "
        f"--requests={options.requests} --seed={options.seed}",
        "machine": machine_facts(os.cpu_count() or 1),
    }
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "soak.json").write_text(report.to_json() + "\n", encoding="utf-8")
        (out / "soak.png").write_bytes(png_bytes(soak_picture(report)))
    for name, value in report.numbers.items():
        print(f"{name}: {value}")
    for problem in report.problems:
        print(f"PROBLEM: {problem}")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
