"""The Dockerfile and compose.yaml say what they should; the Dockerfile's steps make what they say.

No container engine is needed. Where root, namespaces and debootstrap are at hand, the steps are
carried out in a fresh Debian (image_helpers.py says what differs from a container).
"""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from image_helpers import Build, Root, Step, cannot, debian, lent_names, read_dockerfile
from packaging.specifiers import SpecifierSet
from test_cluster import ROOT, pinned


def steps(word: str) -> list[Step]:
    return [step for stage in read_dockerfile()[1] for step in stage.all(word)]


def copied() -> list[str]:
    """What comes from the folder that the image is built in."""
    return [s for step in steps("COPY") if "from" not in step.options for s in step.words[:-1]]


def test_everything_the_dockerfile_copies_is_here() -> None:
    assert copied()
    assert not [source for source in copied() if not (ROOT / source).exists()]


def test_dockerignore_lets_through_what_the_dockerfile_copies() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    passed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert passed == {source.split("/")[0] for source in copied()}


def test_base_is_pinned_and_has_a_python_that_the_project_accepts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for stage in read_dockerfile()[1]:
        match = re.fullmatch(r"python:(3\.\d+\.\d+)-slim-[a-z]+", stage.base)
        assert match and SpecifierSet(project["requires-python"]).contains(match[1])


def test_it_runs_as_an_ordinary_user_in_its_volume() -> None:
    last = read_dockerfile()[1][-1]
    assert last.all("USER")[-1].text == "ray"
    assert [last.all("WORKDIR")[-1].text, last.all("VOLUME")[-1].text] == ["/work", "/work"]


def test_it_runs_a_sweep_that_it_copies() -> None:
    [command] = steps("CMD")
    [sweep] = command.words
    assert (ROOT / sweep.removeprefix("/opt/ftd-ray/")).is_file()
    assert "sweeps" in copied()


def test_its_entrypoint_may_be_run() -> None:
    assert os.access(ROOT / "clusters" / "entrypoint.sh", os.X_OK)


