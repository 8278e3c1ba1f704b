"""Who may use a cluster: nobody without its token, and from elsewhere nobody at all if it is local.

The strangers here are real: other processes without the token, or with another one, and calls of
gRPC by hand to every port that listens.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from grpc_helpers import OK, UNAUTHENTICATED, UNIMPLEMENTED, grpc_status
from ray_helpers import environment, running_sweep, tiny, wait_until, write_sweep
from s3_helpers import free_port

import ftd_ray.experts.__main__ as experts
import ftd_ray.new.__main__ as new
from ftd.errors import UserError
from ftd_ray import sweep
from ftd_ray.command import ray_address
from ftd_ray.local import LOOPBACK, MODE, TOKEN, TOKEN_PATH, ask_for_token
from ftd_ray.ui import serving

CALLS = {
    "gcs": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "objects": "/ray.rpc.ObjectManagerService/Pull",
    "worker": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
}
"""A call that each kind of server takes, if only from those who have the token."""

STRANGER = """
import os, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
ray.get(ray.remote(lambda: os.getpid()).options(num_cpus=0).remote(), timeout=60)
print("a task ran")
"""


# --- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [sweep.main, experts.main, new.main])
@pytest.mark.parametrize("source", ["--address", "RAY_ADDRESS"])
def test_address_of_ray_client_is_refused_with_the_remedy(
    main, source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path)
    given = ["--address", "ray://head:10001"] if source == "--address" else []
    monkeypatch.setenv("RAY_ADDRESS", "auto" if given else "ray://head:10001")
    what = "digits" if main is new.main else "sweep.yaml"
    assert main([what, *given]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{source}=ray://head:10001" in said.err
    assert "`ray job submit`" in said.err and "--address auto" in said.err
    assert os.listdir(tmp_path) == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [
        (None, None, None),
        (None, "", None),
        (None, "auto", "auto"),
        ("head:6379", "auto", "head:6379"),
        (None, "local", None),
        ("local", "auto", None),
    ],
)
def test_address_is_what_is_given_or_the_variable_or_none(given, variable, address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_address(given) == address


def test_address_of_a_job_server_is_no_address_of_a_driver():
    with pytest.raises(UserError, match="not through http://"):
        ray_address("http://127.0.0.1:8265")


# --- the token ------------------------------------------------------------------------------


@pytest.fixture
def nothing_said(monkeypatch, tmp_path) -> Path:
    """A user who has said nothing of Ray's authentication; his home."""
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def said() -> dict[str, str]:
    return {k: os.environ[k] for k in (MODE, TOKEN, TOKEN_PATH) if k in os.environ}


def test_token_is_made_for_the_run_and_kept_for_it(nothing_said, monkeypatch):
    ask_for_token()
    first = os.environ[TOKEN]
    assert re.fullmatch("[0-9a-f]{64}", first)
    ask_for_token()
    assert os.environ[TOKEN] == first
    monkeypatch.delenv(TOKEN)
    ask_for_token()
    assert os.environ[TOKEN] != first
    assert os.listdir(nothing_said) == []


@pytest.mark.parametrize(
    "words", [{MODE: "disabled"}, {TOKEN: "mine"}, {MODE: "token", TOKEN_PATH: "/my/token"}]
)
def test_what_the_user_said_of_authentication_stays(nothing_said, monkeypatch, words):
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    ask_for_token()
    assert said() == words


def test_user_who_asks_for_a_token_is_given_his_own_or_one_of_the_run(nothing_said, monkeypatch):
    monkeypatch.setenv(MODE, "token")
    file = nothing_said / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("mine")
    ask_for_token()
    assert said() == {MODE: "token"}
    file.unlink()
    ask_for_token()
    assert said().keys() == {MODE, TOKEN}
    assert os.listdir(file.parent) == []


# --- strangers ------------------------------------------------------------------------------


def stranger(address: str, home: Path, **said: str) -> tuple[bool, str]:
    """Whether a process that has only what is ``said`` runs a task there, and its words."""
    nothing = dict.fromkeys((MODE, TOKEN, TOKEN_PATH))
    env = environment(**nothing) | {"HOME": str(home)} | said
    if address.startswith("127."):
        env[LOOPBACK] = "0"  # else Ray looks for it at this machine's other address
    command = [sys.executable, "-c", STRANGER, address]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    return "a task ran" in ran.stdout, ran.stdout + ran.stderr


