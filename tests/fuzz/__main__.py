"""`python -m tests.fuzz`: mutated files against every reader; see `make fuzz`."""

import argparse
import concurrent.futures
import os
import sys
import time

from tests.fuzz.runner import Summary, run
from tests.fuzz.targets import TARGETS

FORMATS = tuple(TARGETS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: all")
    parser.add_argument("--cases", type=int, default=2000, help="mutated files for each format")
    parser.add_argument("--seed", default="0", help="any text")
    parser.add_argument("--case", type=int, help="one case, with all that is known of it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    formats = options.format or list(FORMATS)
    if options.case is not None:
        one = [run(n, options.seed, options.case, options.case, show=True) for n in formats]
        return int(any(summary.findings for summary in one))

    def timed(name: str) -> tuple[Summary, float]:
        start = time.monotonic()
        return run(name, options.seed, 0, options.cases - 1), time.monotonic() - start

    head = "format cases read refused raised died findings messages traced resident seconds".split()
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    findings: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for name, (summary, seconds) in zip(formats, pool.map(timed, formats), strict=True):
            counts = [summary.counts[word] for word in ("read", "refused", "raised", "died")]
            cells = [name, sum(counts), *counts, len(summary.findings), len(summary.messages)]
            cells += [f"{max(x, 0) / 2**20:.1f} MiB" for x in (summary.traced, summary.resident)]
            print(f"| {' | '.join(map(str, [*cells, round(seconds)]))} |", flush=True)
            findings += summary.findings
    for finding in findings:
        print(f"\n{finding}")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