def torch_step(tmp_path: Path, variant: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs the step that installs PyTorch with a stand-in for pip; what it was asked."""
    [step] = [s for s in steps("RUN") if "$VARIANT" in s.text]
    [index] = [a.text.partition("=")[2] for a in steps("ARG") if a.text.startswith("TORCH_INDEX=")]
    asked = tmp_path / "asked"
    (tmp_path / "pip").write_text(f'#!/bin/sh\necho "$@" > {asked}\n')
    (tmp_path / "pip").chmod(0o755)
    ran = subprocess.run(
        ["/bin/sh", "-c", step.text.replace("/tmp/torch.txt", str(tmp_path / "torch.txt"))],
        cwd=ROOT,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "VARIANT": variant,
            "TORCH_INDEX": index,
        },
        capture_output=True,
        text=True,
    )
    return ran, asked.read_text() if asked.exists() else ""


def test_cuda_is_what_the_ordinary_index_has(tmp_path: Path) -> None:
    ran, asked = torch_step(tmp_path, "cuda")
    assert ran.returncode == 0
    assert asked.split() == ["install", "-c", "constraints.txt", "torch", "torchvision"]


def test_the_cpu_variant_takes_both_wheels_from_pytorchs_index_as_pinned(tmp_path: Path) -> None:
    ran, asked = torch_step(tmp_path, "cpu")
    assert ran.returncode == 0
    assert "--index-url https://download.pytorch.org/whl/cpu -r" in asked
    wanted = [f"torch=={pinned('torch')}", f"torchvision=={pinned('torchvision')}"]
    assert (tmp_path / "torch.txt").read_text().split() == wanted


def test_another_variant_is_refused(tmp_path: Path) -> None:
    ran, asked = torch_step(tmp_path, "rocm")
    assert ran.returncode == 1 and not asked
    assert ran.stderr == "VARIANT is cuda or cpu, not rocm\n"


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        ([], "python -m ftd_ray.sweep"),
        (["a.yaml", "--resume"], "python -m ftd_ray.sweep a.yaml --resume"),
        (["--help"], "python -m ftd_ray.sweep --help"),
        (["no-program"], "python -m ftd_ray.sweep no-program"),
        (["bash", "-c", "echo it is bash"], "it is bash"),
    ],
)
def test_arguments_are_a_sweeps_unless_they_name_a_program(
    tmp_path: Path, arguments: list[str], runs: str
) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho python "$@"\n')
    (tmp_path / "python").chmod(0o755)
    ran = subprocess.run(
        [str(ROOT / "clusters" / "entrypoint.sh"), *arguments],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == runs


# Compose


@pytest.fixture
def compose() -> dict:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_services_name_what_there_is(compose: dict) -> None:
    services, volumes = compose["services"], compose["volumes"].keys()
    assert services.keys() == {"s3", "bucket", "mlflow", "sweep"}
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= services.keys(), name
        assert {v.split(":")[0] for v in service.get("volumes", ())} <= volumes, name


def test_images_of_others_are_pinned(compose: dict) -> None:
    others = {s["image"] for s in compose["services"].values() if "build" not in s}
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in others)


def test_nothing_but_mlflow_is_published_and_only_to_this_machine(compose: dict) -> None:
    ports = {n: s["ports"] for n, s in compose["services"].items() if "ports" in s}
    assert ports == {"mlflow": ["127.0.0.1:5000:5000"]}


def test_everybody_has_the_keys_that_the_bucket_takes(compose: dict) -> None:
    services = compose["services"]
    server = services["s3"]["environment"]
    for name in ("bucket", "mlflow", "sweep"):
        client = services[name]["environment"]
        assert client["AWS_ACCESS_KEY_ID"] == server["ROOT_ACCESS_KEY"]
        assert client["AWS_SECRET_ACCESS_KEY"] == server["ROOT_SECRET_KEY"]
        assert client["AWS_ENDPOINT_URL"] == "http://s3:7070"
    assert services["s3"]["command"][1] == ":7070"


def test_the_composed_sweep_keeps_nothing_in_its_container(compose: dict) -> None:
    sweep = compose["services"]["sweep"]
    path, *overrides = sweep["command"]
    assert (ROOT / path.removeprefix("/opt/ftd-ray/")).is_file()
    values = dict(o.split("=", 1) for o in overrides if "=" in o)
    assert values.keys() == {"store.uri", "output.dir", "tracking.uri"}
    assert all(v.startswith(("s3://ftd/", "http://mlflow:")) for v in values.values())
    assert "volumes" not in sweep


def test_mlflow_answers_to_the_names_that_it_is_called_by(compose: dict) -> None:
    [allowed] = [
        c.partition("=")[2].split(",")
        for c in compose["services"]["mlflow"]["command"]
        if c.startswith("--allowed-hosts=")
    ]
    assert {"mlflow:5000", "localhost:5000", "127.0.0.1:5000"} <= set(allowed)


# The steps themselves


@dataclass
class Image:
    build: Build
    root: Root

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.build.inside(self.root, *command, **environment)

    def launch(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as Ray's launcher has it run in a container."""
        shell = f"source ~/.bashrc; export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore && ({command})"
        return self.run("bash", "--login", "-c", "-i", shell, **environment)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if reason := cannot():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("image")
    given = os.environ.get("FTD_TEST_DEBIAN")  # one made before, for work on these tests
    base = Path(given) if given else folder / "debian"
    if not given and (reason := debian(base)):
        pytest.skip(reason)
    probe = Root(base, folder / "probe").run(["true"], environment={})
    if probe.returncode:
        pytest.skip(f"no root can be mounted here: {probe.stdout[-300:]}")
    build = Build(base, folder)
    try:
        yield Image(build, build.run(read_dockerfile()[1]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.heavy
def test_every_step_runs_in_a_fresh_root(image: Image) -> None:
    assert image.build.steps == [step.text for step in steps("RUN")]
    assert image.build.user == "1000:1000"
    assert any(name.startswith("torch") for name in lent_names())


@pytest.mark.heavy
def test_a_launchers_shell_finds_what_it_needs(image: Image) -> None:
    needed = "command -v bash rsync ssh tmux gcc ray mlflow python printenv"
    found = image.launch(f"{needed} && ray --version && test -w $HOME && id -un")
    assert found.returncode == 0, found.stdout
    assert "/opt/venv/bin/ray" in found.stdout
    assert f"version {pinned('ray')}" in found.stdout
    assert found.stdout.split()[-1] == "ray"


@pytest.mark.heavy
def test_it_has_what_the_constraints_say(image: Image) -> None:
    said = image.run("python", "-m", "pip", "list", "--format=freeze", PIP_NO_INDEX="1")
    found = {
        k.lower().replace("_", "-"): v for k, v in re.findall(r"^(\S+)==(\S+)$", said.stdout, re.M)
    }
    text = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.M))
    assert {"ray", "torch", "mlflow", "optuna", "boto3"} <= found.keys() & pins.keys()
    assert not {k: (v, pins[k]) for k, v in found.items() if k in pins and pins[k] != v}


@pytest.mark.heavy
def test_a_mounted_checkout_replaces_the_code_and_downloads_nothing(image: Image) -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    [install] = cluster["setup_commands"]
    target = image.root.path("/home/ray/ftd-ray")
    for name in ("ftd", "ftd_ray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target / name)
    subprocess.run(["chown", "-R", "1000:1000", str(target)], check=True)
    ran = image.launch(install, PIP_NO_INDEX="1")
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "Downloading" not in ran.stdout
    where = image.launch("python -c 'import ftd_ray; print(ftd_ray.__file__)'")
    assert where.stdout.split()[-1] == "/home/ray/ftd-ray/ftd_ray/__init__.py"


@pytest.mark.heavy
def test_a_container_runs_a_sweep_to_its_end(image: Image) -> None:
    [entry], [command] = (step.words for step in (steps("ENTRYPOINT")[0], steps("CMD")[0]))
    small = (
        "experts.count=1 experts.epochs=3 experts.rho=0 distill.max_start_epoch=2 "
        "distill.expert_epochs=1 distill.syn_steps=2 distill.iterations=2 distill.lr_img=0.1 "
        "evaluate.every=2 evaluate.search_networks=1 evaluate.search_epochs=2 "
        "evaluate.networks=2 evaluate.epochs=5 search.trials=1 search.concurrency=1"
    )
    ran = image.run(entry, command, *shlex.split(small))
    assert ran.returncode in (0, 1), ran.stdout[-3000:]  # 1: too little training for a best set
    assert "gradients  native" in ran.stdout  # the compiler works
    assert re.search(r"^done in .*1 trials? complete", ran.stdout, re.M), ran.stdout[-3000:]
    assert image.root.path("/work/runs/digits/summary.json").exists()
