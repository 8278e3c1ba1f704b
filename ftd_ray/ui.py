"""The command: python -m ftd_ray.ui [--port 5000] [--uri sqlite:///mlflow.db] [--no-browser].

Serves MLflow on this machine until Ctrl-C, and says where the newest sweep's trials are. Exit
codes: 0 after Ctrl-C or SIGTERM, 2 usage.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ftd.errors import UserError
from ftd_ray.command import exit_code
from ftd_ray.signals import Interrupted, signals

HOST = "127.0.0.1"
NEWEST = 5
"""Sweeps that are listed."""
START_SECONDS, END_SECONDS = 120, 10
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""Without the workers for language models, which take as long to start as all the rest."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ftd_ray.ui",
        description="MLflow in the browser, at the newest sweep.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--uri", default="sqlite:///mlflow.db", help="the database of the runs")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args(argv)
    return exit_code("ui", lambda: _main(args.uri, args.port, not args.no_browser))


def _main(uri: str, port: int, browser: bool) -> int:
    _check_database(uri)
    _check_port(port)
    with signals() as handled, serving(uri, port) as address, contextlib.suppress(Interrupted):
        from ftd_ray.tracking.pages import (
            newest_sweeps,  # takes seconds, in which the server starts
        )

        while not address.answers():
            handled.check()
            time.sleep(0.2)
        sweeps = newest_sweeps(address.url, NEWEST)
        if not sweeps:
            print(f"MLflow holds no sweep yet: {address.url}  (end with Ctrl-C)", flush=True)
        for i, sweep in enumerate(sweeps):
            best = "" if sweep.best is None else f", best validation {100 * sweep.best:.1f} %"
            place = f"{address.url}{sweep.path}"
            what = f"{sweep.name} of {sweep.began:%Y-%m-%d %H:%M}{best}: {place}"
            print(what if i else f"{what}  (end with Ctrl-C)", flush=True)
        if browser and has_display():
            webbrowser.open(address.url + (sweeps[0].path if sweeps else ""))
        while True:
            handled.check()
            address.check()
            time.sleep(0.2)
    return 0


class Server:
    """A running ``mlflow server``."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: IO[bytes]):
        self.url, self._process, self._log = url, process, log
        self._end = time.monotonic() + START_SECONDS

    def answers(self) -> bool:
        """Whether it is ready. Raises UserError when it will not be."""
        self.check()
        if time.monotonic() > self._end:
            raise UserError(f"MLflow did not start in {START_SECONDS} s. {self._last_words()}")
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        return False

    def check(self) -> None:
        """Raises UserError when the server is gone."""
        if (code := self._process.poll()) is not None:
            raise UserError(f"MLflow's server ended with code {code}. {self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return f"It says: {next((line for line in reversed(lines) if line), 'nothing')}"


@contextlib.contextmanager
def serving(uri: str, port: int) -> Iterator[Server]:
    """MLflow's own server as a child, which ends with us; what it says goes to a file."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | LEAN, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield Server(f"http://{HOST}:{port}", process, log)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers, which are a group of their own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def has_display() -> bool:
    """Whether a browser could be seen."""
    return sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def _check_database(uri: str) -> None:
    if uri.startswith(("http:", "https:")):
        raise UserError(f"--uri {uri} is a server already. Open it in a browser.")
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists():
        raise UserError(
            f"--uri {uri}: there is no file {path}. Run a sweep first (make sweep), or name the "
            "database that sweeps were tracked in."
        )


def _check_port(port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--port {port} cannot be had ({error}). End what listens there, or give another: "
                f"make ui PORT={port + 1}."
            ) from error


if __name__ == "__main__":
    sys.exit(main())
