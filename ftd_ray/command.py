"""What the commands have in common: exit codes, checks before work, the tracker."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ftd.errors import UserError
from ftd_ray.signals import Interrupted
from ftd_ray.storage import probe

if TYPE_CHECKING:
    from ftd_ray.config import SweepConfig
    from ftd_ray.plan import Plan


ADDRESS_HELP = "of a Ray cluster, auto or HOST:PORT; else RAY_ADDRESS, else a local one"


def sweep_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command that works on a sweep's file; read by ``parse_intermixed_args``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, allow_abbrev=False
    )
    parser.add_argument("file", help="the sweep, as in sweeps/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values in place of the file's"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--address", help=ADDRESS_HELP)
    return parser


def ray_address(given: str | None) -> str | None:
    """Of the cluster: ``given``, else RAY_ADDRESS; None for a local one that is to be started.

    Raises UserError for addresses through which a driver cannot work.
    """
    source, address = ("--address", given) if given else ("RAY_ADDRESS", os.getenv("RAY_ADDRESS"))
    if address and "://" in address:
        raise UserError(
            f"{source}={address}: a driver works beside its cluster, not through "
            f"{address.partition('://')[0]}://. Run this command on the head with --address auto, "
            "by `ray job submit` or `ray exec`."
        )
    return address if address not in ("", "local") else None


def exit_code(name: str, command: Callable[[], int]) -> int:
    """Runs a command: its own code, 2 and one line for a user's mistake, 128 + signal."""
    try:
        return command()
    except UserError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        return 128 + interrupt.signum
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


@contextlib.contextmanager
def reachable(config: "SweepConfig") -> Iterator[None]:
    """Files and servers that do not answer while the plan is made are one clear line."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:  # of a data set, the store or the output
        raise UserError(
            f"a file or a server does not answer ({error}). Check dataset.root, "
            f"store.uri={config.store.uri} and output.dir={config.output_dir}."
        ) from error


def open_tracker(config: "SweepConfig", *, dry_run: bool) -> Any:
    """The tracker, once its server has answered; a dry run makes no database."""
    from ftd_ray.tracking.database import create_database
    from ftd_ray.tracking.tracker import Tracker

    artifacts = None
    prefix = "sqlite:///"
    if config.tracking.uri.startswith(prefix):
        folder = os.path.dirname(config.tracking.uri.removeprefix(prefix)) or "."
        probe(folder, "tracking.uri")
        if dry_run:
            return None
        os.makedirs(folder, exist_ok=True)
        create_database(config.tracking.uri.removeprefix(prefix).partition("?")[0])
        artifacts = os.path.join(folder, "mlartifacts", config.experiment)
    return Tracker(config.tracking.uri, config.experiment, artifacts)


def check_room(plan: "Plan", missing: list[str]) -> None:
    """Raises UserError when the disk or this machine (``missing``, if any) does not suffice."""
    free = plan.disk_free()
    if free is not None and plan.bytes_missing > free:
        raise UserError(
            f"store.uri={plan.config.store.uri} has {free / 1e9:.1f} GB free, and the experts to "
            f"build take {plan.bytes_missing / 1e9:.1f} GB. Make room, or lower experts.count "
            "or experts.epochs."
        )
    if missing:
        raise UserError(
            f"{missing[0]} on this machine. Lower resources.*, or give the --address of a cluster."
        )
