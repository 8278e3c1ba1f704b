"""A store that fails in the middle of a sweep ends the sweep, not its trials."""

import pytest
from disk_helpers import choke
from ray_helpers import (
    finished,
    mlflow_runs,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

LONG = tiny(
    experts__rho=0.01,
    experts__count=2,
    experts__epochs=20,
    experts__batch_size=8,
    search__trials=2,
)


@pytest.mark.heavy
def test_full_disk_under_the_store_halts_the_sweep_and_resume_goes_on(tmp_path, small_disk):
    write_sweep(tmp_path, LONG)
    store = f"store.uri={small_disk}/store"
    with running_sweep(tmp_path, "sweep.yaml", store) as process:
        wait_until("a first part", lambda: list((small_disk / "store").rglob("part-*")))
        ballast = choke(small_disk)
        code = process.wait(timeout=120)
    ran = finished(tmp_path, code)
    assert ran.code == 2, ran.out
    (line,) = ran.err.strip().splitlines()
    assert "No space left on device" in line and "store.uri" in line
    assert "--resume" in ran.out
    summary = summary_of(tmp_path)
    assert summary["state"] == "interrupted"
    assert summary["trials"]["failed"] == 0
    assert all(r.info.status != "RUNNING" for r in mlflow_runs(tmp_path))
    ballast.unlink()
    ran = run_sweep(tmp_path, "sweep.yaml", store, "--resume")
    assert ran.code == 0, ran.err
    assert summary_of(tmp_path)["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
