"""Runs the tests on lanes beside each other.

python tests/run_lanes.py quick|heavy [arguments of pytest ...]

Each lane runs one process of pytest after another: on a file of heavy tests, or on a few files of
quick ones. Lanes share no fixture, no port and no Ray; whichever is free takes the next files, the
longest first. Beside them runs what only waits. Arguments that name tests are run alone, in one
process.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
WAITING = "test_ray_storage_faults.py"
"""Waits for timeouts, and takes next to no CPU."""
LONGEST = [
    "test_lab_cluster.py",
    "test_cluster_image.py",
    "test_ray_fleet.py",
    "test_ray_kills.py",
    "test_ray_chaos.py",
    "test_ray_sweep.py",
    "test_ray_config.py",
    "test_ray_budgets.py",
    "test_ray_shipping.py",
    "test_ray_mlflow_ui.py",
    "test_ray_tracking.py",
    "test_ray_experts.py",
]
"""Files that begin, in this order; all others come after them."""
LANES = {"quick": 2, "heavy": 3}
"""Beside the one of what waits. Much of what heavy tests take is Ray's starting and its waiting."""
QUICK = 6
"""Processes that quick tests are spread over: each takes seconds to import everything."""
NOTHING_FOUND = 5
"""pytest's exit code when its arguments leave no test."""
PYTEST = [sys.executable, "-m", "pytest", "--durations=15", "--durations-min=1"]
MARKED = {
    "quick": ["-m", "not heavy"],
    "heavy": ["-m", "heavy", "--timeout", "900"],
}


class Lanes:
    """Processes of pytest beside each other, and their exit codes."""

    def __init__(self, command: list[str]) -> None:
        self.codes: list[int] = []
        self._command = command
        self._lock = threading.Lock()

    def run(self, queue: list[list[str]], folder: Path) -> None:
        """Takes files from the queue until none are left; ``folder`` has what Ray and ftd keep."""
        cache = folder / "cache"
        cache.mkdir(parents=True)
        env = {"FTD_CACHE": str(cache)} | os.environ | {"RAY_TMPDIR": str(folder)}
        while True:
            with self._lock:
                if not queue:
                    return
                files = queue.pop(0)
            began = time.monotonic()
            ran = subprocess.run(
                [*self._command, *(str(TESTS / file) for file in files)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            with self._lock:
                self.codes.append(ran.returncode)
                took = f"{time.monotonic() - began:.0f} s"
                print(f"--- {', '.join(files)}, {took}\n{ran.stdout}", flush=True)


def files_of(kind: str) -> list[list[str]]:
    """What to run by one process each, the longest first."""
    found = [p for p in TESTS.glob("test_*.py") if p.name != WAITING]
    if kind == "heavy":
        found = [p for p in found if "mark.heavy" in p.read_text()]
    names = sorted(p.name for p in found)
    names.sort(key=lambda f: LONGEST.index(f) if f in LONGEST else len(LONGEST))
    return [[f] for f in names] if kind == "heavy" else [names[i::QUICK] for i in range(QUICK)]


def main(kind: str, arguments: Sequence[str]) -> int:
    command = [*PYTEST, *MARKED[kind], *arguments]
    if any(Path(a.partition("::")[0]).exists() for a in arguments):
        return subprocess.run(command).returncode
    lanes = Lanes(command)
    queues = [[[WAITING]], *[files_of(kind)] * LANES[kind]]
    with tempfile.TemporaryDirectory(prefix="lanes-", ignore_cleanup_errors=True) as folder:
        threads = [
            threading.Thread(target=lanes.run, args=(queue, Path(folder, str(i))))
            for i, queue in enumerate(queues)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    failed = [code for code in lanes.codes if code not in (0, NOTHING_FOUND)]
    return failed[0] if failed else min(lanes.codes)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["quick"], ["heavy"]):
        sys.exit(f"usage: {sys.argv[0]} quick|heavy [arguments of pytest ...]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
