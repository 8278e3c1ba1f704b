"""The command: python -m ftd_ray.sweep FILE [key.path=value ...] [--dry-run] [--resume].

Checks everything, prints the plan, runs the search on Ray, evaluates the winner once on test,
and leaves ``summary.json`` and ``best/`` in the sweep's folder. Exit codes: 0 done, 1 nothing
usable came out, 2 usage or configuration, 128 + signal after an interrupt, with state saved.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from ftd.errors import UserError
from ftd_ray.command import (
    check_room,
    exit_code,
    open_tracker,
    ray_address,
    reachable,
    sweep_parser,
)
from ftd_ray.config import SweepConfig, load_config
from ftd_ray.earlier import read_earlier
from ftd_ray.fit import this_machine
from ftd_ray.folder import check_same, finished_summary, only_one, saved_sweep
from ftd_ray.local import listen_on_loopback
from ftd_ray.mended import other_images
from ftd_ray.plan import Plan, lacking, lacking_compiler, machine_resources, make_plan
from ftd_ray.reading import reading
from ftd_ray.results import result_text
from ftd_ray.search import has_begun
from ftd_ray.signals import signals
from ftd_ray.storage import probe


def main(argv: Sequence[str] | None = None) -> int:
    parser = sweep_parser(
        "ftd_ray.sweep", "Search FTD's hyperparameters over a buffer of flat experts."
    )
    parser.add_argument("--resume", action="store_true", help="go on with what is saved, if any")
    args = parser.parse_intermixed_args(argv)
    console = Console(highlight=False)
    return exit_code("sweep", lambda: _main(args, console))


def _main(args: argparse.Namespace, console: Console) -> int:
    address = ray_address(args.address)
    config = load_config(args.file, args.overrides)
    with reachable(config), reading(console) as progress:
        plan = make_plan(config, progress)
        saved = saved_sweep(config.output_dir)
        anew = other_images(config.output_dir, plan.data.fingerprint) if args.resume else None
        begun = anew is None and has_begun(config.output_dir)
        if config.search.warm_start is not None and not begun:
            plan = replace(plan, earlier=read_earlier(config, plan.data))
    if saved is not None and not args.resume and not args.dry_run:
        raise UserError(
            f"{config.output_dir} holds a sweep already. Go on with it by --resume, or give "
            "another output.dir."
        )
    changes: list[str] = []
    if saved is not None and args.resume:
        changes = check_same(saved, config)
        summary = finished_summary(config)
        if summary is not None and (anew is None or anew.measured):
            if summary["mlflow"].get("waiting"):
                _send_late(config, plan, summary, console)
            console.print(result_text(summary, config.space), soft_wrap=True, markup=False)
            return 0 if summary["state"] == "done" else 1
    if anew is not None:
        anew.check()
        changes.append(str(anew))
    probe(config.output_dir, "output.dir")
    probe(config.store.uri, "store.uri")
    tracker = open_tracker(config, dry_run=args.dry_run)
    here = machine_resources()
    missing = [*lacking(config, here), *lacking_compiler(config)] if address is None else []
    machine = this_machine() if address is None else None
    console.print(plan.text(missing, machine), soft_wrap=True, markup=False)
    for change in changes:
        console.print(f"changed    {change}", soft_wrap=True, markup=False)
    if args.dry_run:
        return 0
    check_room(plan, missing)
    command = _resume_command(args)
    with signals() as handled, only_one(config.output_dir):
        if address is None:
            listen_on_loopback()
        from ftd_ray.driver import Sweep  # brings Ray Tune, which a plan does without

        handled.check()  # in imports, an exception of a signal may be lost
        return Sweep(config, plan, tracker, console, command, handled).run(address)


def _send_late(config: SweepConfig, plan: Plan, summary: dict[str, Any], console: Console) -> None:
    from ftd_ray.publish import send_late  # brings matplotlib

    waiting = summary["mlflow"]["waiting"]
    tracker = open_tracker(config, dry_run=False)
    left = send_late(config, summary, lambda t: plan.expert_set(t.params), tracker)
    said = f"{left} entries are still waiting" if left else "and it has everything now"
    console.print(
        f"mlflow     had not got {waiting} entries at the end of the sweep, {said}",
        soft_wrap=True,
        markup=False,
    )


def _resume_command(args: argparse.Namespace) -> str:
    words = [".venv/bin/python" if ".venv" in sys.executable else "python", "-m", "ftd_ray.sweep"]
    words += [args.file, *args.overrides]
    if args.address:
        words += ["--address", args.address]
    return shlex.join([*words, "--resume"])


if __name__ == "__main__":
    sys.exit(main())
