"""python -m benchmarks [PART ...]: measures, then writes results.json and README.md."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import fleet, matching, precision, pruning, search, segments, sweep
from benchmarks.report import HEAD, HERE, RESULTS, conditions, machine, read_results


class Part(NamedTuple):
    """One subject: how it is measured and how it is shown."""

    title: str
    run: Callable[[], dict[str, Any]]
    render: Callable[[dict[str, Any]], list[str]]


PARTS = {
    "matching": Part(
        "One matching step: direct unroll against rematerialised", matching.run, matching.render
    ),
    "segments": Part("Reading segments of trajectories", segments.run, segments.render),
    "precision": Part("Snapshots in fewer bits", precision.run, precision.render),
    "sweep": Part("A whole sweep", sweep.run, sweep.render),
    "search": Part("A trial's cost to the driver", search.run, search.render),
    "pruning": Part("What pruning saves", pruning.run, pruning.render),
    "fleet": Part("Training experts on a cluster", fleet.run, fleet.render),
}


def page(results: dict[str, Any]) -> str:
    """README.md: every part that was measured, with the conditions of its run."""
    lines = [HEAD]
    for name, part in PARTS.items():
        if name in results:
            lines += [f"## {part.title}", "", conditions(results[name]["machine"]), ""]
            lines += [*part.render(results[name]["results"]), ""]
    lines.append("GPU figures: none yet.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    args = parser.parse_args()
    unknown = [p for p in args.parts if p not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]} is not a part. Take one of {', '.join(PARTS)}.")
    for name in args.parts or PARTS:
        print(f"--- {name}", flush=True)
        measured = {"machine": machine(), "results": PARTS[name].run()}
        results = read_results() | {name: measured}  # other parts keep their last figures
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "README.md").write_text(page(results))
    print(f"wrote {RESULTS} and README.md")


if __name__ == "__main__":
    main()
