"""The files in clusters/ agree with Ray's schema, KubeRay's fields and this project.

KubeRay's own schema is a megabyte and in no package, so the names of fields stand here, as its API
reference has them. That Kubernetes would take the values is not checked.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray.autoscaler._private._azure
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from test_cluster import NIGHTLY, ROOT, SETUP, START, image_of_this_version, pinned

CLUSTERS = ROOT / "clusters"
LAUNCHED = ["gcp.yaml", "azure.yaml", "on-prem.yaml"]
IN_CONTAINERS = ["gcp.yaml", "azure.yaml"]
EVERY_FILE = [
    ROOT / "cluster.yaml",
    *(CLUSTERS / name for name in [*LAUNCHED, "kuberay.yaml", "slurm.sh"]),
]
PLACEHOLDER = re.compile(r"\bmy-[a-z]+|\bftd-ray-(?:head|worker)\b|\b10\.0\.0\.\d|/mnt/shared")
"""What only an example can say, and everybody has to change."""

FIELDS = {
    "RayJob": "apiVersion kind metadata spec",
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata "
    "clusterSelector submitterConfig managedBy deletionPolicy deletionStrategy entrypoint "
    "runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus entrypointNumGpus "
    "ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "RayClusterSpec": "suspend managedBy autoscalerOptions authOptions headServiceAnnotations "
    "enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs",
    "AutoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds "
    "upscalingMode version env envFrom volumeMounts",
    "HeadGroupSpec": "template headService enableIngress rayStartParams serviceType",
    "WorkerGroupSpec": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds "
    "rayStartParams template scaleStrategy numOfHosts",
}
"""Fields of KubeRay 1.6's kinds, in the order of its reference."""


def read(name: str) -> dict:
    return yaml.safe_load((CLUSTERS / name).read_text())


def blocks(text: str) -> list[tuple[str, str]]:
    """Each line that says something, and where its EDIT mark may stand.

    That is the line itself; for a text of many lines, which takes no comments, the comment before
    or after it.
    """
    lines = text.splitlines()
    found, number = [], 0
    while number < len(lines):
        line, first = lines[number], number
        depth = len(line) - len(line.lstrip())
        number += 1
        if not line.strip() or (line.lstrip().startswith("#") and not line.startswith("#SBATCH")):
            continue
        if re.search(r"[>|]-?$", line):
            while number < len(lines) and (
                not lines[number].strip()
                or (
                    len(lines[number]) - len(lines[number].lstrip()) > depth
                    and not lines[number].lstrip().startswith("#")
                )
            ):
                number += 1
            marks = lines[first - 1 : first] + lines[number : number + 1]
            found.append(("\n".join(lines[first:number]), "\n".join(marks)))
        else:
            before = lines[first - 1] if first and lines[first - 1].lstrip()[:1] == "#" else ""
            found.append((line, f"{before}\n{line}"))
    return found


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda p: p.name)
def test_every_value_that_must_be_changed_is_marked(path: Path) -> None:
    unmarked = [
        line
        for line, marks in blocks(path.read_text())
        if PLACEHOLDER.search(line.partition(" # ")[0]) and "EDIT" not in marks
    ]
    assert not unmarked
    assert any("EDIT" in marks for _, marks in blocks(path.read_text()))


def test_a_value_without_its_mark_is_found() -> None:
    text = "a: my-bucket\nb: >-\n  s3://my-bucket\n  more\nc: 1\n"
    assert [m.count("EDIT") for line, m in blocks(text) if PLACEHOLDER.search(line)] == [0, 0]
    text = "a: my-bucket   # EDIT\nb: >-\n  s3://my-bucket\n# EDIT above\n"
    assert all("EDIT" in marks for line, marks in blocks(text))


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda p: p.name)
def test_every_file_says_that_it_has_never_been_run_for_real(path: Path) -> None:
    comments = " ".join(
        line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")
    )
    assert re.search(r"Never run on [\w ]+ by its authors\. Checked: ", comments)


