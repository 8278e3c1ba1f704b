"""The command: python -m ftd_ray.experts FILE [key.path=value ...] [--dry-run].

Fills the store with every expert set that a sweep may ask for, ahead of it. Killed or repeated, it
trains only what is missing. Exit codes: 0 all experts are there, 1 some set could not be built, 2
usage or configuration, 128 + signal after an interrupt.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from ftd_ray.command import (
    check_room,
    exit_code,
    open_tracker,
    ray_address,
    reachable,
    sweep_parser,
)
from ftd_ray.config import load_config
from ftd_ray.fit import this_machine
from ftd_ray.local import listen_on_loopback
from ftd_ray.plan import lacking, lacking_compiler, machine_resources, make_plan
from ftd_ray.reading import reading
from ftd_ray.signals import signals
from ftd_ray.storage import probe


def main(argv: Sequence[str] | None = None) -> int:
    parser = sweep_parser(
        "ftd_ray.experts", "Train the experts of a sweep into the store, ahead of it."
    )
    args = parser.parse_intermixed_args(argv)
    console = Console(highlight=False)
    return exit_code("experts", lambda: _main(args, console))


def _main(args: argparse.Namespace, console: Console) -> int:
    address = ray_address(args.address)
    config = load_config(args.file, args.overrides)
    with reachable(config), reading(console) as progress:
        plan = make_plan(config, progress, read=True)
    probe(config.store.uri, "store.uri")
    tracker = open_tracker(config, dry_run=args.dry_run)
    missing = []
    if address is None:
        missing = lacking(config, machine_resources(), experts_only=True)
        missing += lacking_compiler(config, experts_only=True)
    machine = this_machine() if address is None else None
    console.print(plan.experts_text(missing, machine), soft_wrap=True, markup=False)
    if args.dry_run:
        return 0
    if not any(s.missing for s in plan.sets):
        console.print("every expert is in the store", markup=False)
        return 0
    check_room(plan, missing)
    with signals() as handled:
        if address is None:
            listen_on_loopback()
        from ftd_ray.experts.fill import Fill  # brings Ray, which a plan does without

        handled.check()  # in imports, an exception of a signal may be lost
        return Fill(config, plan, tracker, console, handled).run(address)


if __name__ == "__main__":
    sys.exit(main())
