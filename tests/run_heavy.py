"""Runs the heavy tests: those that mostly wait for timeouts beside all others.

python tests/run_heavy.py [arguments of pytest ...]
"""

import subprocess
import sys
import tempfile

WAITING = "tests/test_ray_storage_faults.py"
NOTHING_FOUND = 5
"""pytest's exit code when its arguments leave no test."""


def main() -> int:
    command = [sys.executable, "-m", "pytest", "-m", "heavy", "--timeout", "900", *sys.argv[1:]]
    with tempfile.TemporaryFile("w+") as said:
        waiting = subprocess.Popen([*command, WAITING], stdout=said, stderr=subprocess.STDOUT)
        others = subprocess.run([*command, "--ignore", WAITING]).returncode
        codes = [others, waiting.wait()]
        said.seek(0)
        print(f"--- {WAITING}\n{said.read()}", flush=True)
    failed = [code for code in codes if code not in (0, NOTHING_FOUND)]
    return failed[0] if failed else max(0, min(codes))


if __name__ == "__main__":
    sys.exit(main())