def assert_refuses_strangers(address: str, home: Path) -> None:
    for said in ({}, {MODE: "token", TOKEN: "0" * 64}):
        ran, words = stranger(address, home, **said)
        assert not ran and "InvalidAuthToken" in words, words
    port = int(address.rpartition(":")[2])
    assert grpc_status(port, CALLS["gcs"]) == UNAUTHENTICATED
    assert grpc_status(port, CALLS["gcs"], authorization=f"Bearer {'0' * 64}") == UNAUTHENTICATED


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) of every socket on which a process waits for others."""
    with contextlib.suppress(psutil.Error):
        found = process.net_connections("inet")
        return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}
    return set()


def kind_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())
        for kind, sign in {"gcs": "gcs_server", "raylet": "raylet/raylet"}.items():
            if sign in title.split(" ")[0]:
                return kind
        return "agent" if "Agent" in title else "worker"
    return "gone"


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_local_sweep_is_its_own_users_alone(tmp_path):
    write_sweep(tmp_path, tiny(distill__iterations=100_000, evaluate__every=200, search__trials=1))
    home = tmp_path / "home"
    home.mkdir()
    nothing = dict.fromkeys((MODE, TOKEN, TOKEN_PATH))
    env = environment(**nothing) | {"HOME": str(home), "RAY_TMPDIR": tempfile.mkdtemp()}
    with running_sweep(tmp_path, "sweep.yaml", env=env) as process:
        output = tmp_path / "stdout.txt"
        wait_until("a report", lambda: "step   200" in output.read_text(), seconds=400)
        driver = psutil.Process(process.pid)
        tree = [driver, *driver.children(recursive=True)]
        sockets = {p: listening(p) for p in tree}
        places = {ip.removeprefix("::ffff:") for found in sockets.values() for ip, _ in found}
        assert places == {"127.0.0.1"}

        (gcs,) = (p for p in tree if kind_of(p) == "gcs")
        token = gcs.environ()[TOKEN]
        assert re.fullmatch("[0-9a-f]{64}", token)
        assert not any(token in " ".join(p.cmdline()) for p in tree if p.is_running())
        assert Path(f"/proc/{gcs.pid}/environ").stat().st_mode & 0o777 == 0o400
        assert list(home.rglob("*token*")) == []
        written = [p for p in Path(env["RAY_TMPDIR"]).rglob("*") if p.is_file()]
        assert len(written) > 5
        assert not any(token.encode() in p.read_bytes() for p in written)

        ((_, port),) = sockets[gcs]
        assert_refuses_strangers(f"127.0.0.1:{port}", home)
        answers: dict[str, set[str]] = {}
        for p, found in sockets.items():
            for _, port in found:
                if kind_of(p) == "agent":
                    assert http_status(port, "/get_or_create_runtime_env") in (401, 403)
                else:
                    said = {method: grpc_status(port, method) for method in CALLS.values()}
                    assert set(said.values()) <= {UNAUTHENTICATED, UNIMPLEMENTED}
                    refused = {m for m, status in said.items() if status == UNAUTHENTICATED}
                    answers.setdefault(kind_of(p), set()).update(refused)
        assert answers["gcs"] >= {CALLS["gcs"]}
        assert answers["raylet"] >= {CALLS["raylet"], CALLS["objects"]}
        assert answers["worker"] >= {CALLS["worker"]}
        allowed = f"Bearer {token}"
        assert grpc_status(port_of(gcs), CALLS["gcs"], authorization=allowed) == OK
        assert process.poll() is None  # nothing of all this did it any harm


@pytest.mark.heavy
def test_page_of_mlflow_is_on_this_machine_alone(tmp_path):
    port = free_port()
    with serving(f"sqlite:///{tmp_path / 'mlflow.db'}", port) as server:
        wait_until("MLflow's server", server.answers, seconds=180, every=0.2)
        below = psutil.Process().children(recursive=True)
        assert {place for p in below for place in listening(p)} == {("127.0.0.1", port)}


def port_of(process: psutil.Process) -> int:
    ((_, port),) = listening(process)
    return port


def http_status(port: int, path: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=b"", method="POST")
    try:
        return int(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_cluster_of_the_tests_refuses_strangers(tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        assert_refuses_strangers(cluster.address, tmp_path)
        ours = {MODE: "token", TOKEN: os.environ[TOKEN]}
        ran, words = stranger(cluster.address, tmp_path, **ours)
        assert ran, words
    finally:
        cluster.shutdown()


@pytest.fixture
def started(tmp_path) -> Iterator[str]:
    """The address of a head that was started by ``ray start`` with the tests' token."""
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port", str(port), "--num-cpus", "1", "--include-dashboard", "false"]
    command += ["--disable-usage-stats", "--temp-dir", tempfile.mkdtemp(prefix="ray-")]
    with open(tmp_path / "start.txt", "w") as log:
        process = subprocess.Popen(
            command, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(
            "ray start",
            lambda: "--block" in (tmp_path / "start.txt").read_text() or process.poll() is not None,
            seconds=240,
        )
        assert process.poll() is None, (tmp_path / "start.txt").read_text()
        head = next(
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if kind_of(p) == "raylet"
        )
        ip = next(a for a in head.cmdline() if a.startswith("--node_ip_address=")).split("=")[1]
        yield f"{ip}:{port}"
    finally:
        for p in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                p.kill()
        process.wait(timeout=60)


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_cluster_that_was_started_by_hand_refuses_strangers_and_says_so(started, tmp_path):
    assert_refuses_strangers(started, tmp_path)
    write_sweep(tmp_path)
    env = environment(**dict.fromkeys((MODE, TOKEN, TOKEN_PATH))) | {"HOME": str(tmp_path)}
    with running_sweep(tmp_path, "sweep.yaml", "--address", started, env=env) as process:
        assert process.wait(timeout=240) == 2
    (line,) = (tmp_path / "stderr.txt").read_text().splitlines()
    assert started in line and "RAY_AUTH_MODE=token" in line
