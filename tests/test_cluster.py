"""What stands in cluster.yaml and the Dockerfile agrees with Ray's schema and with this project.

No cloud and no Docker is needed: Ray's launcher validates a file before it talks to anyone.
"""

import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
SETUP = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
)
START = ("head_start_ray_commands", "worker_start_ray_commands")
NIGHTLY = re.compile(r"nightly|\.dev\d|ray-wheels|ray:latest|--pre\b")


@pytest.fixture
def written() -> dict:
    """The file as it is read."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def prepared(written: dict) -> dict:
    """The file as `ray up` uses it: Ray's defaults stand where it says nothing."""
    return prepare_config(written)


@pytest.fixture
def image(written: dict) -> re.Match:
    match = re.fullmatch(
        r"rayproject/ray:(?P<ray>\d+\.\d+\.\d+)-py3(?P<minor>\d+)(-gpu|-cu\d+)",
        written["docker"]["image"],
    )
    assert match, f"not a release image for GPUs: {written['docker']['image']}"
    return match


@pytest.fixture
def requires_python() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return SpecifierSet(project["requires-python"])


def dockerfile(instruction: str) -> list[list[str]]:
    """The arguments of every such instruction, without its options."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = [line[1:] for line in lines if line and line[0] == instruction]
    return [[word for word in words if not word.startswith("--")] for words in found]


def copied() -> list[str]:
    return [source for words in dockerfile("COPY") for source in words[:-1]]


def test_cluster_file_passes_rays_own_schema(prepared):
    validate_config(prepared)


def test_schema_refuses_an_unknown_key(written):
    with pytest.raises(jsonschema.ValidationError, match="no_such_key"):
        validate_config(prepare_config(written | {"no_such_key": 1}))


def test_head_has_no_gpu_workers_and_workers_scale_from_zero_to_eight(prepared):
    types = prepared["available_node_types"]
    assert types.pop(prepared["head_node_type"])["max_workers"] == 0
    assert [(t["min_workers"], t["max_workers"]) for t in types.values()] == [(0, 8)]
    assert prepared["max_workers"] == 8


def test_image_holds_the_pinned_ray(image):
    pins = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pins == [image["ray"]]


def test_image_has_a_python_that_the_project_accepts(image, requires_python):
    assert requires_python.contains(f"3.{image['minor']}")


@pytest.mark.parametrize("stage", SETUP)
def test_no_setup_command_installs_a_nightly(prepared, stage):
    assert not [c for c in prepared[stage] if NIGHTLY.search(c)]


def test_rays_own_setup_commands_would_install_a_nightly():
    default = prepare_config({"cluster_name": "default", "provider": {"type": "aws"}})
    assert any(NIGHTLY.search(c) for c in default["setup_commands"])


def test_every_node_installs_the_mounted_checkout_as_pinned(prepared):
    assert prepared["file_mounts"]["/home/ray/ftd-ray"] == "."
    install = "cd ~/ftd-ray && pip install -c constraints.txt -e ."
    assert install in prepared["head_setup_commands"]
    assert install in prepared["worker_setup_commands"]


@pytest.mark.parametrize("name", [".venv", "runs", "store", ".git", "mlflow.db*"])
def test_checkout_is_mounted_without_what_is_local_to_it(written, name):
    # With a slash, for rsync: at the top of the mount only.
    assert f"/{name}" in written["rsync_exclude"]


@pytest.mark.parametrize("stage", START)
def test_every_ray_start_states_its_authentication(written, stage):
    starts = [c for c in written[stage] if "ray start" in c]
    assert len(starts) == 1
    assert "RAY_AUTH_MODE=token ray start" in starts[0]


def test_token_is_on_every_node_and_commands_in_the_container_use_it(written):
    assert written["file_mounts"]["/home/ray/.ray"] == "~/.ray"
    assert "--env RAY_AUTH_MODE=token" in written["docker"]["run_options"]


def test_mlflow_listens_on_the_head_alone(written):
    serve = [c for c in written["head_start_ray_commands"] if "mlflow server" in c]
    assert len(serve) == 1
    assert "--host 127.0.0.1 --port 5000" in serve[0]
    assert not any("mlflow" in c for c in written["worker_start_ray_commands"])


def test_everything_the_dockerfile_copies_is_here():
    assert copied()
    assert not [source for source in copied() if not (ROOT / source).exists()]


def test_dockerignore_lets_through_what_the_dockerfile_copies():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert sorted(r[1:] for r in rules if r.startswith("!")) == sorted(copied())


def test_dockerfile_has_a_python_that_the_project_accepts(requires_python):
    [[base]] = dockerfile("FROM")
    match = re.fullmatch(r"python:(3\.\d+)-slim", base)
    assert match
    assert requires_python.contains(match[1])


def test_dockerfile_runs_as_an_ordinary_user_in_its_volume():
    assert dockerfile("USER")[-1] not in ([], ["root"], ["0"])
    assert [dockerfile("WORKDIR")[-1]] == dockerfile("VOLUME") == [["/work"]]


def test_dockerfile_runs_a_sweep_that_it_copies():
    [[command]] = dockerfile("CMD")
    sweep = command.strip("[]").removeprefix("/opt/ftd-ray/")
    assert sweep.split("/")[0] in copied()
    assert (ROOT / sweep).is_file()
