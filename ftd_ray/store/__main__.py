"""The command: python -m ftd_ray.store ls | verify | gc | show, for a store on any filesystem.

Exit codes: 0 done, 1 ``verify`` found damage that is still there, 2 usage, or no store at that
place, 128 + signal after an interrupt. It starts neither Ray nor PyTorch.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ftd.errors import UserError
from ftd.trajectory import DamagedError
from ftd_ray.command import exit_code
from ftd_ray.store.checking import check
from ftd_ray.store.cleaning import clean, plan_cleaning
from ftd_ray.store.inventory import READERS, reached, take_inventory
from ftd_ray.store.tables import (
    History,
    inventory_json,
    print_cleaning,
    print_inventory,
    print_set,
    say,
)
from ftd_ray.store.text import parse_size, plural, size_text

PIPE_WIDTH = 160
"""Columns where the output is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return exit_code("store", lambda: int(args.run(args, console)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ftd_ray.store",
        description="Look after a trajectory store: a path, s3:// or gs://.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="ls | verify | gc | show")

    ls = commands.add_parser("ls", help="what the store holds", allow_abbrev=False)
    ls.add_argument("--json", action="store_true", help="for scripts")
    ls.set_defaults(run=_ls)

    verify = commands.add_parser("verify", help="read every byte", allow_abbrev=False)
    verify.add_argument("--key", help="this set only; a prefix will do")
    verify.add_argument(
        "--repair", action="store_true", help="move damaged experts away, to be trained again"
    )
    verify.set_defaults(run=_verify)

    gc = commands.add_parser("gc", help="make room", allow_abbrev=False)
    which = gc.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--keep-days", type=_days, metavar="N", help="delete sets that nobody used for N days"
    )
    which.add_argument(
        "--max-bytes", metavar="N", help="delete the least recently used above N, as in 20GB"
    )
    gc.add_argument("--yes", action="store_true", help="do it; otherwise it is only shown")
    gc.set_defaults(run=_gc)

    show = commands.add_parser("show", help="one set and its curves", allow_abbrev=False)
    show.add_argument("key", metavar="KEY", help="of the set; a unique prefix will do")
    show.set_defaults(run=_show)

    for command in (ls, verify, gc, show):
        command.add_argument("uri", metavar="URI", nargs="?", default="./store")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise ValueError
    return days


def _ls(args: argparse.Namespace, console: Console) -> int:
    store = take_inventory(args.uri)
    if args.json:
        print(json.dumps(inventory_json(store, time.time()), indent=1))
    else:
        print_inventory(console, store, time.time())
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    store = take_inventory(args.uri, args.key)
    if args.key is not None:
        store.foreign, store.leftovers = [], []
    total = sum(e.bytes for s in store.sets for e in s.experts.values())
    progress = Progress(
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    found = Counter[str]()
    mended = 0
    with reached(args.uri), progress:
        task = progress.add_task("", total=total)
        for finding in check(
            store, repair=args.repair, done=lambda size: progress.advance(task, size)
        ):
            found["damaged" if finding.is_damage else finding.kind] += 1
            mended += finding.mended
            style = "red" if finding.is_damage else "yellow" if finding.kind == "newer" else ""
            say(progress.console, f"{finding.kind:10} {finding.where}: {finding.text}", style)
    experts = sum(len(s.experts) for s in store.sets)
    counts = [f"{found['damaged']} damaged" if found["damaged"] else "no damage"]
    if args.repair and found["damaged"]:
        counts.append(f"{mended} moved to quarantine, to be trained again when they are needed")
    counts += [f"{n} {kind}" for kind, n in sorted(found.items()) if kind != "damaged"]
    what = f"{plural(len(store.sets), 'set')}, {plural(experts, 'expert')}, {size_text(total)}"
    say(console, f"{what}: {', '.join(counts)}", "bold")
    if found["damaged"] > mended and not args.repair:
        say(console, "`verify --repair` moves what is damaged to quarantine.")
    return 1 if found["damaged"] > mended else 0


def _gc(args: argparse.Namespace, console: Console) -> int:
    limit = None if args.max_bytes is None else parse_size(args.max_bytes)
    store = take_inventory(args.uri)
    now = time.time()
    plan = plan_cleaning(store, now, keep_days=args.keep_days, max_bytes=limit)
    print_cleaning(console, plan, now)
    sizes = f"{size_text(plan.bytes)} of {size_text(plan.before)}"
    if not plan.removals:
        say(console, f"nothing to delete in {args.uri}, which takes {size_text(plan.before)}")
    elif not args.yes:
        say(console, f"would free {sizes}. Dry run: add --yes", "bold")
    else:
        freed = 0
        with reached(args.uri, "cleaned"):
            for removal, stays in clean(store, plan, now):
                freed += removal.bytes if stays is None else 0
                if stays is not None:
                    say(console, f"{removal.name or args.uri} stays after all: {stays}")
        say(console, f"freed {size_text(freed)} of {size_text(plan.before)}", "bold")
    return 0


def _show(args: argparse.Namespace, console: Console) -> int:
    store = take_inventory(args.uri, args.key)
    if len(store.sets) > 1:
        keys = ", ".join(s.key for s in store.sets[:5])
        raise UserError(f"{args.key} begins several keys ({keys}). Give more of it.")
    (entry,) = store.sets
    if entry.experts_set is None or entry.state != "whole":
        raise UserError(entry.problem or f"{args.uri} holds nothing of set {entry.key} yet.")
    histories: dict[int, History] = {}
    unread: dict[int, str] = {}
    indices = [e.index for e in entry.published]
    with reached(args.uri), ThreadPoolExecutor(READERS) as pool:
        for index, future in [(i, pool.submit(entry.experts_set.history, i)) for i in indices]:
            try:
                histories[index] = future.result()
            except DamagedError as error:
                unread[index] = str(error)
    print_set(console, entry, histories, unread, time.time())
    return 0


if __name__ == "__main__":
    sys.exit(main())
