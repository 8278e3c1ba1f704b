"""The command: python -m ftd_ray.new ROOT [key=value ...] [--hours H] [--out FILE] [--address A].

Looks at the images, measures the machine for about half a minute, and writes a sweep that fits the
hours. Exit codes: 0 the file is written, 2 usage, or images or hours that do not do.
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from ftd.data import DATASETS, DatasetConfig, describe
from ftd.data.inspection import inspect
from ftd.data.tables import parquet_files
from ftd.errors import UserError
from ftd.expert import Numerics
from ftd_ray.command import ADDRESS_HELP, exit_code, ray_address
from ftd_ray.config import apply_override, load_config, parse_config
from ftd_ray.folder import saved_sweep
from ftd_ray.local import listen_on_loopback
from ftd_ray.new.choice import PHOTOGRAPH, choose, scales_of
from ftd_ray.new.images import Images, images_of
from ftd_ray.new.pace import Pace, Task
from ftd_ray.new.page import page
from ftd_ray.new.programme import Scale, batch_size_for
from ftd_ray.new.text import chose, machine, measured, saw, written
from ftd_ray.reading import reading


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ftd_ray.new",
        description="Write a sweep for images that nothing was tuned on.",
        allow_abbrev=False,
    )
    parser.add_argument("root", help="folder of the images; or digits, which are bundled")
    parser.add_argument(
        "given",
        nargs="*",
        metavar="key=value",
        help="what the sweep is to have: keys of dataset, and distill.ipc",
    )
    parser.add_argument("--hours", type=float, default=1.0, help="that it may take (default 1)")
    parser.add_argument("--out", help="the file to write (default <folder's name>.yaml)")
    parser.add_argument("--address", help=ADDRESS_HELP)
    args = parser.parse_intermixed_args(argv)
    return exit_code("new", lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    address = ray_address(args.address)
    if not 0 < args.hours < float("inf"):
        raise UserError(f"--hours {args.hours:g} must be above 0, and finite.")
    out = Path(args.out or f"{Path(args.root).resolve().name or 'images'}.yaml")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("._-") or "images"
    _check_out(out, name)
    dataset, ipc = given(args.root, args.given, name)
    console = Console(highlight=False)
    waiting = console if console.is_terminal else Console(stderr=True)  # apart from what is said

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)

    likely = replace(dataset, resolution=dataset.resolution or PHOTOGRAPH)  # its pixels are kept
    with _readable(args.root), reading(waiting) as progress:
        images = images_of(dataset, inspect(likely, progress))
    scales = scales_of(images, ipc)
    say(*saw(images))
    if address is None:
        listen_on_loopback()
    from ftd_ray.new.stand import standing  # brings Ray

    with waiting.status("measuring, about half a minute"), standing(address) as stand:
        numerics = Numerics.on(stand.crew.device, stand.crew.cpus)
        say(machine(stand.crew, numerics))

        def measure(scale: Scale) -> Pace | None:
            pace = stand.pace(_task(scale, images, numerics))
            if pace is not None:
                say(measured(scale, pace, images))
            return pace

        choice = choose(images, scales, stand.crew, measure, args.hours)
    say(*chose(choice, scales, images))
    dataset = replace(images.dataset, resolution=choice.scale.resolution)
    with (
        _readable(args.root),
        reading(waiting) as progress,
    ):  # into the cache: the sweep has only to open it
        describe(dataset, progress)
    command = shlex.join(["python", "-m", "ftd_ray.new", args.root, *args.given])
    text = page(choice, images, name, f"{command} --hours {args.hours:g}", args.hours)
    write(out, text)
    say(*written(out, args.address, choice.crew))
    return 0


@contextlib.contextmanager
def _readable(root: str) -> Iterator[None]:
    """A folder or a table that its disk does not give is one clear line."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{root} cannot be read ({error}). Mend it, or take it out.") from error


def _check_out(out: Path, name: str) -> None:
    """Raises UserError when the file cannot become a sweep of that name."""
    if out.exists():
        raise UserError(f"{out} is there already. Give another file by --out, or remove it.")
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} of {out} does not exist. Make it first.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"the folder of {out} cannot be written. Give another file by --out.")
    folder = f"runs/{name}"
    if saved_sweep(folder) is not None:
        raise UserError(
            f"{folder} holds a sweep of that name already. Give another file by --out, which names "
            "the sweep."
        )


def _task(scale: Scale, images: Images, numerics: Numerics) -> Task:
    return Task(
        network=scale.network,
        channels=images.channels,
        resolution=scale.resolution,
        classes=images.classes,
        ipc=scale.ipc,
        batch_size=batch_size_for(sum(images.train)),
        images=len(images.found.sizes),
        augment=images.dataset.strategy,
        numerics=numerics,
    )


def write(out: Path, text: str) -> None:
    """Writes the file whole or not at all, and over no other. Raises UserError."""
    beside = out.with_name(f".{out.name}-{os.getpid()}")
    try:
        beside.write_text(text)
        load_config(beside)
        try:
            os.link(beside, out)
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            out.open("x").close()
            beside.replace(out)
    except FileExistsError:
        raise UserError(f"{out} is there now. Give another file by --out.") from None
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}. Give another file by --out."
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def given(root: str, overrides: Sequence[str], name: str) -> tuple[DatasetConfig, int | None]:
    """The data set, as far as it is said, and the images per class if that is."""
    distill: dict[str, Any] = {}
    dataset = _dataset(root)
    tree = {"name": name, "dataset": dataset, "distill": distill, "search": {"trials": 1}}
    for override in overrides:
        key = override.partition("=")[0]
        if key == "dataset.root" or not (key.startswith("dataset.") or key == "distill.ipc"):
            raise UserError(
                f"{override!r}: only keys of dataset and distill.ipc can be given; the rest is "
                "chosen. Change it in the file."
            )
        apply_override(tree, override)
    config = parse_config(tree)
    if config.space:
        raise UserError(
            f"{config.space[0].key} must have one value. Make it a dimension in the file."
        )
    return config.dataset, config.distill.ipc if distill else None


def _dataset(root: str) -> dict[str, str]:
    """How the data set of a folder, or of that name, is opened."""
    if os.path.isdir(root):
        return {"name": "parquet" if parquet_files(Path(root)) else "imagefolder", "root": root}
    bundled = [name for name, entry in DATASETS.items() if not entry.needs_root]
    if root in bundled:
        return {"name": root}
    raise UserError(
        f"{root} is no folder. Give the folder of the images, or {' or '.join(bundled)}, which are "
        "bundled."
    )


if __name__ == "__main__":
    sys.exit(main())