@pytest.mark.parametrize("name", LAUNCHED)
def test_it_passes_rays_own_schema(name: str) -> None:
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_it_installs_no_nightly_and_installs_as_pinned(name: str) -> None:
    prepared = prepare_config(read(name))
    commands = [c for stage in SETUP for c in prepared[stage]]
    assert not [c for c in commands if NIGHTLY.search(c)]
    assert any("-c constraints.txt -e ." in c for c in commands)


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_has_the_token_and_every_start_asks_for_it(name: str) -> None:
    written = read(name)
    assert "~/.ray" in written["file_mounts"].values()
    for stage in START:
        [start] = [c for c in written[stage] if "ray start" in c]
        assert "RAY_AUTH_MODE=token ray start" in start
    [head] = [c for c in written[START[0]] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("name", LAUNCHED)
def test_mlflow_is_the_heads_alone_and_copied(name: str) -> None:
    written = read(name)
    assert sum("clusters/mlflow.sh " in c for c in written[START[0]]) == 1
    assert not any("mlflow" in c for c in written[START[1]])


@pytest.mark.parametrize("name", IN_CONTAINERS)
def test_clouds_run_the_image_of_this_version_spot_first(name: str) -> None:
    written = read(name)
    assert written["docker"]["image"] == image_of_this_version()
    types = written["available_node_types"]
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    assert types["gpu_spot"]["resources"] == types["gpu_on_demand"]["resources"]
    workers = types["gpu_spot"]["max_workers"] + types["gpu_on_demand"]["max_workers"]
    assert written["max_workers"] == workers


def test_azure_parameters_are_those_of_rays_deployment_template() -> None:
    [folder] = ray.autoscaler._private._azure.__path__
    template = json.loads((Path(folder) / "azure-vm-template.json").read_text())
    known = template["parameters"].keys() | {"availability_zone"}
    for kind in read("azure.yaml")["available_node_types"].values():
        assert kind["node_config"]["azure_arm_parameters"].keys() <= known


def test_on_prem_waits_for_no_autoscaler() -> None:
    prepared = prepare_config(read("on-prem.yaml"))
    [kind] = prepared["available_node_types"].values()
    assert kind["min_workers"] == len(prepared["provider"]["worker_ips"]) == 2


@pytest.mark.parametrize("script", sorted(CLUSTERS.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_sound_to_the_eye_of_shellcheck(script: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


def unknown(kind: str, tree: dict) -> set[str]:
    return tree.keys() - set(FIELDS[kind].split())


def test_the_ray_job_has_only_fields_that_kuberay_knows() -> None:
    job = read("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    found = {
        "RayJob": job,
        "RayJobSpec": job["spec"],
        "RayClusterSpec": cluster,
        "AutoscalerOptions": cluster["autoscalerOptions"],
        "HeadGroupSpec": cluster["headGroupSpec"],
    }
    for kind, tree in found.items():
        assert not unknown(kind, tree), kind
    for group in cluster["workerGroupSpecs"]:
        assert not unknown("WorkerGroupSpec", group)


def pods() -> dict[str, dict]:
    cluster = read("kuberay.yaml")["spec"]["rayClusterSpec"]
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {
        n: g["template"]["spec"] for n, g in (groups | {"head": cluster["headGroupSpec"]}).items()
    }


def test_ray_job_and_its_pods_are_of_this_version() -> None:
    assert read("kuberay.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    images = {
        container["image"]
        for pod in pods().values()
        for container in pod["containers"] + pod.get("initContainers", [])
    }
    assert images == {image_of_this_version()}


def test_pods_mount_what_they_have_and_ask_no_more_than_their_limits() -> None:
    for name, pod in pods().items():
        volumes = {v["name"] for v in pod["volumes"]}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert {m["name"] for m in container["volumeMounts"]} <= volumes, name
        [container] = pod["containers"]
        resources = container["resources"]
        assert resources["requests"].items() <= resources["limits"].items(), name
        assert any(m["mountPath"] == "/dev/shm" for m in container["volumeMounts"]), name


def test_ray_job_has_a_token_goes_on_after_a_lost_head_and_ends_its_pods() -> None:
    spec = read("kuberay.yaml")["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert " --resume " in spec["entrypoint"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
