"""What stands in cluster.yaml agrees with Ray's schema, Ray's provider for AWS and this project.

No cloud is needed: Ray's launcher validates a file before it talks to anyone, and moto answers as
EC2 would.
"""

import re
import tomllib
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

ROOT = Path(__file__).parent.parent
SETUP = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
)
START = ("head_start_ray_commands", "worker_start_ray_commands")
NIGHTLY = re.compile(r"nightly|\.dev\d|ray-wheels|ray:latest|--pre\b")


def pinned(name: str) -> str:
    [version] = re.findall(
        rf"^{name}(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text(), re.M
    )
    return version


def image_of_this_version() -> str:
    """The tag that every cluster file names: this project's version and its Ray's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"my-name/ftd-ray:{project['version']}-ray{pinned('ray')}"


@pytest.fixture
def written() -> dict:
    """The file as it is read."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def prepared(written: dict) -> dict:
    """The file as `ray up` uses it: Ray's defaults stand where it says nothing."""
    return prepare_config(written)


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """An account on a simulated AWS that has what the file's head names."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key that it makes there
    with mock_aws():
        for profile in ("ftd-ray-head", "ftd-ray-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        yield boto3.client("ec2")


def test_cluster_file_passes_rays_own_schema(prepared):
    validate_config(prepared)


def test_schema_refuses_an_unknown_key(written):
    with pytest.raises(jsonschema.ValidationError, match="no_such_key"):
        validate_config(prepare_config(written | {"no_such_key": 1}))


def test_head_has_no_gpu_workers_and_workers_scale_from_zero_to_eight(prepared):
    types = prepared["available_node_types"]
    assert types.pop(prepared["head_node_type"])["max_workers"] == 0
    assert {t["min_workers"] for t in types.values()} == {0}
    assert sum(t["max_workers"] for t in types.values()) == prepared["max_workers"] == 8


@pytest.mark.heavy
def test_rays_provider_starts_every_kind_of_node_on_a_simulated_aws(aws, prepared):
    config = _bootstrap_config(prepared, no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-name": name, "ray-node-type": "worker"}
        provider.create_node(dict(kind["node_config"]), tags, 1)
    found = {}
    for reservation in aws.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            [name] = [t["Value"] for t in instance["Tags"] if t["Key"] == "Name"]
            found[name] = instance
    assert found.keys() == {"head", "gpu_spot", "gpu_on_demand"}
    assert [n for n, i in found.items() if i.get("InstanceLifecycle") == "spot"] == ["gpu_spot"]
    for name, instance in found.items():
        assert instance["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/"), name
        [disk] = instance["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"], f"the disk of {name} would go on costing"
        profile = "ftd-ray-head" if name == "head" else "ftd-ray-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")


def test_both_kinds_of_worker_are_the_same_but_for_spot(written):
    spot, demand = (written["available_node_types"][n] for n in ("gpu_spot", "gpu_on_demand"))
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == demand["node_config"]


def workers_for(prepared: dict, gpus: int, unavailable: tuple[str, ...] = ()) -> dict[str, int]:
    """What Ray's autoscaler would start for so many demands of a GPU, from nothing.

    ``unavailable``: kinds whose nodes did not come up just now.
    """
    for name, kind in prepared["available_node_types"].items():  # as EC2 describes g5.2xlarge
        kind["resources"] = {"CPU": 8} if name == "head" else {"CPU": 8, "GPU": 1}
    config = AutoscalingConfig(prepared, skip_content_hash=True)
    demand = ResourceRequestByCount(request=ResourceRequestUtil.make({"GPU": 1}), count=gpus)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            disable_launch_config_check=True,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=[demand],
            recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_ray_starts_spot_workers_first(prepared):
    assert workers_for(prepared, gpus=4)["gpu_spot"] == 4
    assert "gpu_on_demand" not in workers_for(prepared, gpus=4)


def test_what_is_more_than_the_spot_workers_goes_to_on_demand(prepared):
    launched = workers_for(prepared, gpus=20)
    assert (launched["gpu_spot"], launched["gpu_on_demand"]) == (6, 2)


def test_ray_turns_to_on_demand_where_spot_nodes_did_not_come_up(prepared):
    assert workers_for(prepared, gpus=2, unavailable=("gpu_spot",))["gpu_on_demand"] == 2


def test_every_node_runs_the_image_of_this_version(written):
    assert written["docker"]["image"] == image_of_this_version()
    assert written["docker"]["pull_before_run"] is True


@pytest.mark.parametrize("stage", SETUP)
def test_no_setup_command_installs_a_nightly(prepared, stage):
    assert not [c for c in prepared[stage] if NIGHTLY.search(c)]


def test_rays_own_setup_commands_would_install_a_nightly():
    default = prepare_config({"cluster_name": "default", "provider": {"type": "aws"}})
    assert any(NIGHTLY.search(c) for c in default["setup_commands"])


def test_every_node_installs_the_mounted_checkout_as_pinned(prepared):
    assert prepared["file_mounts"]["/home/ray/ftd-ray"] == "."
    install = "cd ~/ftd-ray && pip install --no-build-isolation -c constraints.txt -e ."
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


def test_mlflow_runs_on_the_head_alone_and_is_copied_to_the_bucket(written):
    command = "bash ~/ftd-ray/clusters/mlflow.sh $FTD_BUCKET/mlflow"
    assert command in written["head_start_ray_commands"]
    assert not any("mlflow" in c for c in written["worker_start_ray_commands"])
    assert "--host 127.0.0.1 " in (ROOT / "clusters" / "mlflow.sh").read_text()


def test_the_dashboard_which_takes_jobs_listens_on_the_head_alone(written):
    [start] = [c for c in written["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
