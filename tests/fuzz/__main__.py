"""`make fuzz SECONDS=1800`: invents decoders until the time is over, or until one goes wrong.

Each batch of cases has a seed of its own, which is printed, so that it can be run again.
"""

import argparse
import sys
import time

from fuzz.search import Judge, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--batch", type=int, default=50, help="cases per seed")
    parser.add_argument("--keep-going", action="store_true", help="after a case that goes wrong")
    parser.add_argument(
        "--only", default="", help="pass over what goes wrong without this regular expression"
    )
    given = parser.parse_args()
    judge, start, number, found = Judge(given.only), time.monotonic(), given.seed, 0
    while time.monotonic() - start < given.seconds:
        report = search(judge, number, given.batch)
        seen, spent = judge.seen, time.monotonic() - start
        sites = ", ".join(f"{n} {component}" for component, n in sorted(seen.sites.items()))
        passed_over = f"{seen.passed_over} passed over, " if given.only else ""
        print(
            f"seed {number}: {seen.cases} cases so far, of which torch took "
            f"{seen.cases - seen.invalid}, {passed_over}"
            f"with {sites or 'no'} sites, in {spent:.0f} s",
            flush=True,
        )
        if report:
            found += 1
            print(report, flush=True)
            if not given.keep_going:
                break
        number += 1
    judge.close()
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
