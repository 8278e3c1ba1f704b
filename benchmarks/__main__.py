"""python -m benchmarks [PART ...]: measures, then writes results.json and README.md.

Parts that compare our code with the textbook version are measured on a GPU too, where there is
one; a run without one keeps the GPU figures that are there, and one on a GPU alone the others.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.report import HEAD, HERE, RESULTS, conditions, machine, read_results


class Part(NamedTuple):
    """One subject, measured and shown by the module of its name."""

    title: str
    compared: bool = False
    """With the textbook version, on every device."""


PARTS = {
    "matching": Part("One matching step: the textbook version against ours", compared=True),
    "experts": Part("An expert's epoch: the textbook version against ours", compared=True),
    "evaluation": Part("Evaluation: the textbook version against ours", compared=True),
    "outer": Part("The outer optimiser: one space for all data"),
    "limits": Part("What the machine can do"),
    "segments": Part("Reading segments of trajectories"),
    "precision": Part("Snapshots in fewer bits"),
    "sweep": Part("Whole sweeps"),
    "search": Part("A trial's cost to the driver"),
    "pruning": Part("What pruning saves"),
    "fleet": Part("Training experts on a cluster"),
    "scale": Part("A large cluster, simulated"),
}


def module(name: str) -> ModuleType:
    """Imported when it is needed: a machine without Ray can measure the parts without it."""
    return importlib.import_module(f"benchmarks.{name}")


def measure(name: str, device: str) -> dict[str, Any]:
    """What a run on ``device`` adds to a part's record."""
    if not PARTS[name].compared:
        return {"machine": machine(), "results": module(name).run()}
    found = {"machine": machine(device), "results": module(name).run(device)}
    return {"gpu": found} if device == "cuda" else found


def merged(results: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    """All results after a run: other parts, and another device's figures, stay as they were."""
    return results | {name: results.get(name, {}) | found}


def page(results: dict[str, Any]) -> str:
    """README.md: every part that was measured, with the conditions of its run."""
    lines = [HEAD]
    for name, part in PARTS.items():
        record = results.get(name, {})
        if "results" in record:
            lines += [f"## {part.title}", "", conditions(record["machine"]), ""]
            shown = record if part.compared else record["results"]
            lines += [*module(name).render(shown), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_page(results: dict[str, Any]) -> None:
    """README.md, and the pictures that it shows."""
    (HERE / "README.md").write_text(page(results))
    for name in PARTS:
        record = results.get(name, {})
        if record.get("results", {}).get("curves"):
            module(name).draw(record, HERE)


def devices(asked: str | None) -> Sequence[str]:
    """Where to measure: on a CPU, and on a GPU where there is one."""
    if asked:
        return (asked,)
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="this one alone")
    parser.add_argument("--page", action="store_true", help="only write README.md anew")
    args = parser.parse_args()
    unknown = [p for p in args.parts if p not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]} is not a part. Take one of {', '.join(PARTS)}.")
    for name in () if args.page else args.parts or PARTS:
        for device in devices(args.device):
            if device == "cuda" and not PARTS[name].compared:
                continue
            print(f"--- {name} ({device})", flush=True)
            results = merged(read_results(), name, measure(name, device))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    try:
        write_page(read_results())
    except ImportError as error:
        sys.exit(f"wrote {RESULTS}, not README.md: {error}. `python -m benchmarks --page` does.")
    print(f"wrote {RESULTS} and README.md")


if __name__ == "__main__":
    main()
