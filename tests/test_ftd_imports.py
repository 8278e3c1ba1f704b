"""The algorithm stands alone: nothing of the sweep is pulled in by it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ftd

PACKAGE = Path(ftd.__file__).parent
MODULES = sorted(
    "ftd." + ".".join(f.relative_to(PACKAGE).with_suffix("").parts)
    for f in PACKAGE.rglob("*.py")
    if f.name != "__init__.py"
)
FOREIGN = {"ray", "mlflow", "optuna", "pydantic", "ftd_ray"}


def test_importing_every_module_pulls_in_nothing_of_the_sweep() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "sys.stdout.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"ftd", "torch"} <= loaded
    assert not loaded & FOREIGN


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_the_sweep_even_later(name: str) -> None:
    """Imports inside functions, too, which a first import does not show."""
    path = PACKAGE.parent / Path(*name.split(".")).with_suffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & FOREIGN


def test_reading_trajectories_needs_no_torch() -> None:
    code = "import sys, ftd.trajectory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
