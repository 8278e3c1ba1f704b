"""MLflow's database comes back from the bucket, and data sets come from there."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_helpers import wait_until
from s3_helpers import S3Server, free_port, s3_environment

from ftd_ray.storage import read_bytes

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "clusters"


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CLUSTERS / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows(database: Path) -> list[int]:
    with sqlite3.connect(database) as connection:
        return [row[0] for row in connection.execute("SELECT x FROM t ORDER BY x")]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "mlflow.db"
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t (x INTEGER)")
    connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(100)])
    connection.commit()
    connection.close()
    return path


def test_a_copy_has_what_is_written_and_nothing_of_what_is_being_written(
    database: Path, tmp_path: Path
) -> None:
    writer = sqlite3.connect(database)
    writer.execute("INSERT INTO t VALUES (1000)")  # not committed
    saved = script("backup.py", "save", database, tmp_path / "bucket")
    writer.commit()
    writer.close()
    assert saved.returncode == 0, saved.stderr
    assert rows(tmp_path / "bucket" / "mlflow.db") == list(range(100))


def test_a_new_machine_gets_the_copy(database: Path, tmp_path: Path) -> None:
    script("backup.py", "save", database, tmp_path / "bucket")
    new = tmp_path / "new" / "mlflow.db"
    restored = script("backup.py", "restore", new, tmp_path / "bucket")
    assert restored.returncode == 0 and "restored from" in restored.stdout
    assert rows(new) == list(range(100))


def test_a_database_that_is_there_is_never_replaced(database: Path, tmp_path: Path) -> None:
    script("backup.py", "save", database, tmp_path / "bucket")
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM t WHERE x > 0")
    connection.close()
    restored = script("backup.py", "restore", database, tmp_path / "bucket")
    assert restored.returncode == 0 and "stays" in restored.stdout
    assert rows(database) == [0]


def test_the_first_start_has_nothing_to_restore(tmp_path: Path) -> None:
    restored = script("backup.py", "restore", tmp_path / "mlflow.db", tmp_path / "bucket")
    assert restored.returncode == 0 and "nothing to restore" in restored.stdout
    assert not (tmp_path / "mlflow.db").exists()


def test_copies_end_with_what_they_are_made_beside_after_a_last_one(
    database: Path, tmp_path: Path
) -> None:
    ray = socket.create_server(("127.0.0.1", 0))
    beside = ("--beside", str(ray.getsockname()[1]), "--patience", "1", "--every", "300")
    copy = tmp_path / "bucket" / "mlflow.db"
    command = [sys.executable, str(CLUSTERS / "backup.py"), "watch", database, copy.parent, *beside]
    watch = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_until("a copy", copy.exists, seconds=60)
        with sqlite3.connect(database) as connection:
            connection.execute("INSERT INTO t VALUES (1000)")
        connection.close()
        assert watch.poll() is None
        ray.close()
        assert watch.wait(timeout=60) == 0
    finally:
        watch.kill()
    assert rows(copy)[-1] == 1000


def test_a_place_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    said = script("backup.py", "restore", tmp_path / "mlflow.db", "nowhere://bucket")
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1 and said.stderr.startswith("backup: nowhere://")


def test_a_data_set_comes_whole_and_only_once(tmp_path: Path) -> None:
    source, target = tmp_path / "bucket" / "pets", tmp_path / "data"
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    first = script("fetch.py", source, target)
    assert "3 files" in first.stdout and "3 of them fetched now" in first.stdout
    assert (target / "dog" / "1.jpg").read_bytes() == b"dog/1.jpg"
    (target / "cat" / "2.jpg").write_bytes(b"cut")  # as an interrupted one would be
    assert "1 of them fetched now" in script("fetch.py", source, target).stdout
    assert (target / "cat" / "2.jpg").read_bytes() == b"cat/2.jpg"


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    said = script("fetch.py", tmp_path / "none", tmp_path / "data")
    assert said.returncode == 2
    assert said.stderr.startswith("fetch: there are no files at ")


@pytest.fixture
def s3() -> Iterator[str]:
    with S3Server("ftd") as server:
        yield server.address


def call(port: int, path: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


class Head:
    """A machine on which mlflow.sh has been run: a home, a port and a session of processes."""

    def __init__(self, home: Path, address: str) -> None:
        home.mkdir()
        self.port = free_port()
        self._home = home
        self._environment = os.environ | s3_environment(address)
        self._environment |= {
            "HOME": str(home),
            "PORT": str(self.port),
            "EVERY": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        ran = subprocess.run(
            ["bash", str(CLUSTERS / "mlflow.sh"), "s3://ftd/mlflow"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        logs = [p.read_text()[-2000:] for p in self._home.glob("*.log")]
        assert ran.returncode == 0, (ran.stderr, logs)

    def processes(self) -> list[int]:
        """Those whose home this is."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                mine = f"HOME={self._home}\0".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if mine and entry.name.isdigit():
                found.append(int(entry.name))
        return found

    def power_off(self) -> None:
        deadline = time.monotonic() + 60
        while pids := self.processes():
            assert time.monotonic() < deadline
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.2)
        shutil.rmtree(self._home)


@pytest.mark.heavy
def test_a_new_head_goes_on_with_the_runs_of_the_lost_one(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3_environment(s3).items():
        monkeypatch.setenv(key, value)
    first = Head(tmp_path / "first", s3)
    try:
        first.start()
        before = len(first.processes())
        first.start()  # `ray up` a second time
        assert len(first.processes()) == before
        experiment = call(
            first.port, "/api/2.0/mlflow/experiments/create", {"name": "of the lost head"}
        )["experiment_id"]

        def copied() -> bool:
            return b"of the lost head" in (read_bytes("s3://ftd/mlflow/mlflow.db") or b"")

        wait_until("a copy with the new experiment", copied, seconds=120)
    finally:
        first.power_off()
    second = Head(tmp_path / "second", s3)
    try:
        second.start()
        found = call(second.port, f"/api/2.0/mlflow/experiments/get?experiment_id={experiment}")[
            "experiment"
        ]
        assert found["name"] == "of the lost head"
        assert found["artifact_location"].startswith("mlflow-artifacts:/")
    finally:
        second.power_off()
