"""The sweep command as users run it: its plan, its refusals, its results and its interruptions."""

import io
import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from fleet_helpers import files_of
from PIL import Image
from ray_helpers import (
    MIXED,
    REPOSITORY,
    SWEEP_TIMEOUT,
    Ran,
    environment,
    files_below,
    finished,
    mlflow_runs,
    run_sweep,
    running_sweep,
    summary_of,
    tiny,
    wait_until,
    write_sweep,
)

from ftd.expert import set_key
from ftd.native.library import kernels
from ftd.synthetic import SyntheticSet
from ftd_ray.config import SearchConfig, load_config
from ftd_ray.imputation import DIVERGED
from ftd_ray.search import SweepStudy
from ftd_ray.store import TrajectoryStore
from ftd_ray.sweep import main

pytestmark = pytest.mark.timeout(3 * SWEEP_TIMEOUT)

# How MLflow names a picture of a step.
PICTURE = re.compile(r"images/synthetic\+step\+(\d+)\+timestamp\+\d+\+[0-9a-f-]+\.png")

# Trials long enough to be interrupted in the middle: ten reports each.
SLOW = tiny(
    distill__syn_steps=10,
    distill__iterations=50,
    distill__lr_img=10,
    evaluate={"every": 5, "search_networks": 1, "search_epochs": 60, "networks": 2, "epochs": 20},
    search={"trials": 3, "concurrency": 1, "sampler": "random", "pruner": "none"},
)


class Done:
    """A sweep that ran to its end, and what it left."""

    def __init__(self, folder: Path, ran: Ran, name: str = "tiny"):
        self.folder, self.ran = folder, ran
        self.output = folder / "runs" / name
        self.config = load_config_in(folder)
        self.summary: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        self.study = open_study(folder)
        self.ended = self.study.ended()
        self.runs = mlflow_runs(folder)

    def of_kind(self, kind: str) -> list[Any]:
        return [r for r in self.runs if r.data.tags.get("ftd.kind") == kind]

    def trial_run(self, number: int) -> Any:
        (run,) = (r for r in self.of_kind("trial") if r.data.tags["ftd.trial"] == str(number))
        return run

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{self.folder / 'mlflow.db'}")


def load_config_in(folder: Path) -> Any:
    before = os.getcwd()
    os.chdir(folder)
    try:
        return load_config("sweep.yaml")
    finally:
        os.chdir(before)


def open_study(folder: Path) -> SweepStudy:
    config = load_config_in(folder)
    return SweepStudy(
        config.output_dir,
        name=config.name,
        space=config.space,
        search=config.search,
        seed=config.seed,
        every=config.evaluate.every,
        steps=config.distill.iterations,
    )


def run_to_the_end(folder: Path, tree: dict[str, Any]) -> Done:
    write_sweep(folder, tree)
    ran = run_sweep(folder, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    return Done(folder, ran)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A finished sweep with complete, pruned and failed trials over two expert sets."""
    return run_to_the_end(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A finished sweep of longer trials that nobody interrupted."""
    return run_to_the_end(tmp_path_factory.mktemp("undisturbed"), SLOW)


# --- refusals -------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a tiny sweep file, to call ``main`` in."""
    write_sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield tmp_path
    assert not ray.is_initialized()


def nothing_but_the_file(folder: Path) -> bool:
    return {p.name for p in folder.iterdir()} == {"sweep.yaml"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("experts.rhoo=0.1", "experts.rhoo is not a known key. Did you mean experts.rho?"),
        ("experts.rho=-0.01", "experts.rho=-0.01"),
        ("experts.rho={choice: [0.0, -0.01]}", "experts.rho=-0.01"),
        ("distill.ipc=1000", "distill.ipc=1000"),
        ("distill.max_start_epoch=4", "distill.max_start_epoch=4"),
        ("dataset={name: cifar10, root: nowhere}", "nowhere"),
        ("dataset={name: imagefolder, root: nowhere}", "nowhere"),
        ("dataset.name=digit", "dataset.name='digit'"),
        ("search.trials=0", "search.trials=0"),
        ("tracking.uri=./mlruns", "tracking.uri='./mlruns'"),
        ("experts.network=ConvNetD9", "ConvNetD9"),
    ],
)
def test_wrong_configuration_is_one_line_and_exit_2_and_nothing_is_started(
    here, capsys, override, named
):
    assert main(["sweep.yaml", override]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert said.err.count("\n") == 1
    assert nothing_but_the_file(here)


def test_typo_stops_the_real_process_with_exit_2(tmp_path):
    write_sweep(tmp_path)
    ran = run_sweep(tmp_path, "sweep.yaml", "distill.syn_step=3")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("sweep: ") and ran.err.count("\n") == 1
    assert "distill.syn_steps" in ran.err


@pytest.mark.parametrize("key", ["output.dir", "store.uri"])
def test_place_that_cannot_be_written_is_one_line_and_exit_2(here, capsys, key):
    (here / "file").write_text("a file where a folder should be")
    assert main(["sweep.yaml", f"{key}=file/below"]) == 2
    said = capsys.readouterr()
    assert f"{key}=" in said.err and said.err.count("\n") == 1
    assert not (here / "mlflow.db").exists()


def test_tracking_file_that_cannot_be_written_is_one_line_and_exit_2(here, capsys):
    (here / "file").write_text("a file where a folder should be")
    assert main(["sweep.yaml", "tracking.uri=sqlite:///file/mlflow.db"]) == 2
    said = capsys.readouterr()
    assert "tracking.uri=" in said.err and said.err.count("\n") == 1


def test_tracking_server_that_does_not_answer_is_one_line_and_exit_2(tmp_path):
    write_sweep(tmp_path)
    env = environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="2")
    ran = run_sweep(tmp_path, "sweep.yaml", "tracking.uri=http://127.0.0.1:9", env=env)
    assert ran.code == 2
    assert "tracking.uri=http://127.0.0.1:9" in ran.err and ran.err.count("\n") == 1


def test_missing_file_is_one_line_and_exit_2(here, capsys):
    assert main(["no.yaml"]) == 2
    assert "no.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["sweep.yaml", "--dry"], ["sweep.yaml", "--x"]])
def test_wrong_usage_is_exit_2(here, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_overrides_may_stand_before_and_after_options(here, capsys):
    assert main(["sweep.yaml", "seed=1", "--resume", "experts.rhoo=1"]) == 2
    assert "experts.rhoo" in capsys.readouterr().err


def test_real_run_without_the_gpus_it_needs_is_refused_after_its_plan(tmp_path):
    write_sweep(tmp_path)
    ran = run_sweep(
        tmp_path,
        "sweep.yaml",
        "resources.gpus_per_trial=1",
        env=environment(CUDA_VISIBLE_DEVICES=""),
    )
    assert ran.code == 2
    assert "missing here: a trial takes 1 GPU" in ran.out
    assert "a trial takes 1 GPU" in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "runs" / "tiny" / "sweep.yaml").exists()


def test_measured_share_of_a_gpu_without_a_gpu_is_refused_after_its_plan(here, capsys, monkeypatch):
    monkeypatch.setattr("ftd_ray.sweep.machine_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    override = "resources.gpus_per_expert=auto"
    assert main(["sweep.yaml", override]) == 2
    said = capsys.readouterr()
    assert "missing here: an expert takes 1 GPU, and there are 0" in said.out
    assert "an expert takes 1 GPU" in said.err and said.err.count("\n") == 1
    assert main(["sweep.yaml", override, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "an expert 1 CPU and a measured share of a GPU, a trial 1 CPU" in said.out
    assert said.err == ""


# --- dry runs -------------------------------------------------------------------------------


def test_machine_without_a_compiler_is_told_so_once_in_the_plan(here, capsys, monkeypatch):
    assert main(["sweep.yaml", "--dry-run"]) == 0
    assert "gradients  native\n" in capsys.readouterr().out
    monkeypatch.setenv("FTD_CACHE", str(here / "empty-cache"))
    monkeypatch.setenv("CC", "no-such-compiler")
    kernels.cache_clear()
    try:
        assert main(["sweep.yaml", "--dry-run"]) == 0
        said = capsys.readouterr()
        assert "gradients  eager\n  several times slower than native." in said.out
        assert said.out.count("no-such-compiler is not on this machine") == 1
        assert main(["sweep.yaml", "resources.trial_backend=native"]) == 2
    finally:
        kernels.cache_clear()
    said = capsys.readouterr()
    assert "no-such-compiler" in said.err and said.err.count("\n") == 1
    assert not (here / "runs" / "tiny" / "sweep.yaml").exists()


def test_dry_run_prints_the_plan_and_leaves_no_sweep_behind(here, capsys):
    assert main(["sweep.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 distinct sets, 4 experts: 0 in the store, 4 to build" in out
    assert "experts.rho" in out and "0 | 0.01" in out
    assert "4 points" in out
    # 4 experts x 4 snapshots x (8 x 9 + 3 x 8 + 16 x 8 x 10 + 10) float32 parameters
    parameters = 8 * 9 + 3 * 8 + 8 * 16 * 10 + 10
    assert f"disk       {4 * 4 * 4 * parameters / 1000:.1f} kB" in out
    assert str(here / "store") in out and str(here / "runs" / "tiny") in out
    assert not (here / "runs" / "tiny" / "sweep.yaml").exists()
    assert not (here / "runs" / "tiny" / "summary.json").exists()
    assert [p for p in (here / "store").rglob("*") if p.is_file()] == []


def test_imagenette_dry_run_is_correct_on_a_machine_without_a_gpu(tmp_path, imagenette_root):
    path = REPOSITORY / "sweeps" / "imagenette.yaml"
    if not path.exists():
        pytest.skip("sweeps/imagenette.yaml is not there")
    places = [
        f"store.uri={tmp_path / 'store'}",
        f"output.dir={tmp_path / 'runs'}",
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    ]
    overrides = [f"dataset.root={imagenette_root}", *places]
    env = environment(CUDA_VISIBLE_DEVICES="")
    ran = run_sweep(tmp_path, str(path), *overrides, "--dry-run", env=env)
    assert (ran.code, ran.err) == (0, "")
    config = load_config(path, overrides)
    sets = {
        json.dumps(config.identity(e, make_description(config)), sort_keys=True): e
        for _, e in config.expert_points()
    }
    experts = sum(e.count for e in sets.values())
    assert f"{len(sets)} distinct set" in ran.out
    assert f"{experts} experts: 0 in the store, {experts} to build" in ran.out
    assert "10 classes" in ran.out
    assert "disk" in ran.out
    assert "missing here: an expert takes" in ran.out and "GPU, and there are 0" in ran.out


def make_description(config: Any) -> Any:
    from ftd.data import describe

    return describe(config.dataset)


# --- a finished sweep -----------------------------------------------------------------------


def test_finished_sweep_has_trials_of_all_three_ends(done):
    assert {e.state for e in done.ended} == {"complete", "pruned", "failed"}


def test_summary_has_the_keys_of_the_contract(done):
    s = done.summary
    assert {
        "name", "state", "seconds", "best", "baseline", "trials", "experts", "mlflow",
    } <= set(s)  # fmt: skip
    assert (s["name"], s["state"]) == ("tiny", "done")
    assert s["seconds"] > 0
    assert {"trial", "params", "val_accuracy", "test_accuracy", "artifact"} <= set(s["best"])
    assert {"mean", "std", "n"} <= set(s["best"]["test_accuracy"])
    assert {"mean", "std", "n"} <= set(s["baseline"]["random_real"])
    assert set(s["trials"]) == {"complete", "pruned", "failed"}
    assert set(s["experts"]) == {"built", "reused", "seconds", "bytes"}
    assert {"tracking_uri", "experiment", "parent_run_id"} <= set(s["mlflow"])


def test_trials_sum_to_what_was_asked_for(done):
    assert sum(done.summary["trials"].values()) == 5
    assert done.summary["trials"] == dict(Counter(e.state for e in done.ended))


def test_accuracies_are_fractions_over_as_many_networks_as_asked_for(done):
    best, real = done.summary["best"], done.summary["baseline"]["random_real"]
    for value in (best["val_accuracy"], best["test_accuracy"]["mean"], real["mean"]):
        assert 0 < value < 1
    assert best["test_accuracy"]["n"] == real["n"] == 2


def test_best_is_the_complete_trial_of_highest_validation_accuracy(done):
    complete = [e for e in done.ended if e.state == "complete"]
    best = max(complete, key=lambda e: (e.value, -e.number))
    assert done.summary["best"]["trial"] == best.number
    assert done.summary["best"]["params"] == best.params
    assert done.summary["best"]["val_accuracy"] == best.value


def test_every_expert_was_built_once_and_lies_in_the_store(done):
    assert done.summary["experts"]["built"] == 4
    assert done.summary["experts"]["reused"] == 0
    assert done.summary["experts"]["seconds"] > 0
    manifests = sorted((done.folder / "store").glob("*/expert-*/manifest-*.json"))
    assert len(manifests) == 4
    parts = list((done.folder / "store").glob("*/expert-*/part-*"))
    assert len(parts) == 4


def test_bytes_of_the_summary_are_those_of_the_parameters_on_disk(done):
    parts = (done.folder / "store").glob("*/expert-*/part-*")
    on_disk = sum(p.stat().st_size for p in parts)
    assert 0.7 * on_disk < done.summary["experts"]["bytes"] <= on_disk


def test_diverged_trial_failed_with_its_reason_and_the_sweep_went_on(done):
    failed = [e for e in done.ended if e.state == "failed"]
    assert failed
    assert min(e.number for e in failed) < max(e.number for e in done.ended)
    for e in failed:
        assert e.params["distill.lr_lr"] == 1e30
        assert "eta" in e.reason and "\n" not in e.reason
        assert e.reports == {}
        assert f"trial {e.number:3d}  failed: {e.reason}" in done.ran.out


def test_pruned_trial_ended_before_its_last_step(done):
    for e in done.ended:
        if e.state == "pruned":
            assert max(e.reports) < 4
        elif e.state == "complete":
            assert sorted(e.reports) == [2, 4]


def test_best_set_is_a_file_that_loads_with_its_provenance(done):
    path = Path(done.summary["best"]["artifact"])
    assert path == done.output / "best" / "synthetic.npz"
    best = SyntheticSet.load(path)
    assert best.images.shape == (10, 1, 8, 8)
    assert best.provenance["trial"] == done.summary["best"]["trial"]
    assert best.provenance["scores"]["test"] == done.summary["best"]["test_accuracy"]
    assert best.protocol.epochs == 60


def test_folder_holds_the_resolved_sweep_and_pictures_and_no_checkpoints(done):
    resolved = yaml.safe_load((done.output / "sweep.yaml").read_text())
    assert resolved == yaml.safe_load(yaml.safe_dump(done.config.resolved()))
    for name in ("history.png", "best/synthetic.png"):
        assert Image.open(done.output / name).size[0] > 100
    assert list(done.output.rglob("checkpoint")) == []


def test_end_of_the_output_says_what_came_out(done):
    out, best = done.ran.out, done.summary["best"]
    assert f"best        trial {best['trial']}" in out
    assert f"{100 * best['test_accuracy']['mean']:.1f}" in out
    assert "random real images" in out
    assert best["artifact"] in out
    assert "mlflow" in out
    assert done.ran.err == ""


def test_output_that_is_no_terminal_has_plain_lines(done):
    assert "\x1b" not in done.ran.out and "\r" not in done.ran.out


def test_resume_of_a_finished_sweep_prints_the_result_and_exits_0(done, capsys, monkeypatch):
    monkeypatch.chdir(done.folder)
    before = files_below(done.output)
    assert main(["sweep.yaml", "--resume"]) == 0
    assert done.summary["best"]["artifact"] in capsys.readouterr().out
    assert files_below(done.output) == before


def test_existing_sweep_without_resume_is_refused(done, capsys, monkeypatch):
    monkeypatch.chdir(done.folder)
    before = files_below(done.output)
    assert main(["sweep.yaml"]) == 2
    said = capsys.readouterr()
    assert "--resume" in said.err and said.err.count("\n") == 1
    assert files_below(done.output) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=3", "seed"),
        ("experts.rho={choice: [0.0, 0.02]}", "experts.rho"),
        ("distill.iterations=5", "distill.iterations"),
        ("evaluate.networks=3", "evaluate.networks"),
        ("search.sampler=random", "search.sampler"),
        ("dataset.val_fraction=0.2", "dataset.val_fraction"),
    ],
)
def test_resume_of_a_changed_sweep_is_refused_by_key(done, capsys, monkeypatch, override, key):
    monkeypatch.chdir(done.folder)
    assert main(["sweep.yaml", "--resume", override]) == 2
    said = capsys.readouterr()
    assert f"{key}=" in said.err and said.err.count("\n") == 1


def test_dry_run_beside_a_finished_sweep_finds_its_experts_in_the_store(done, capsys, monkeypatch):
    monkeypatch.chdir(done.folder)
    assert main(["sweep.yaml", "--dry-run", "output.dir=elsewhere"]) == 0
    out = capsys.readouterr().out
    assert "4 experts: 4 in the store, 0 to build" in out
    assert "0 B for the experts to build" in out


def test_more_experts_or_epochs_are_planned_as_a_top_up(done, capsys, monkeypatch):
    monkeypatch.chdir(done.folder)
    assert main(["sweep.yaml", "--dry-run", "experts.count=3"]) == 0
    assert "6 experts: 4 in the store, 2 to build" in capsys.readouterr().out


# --- MLflow ---------------------------------------------------------------------------------


def test_one_parent_a_child_a_trial_and_a_child_an_expert_set(done):
    (parent,) = done.of_kind("sweep")
    assert len(done.of_kind("trial")) == 5
    assert len(done.of_kind("experts")) == 2
    assert len(done.runs) == 8
    assert parent.info.run_id == done.summary["mlflow"]["parent_run_id"]
    for run in done.of_kind("trial") + done.of_kind("experts"):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_child_of_a_trial_has_only_the_varied_parameters(done):
    for ended in done.ended:
        params = done.trial_run(ended.number).data.params
        assert set(params) == {"rho", "lr_lr", "lr_init"}
        for key, value in ended.params.items():
            assert float(params[key.partition(".")[2]]) == value


def test_child_of_a_trial_has_the_common_final_metric_and_curves_by_step(done):
    client = done.client()
    for ended in done.ended:
        run = done.trial_run(ended.number)
        history = client.get_metric_history(run.info.run_id, "val_accuracy")
        assert {m.step: m.value for m in history} == ended.reports
        if ended.reports:
            assert run.data.metrics["val_accuracy"] == ended.value
            losses = client.get_metric_history(run.info.run_id, "matching_loss")
            assert [m.step for m in losses] == list(range(1, max(ended.reports) + 1))
            assert all(math.isfinite(m.value) for m in losses)


def test_states_of_trials_are_told_apart(done):
    for ended in done.ended:
        run = done.trial_run(ended.number)
        assert run.info.status == {"failed": "FAILED"}.get(ended.state, "FINISHED")
        assert ("pruned" in run.data.tags) == (ended.state == "pruned")
        assert run.data.tags["ftd.state"] == ended.state
        if ended.state == "failed":
            assert run.data.tags["ftd.reason"] == ended.reason


def test_no_run_is_left_running(done):
    assert [r.info.run_name for r in done.runs if r.info.status == "RUNNING"] == []


def test_pictures_of_the_synthetic_images_are_logged_by_step(done):
    client = done.client()
    for ended in done.ended:
        files = client.list_artifacts(done.trial_run(ended.number).info.run_id, "images")
        found = {int(m[1]) for f in files if (m := PICTURE.fullmatch(f.path))}
        assert found == ({0} | set(ended.reports) if ended.reports else set())  # 0: the start


def test_trials_name_their_expert_set_as_dataset_input(done):
    keys = {p.name for p in (done.folder / "store").iterdir()}
    for ended in done.ended:
        (used,) = done.trial_run(ended.number).inputs.dataset_inputs
        assert used.dataset.digest in keys
        assert [(t.key, t.value) for t in used.tags] == [("mlflow.data.context", "experts")]


def test_child_of_an_expert_set_has_its_key_its_cost_and_its_curve(done):
    client = done.client()
    for run in done.of_kind("experts"):
        assert run.data.tags["ftd.expert_set"] in {
            p.name for p in (done.folder / "store").iterdir()
        }
        assert run.info.status == "FINISHED"
        assert run.data.metrics["experts_built"] == 2
        assert run.data.metrics["seconds"] > 0
        curve = client.get_metric_history(run.info.run_id, "expert_val_accuracy")
        assert [m.step for m in curve] == [0, 1, 2, 3]
        assert set(run.data.params) == {"rho"}


def test_parent_has_the_sweep_the_pictures_the_summary_and_the_best_set(done):
    client, run_id = done.client(), done.summary["mlflow"]["parent_run_id"]
    names = {f.path for f in client.list_artifacts(run_id)}
    assert {"sweep.yaml", "summary.json", "history.png", "best"} <= names
    best = {f.path for f in client.list_artifacts(run_id, "best")}
    assert best == {"best/synthetic.npz", "best/synthetic.png"}
    local = client.download_artifacts(run_id, "best/synthetic.npz")
    assert Path(local).read_bytes() == (done.output / "best" / "synthetic.npz").read_bytes()


def test_parent_has_the_fixed_settings_and_the_result(done):
    (parent,) = done.of_kind("sweep")
    assert parent.info.status == "FINISHED"
    assert parent.data.params["experts.network"] == "ConvNetD1W8"
    assert parent.data.params["distill.syn_steps"] == "2"
    assert "experts.rho" not in parent.data.params
    best = done.summary["best"]
    assert parent.data.metrics["val_accuracy"] == best["val_accuracy"]
    assert parent.data.metrics["test_accuracy"] == best["test_accuracy"]["mean"]
    assert "test_accuracy" not in done.trial_run(best["trial"]).data.metrics


# --- interruptions --------------------------------------------------------------------------


def interrupt(folder: Path, signum: int, *after: str, arguments: tuple[str, ...] = ()) -> Ran:
    """Starts the sweep, sends a signal once its output holds ``after``, and waits for its end."""
    output = folder / "stdout.txt"
    with running_sweep(folder, "sweep.yaml", *arguments) as process:

        def came() -> bool:
            assert process.poll() is None, finished(folder, 0)
            return all(text in output.read_text() for text in after)

        wait_until(f"{after} in the output", came, seconds=SWEEP_TIMEOUT)
        os.kill(process.pid, signum)
        code = process.wait(timeout=120)
    return finished(folder, code)


def assert_stopped_cleanly(folder: Path, ran: Ran, signum: int) -> None:
    assert ran.code == 128 + signum, ran.out + ran.err
    assert "--resume" in ran.out
    summary = summary_of(folder)
    assert summary["state"] == "interrupted"
    assert sum(summary["trials"].values()) < 3
    runs = mlflow_runs(folder)
    assert [r.info.run_name for r in runs if r.info.status == "RUNNING"] == []
    (parent,) = (r for r in runs if r.data.tags["ftd.kind"] == "sweep")
    assert parent.info.status == "KILLED"


def assert_resumed_to_the_end(folder: Path, resumed: Ran) -> Done:
    assert resumed.code == 0, resumed.out + resumed.err
    done = Done(folder, resumed)
    assert done.summary["state"] == "done"
    assert [e.number for e in done.ended] == [0, 1, 2]
    assert sum(done.summary["trials"].values()) == 3
    assert sorted(int(r.data.tags["ftd.trial"]) for r in done.of_kind("trial")) == [0, 1, 2]
    assert len(done.of_kind("sweep")) == 1
    statuses = {r.info.status for r in done.of_kind("sweep") + done.of_kind("trial")}
    assert statuses == {"FINISHED"}
    assert "RUNNING" not in {r.info.status for r in done.runs}
    return done


def assert_as_if_undisturbed(done: Done, undisturbed: Done) -> None:
    ours, theirs = done.output / "best" / "synthetic.npz", undisturbed.output
    assert ours.read_bytes() == (theirs / "best" / "synthetic.npz").read_bytes()
    assert files_of(done.folder / "store") == files_of(undisturbed.folder / "store")
    assert [(e.params, e.reports) for e in done.ended] == [
        (e.params, e.reports) for e in undisturbed.ended
    ]
    assert done.summary["experts"]["built"] == undisturbed.summary["experts"]["built"]


def test_sigint_saves_the_state_and_resume_ends_with_exactly_the_trials_asked_for(tmp_path):
    write_sweep(tmp_path, SLOW)
    stopped = interrupt(tmp_path, signal.SIGINT, "trial   1  step    10")
    assert_stopped_cleanly(tmp_path, stopped, signal.SIGINT)
    killed = [r for r in mlflow_runs(tmp_path) if r.info.status == "KILLED"]
    assert {r.data.tags["ftd.kind"] for r in killed} >= {"sweep", "trial"}
    resumed = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert "1 of 3 trials are done" in resumed.out
    # Trial 1 went on from its checkpoint, under its own number.
    assert "trial   1  step    5 " not in resumed.out
    done = assert_resumed_to_the_end(tmp_path, resumed)
    assert sorted(done.ended[1].reports) == list(range(5, 51, 5))
    # Expert sets that were built before the signal are finished, not interrupted.
    assert {r.info.status for r in done.of_kind("experts")} == {"FINISHED"}
    assert {r.data.metrics.get("experts_built") for r in done.of_kind("experts")} == {2}


def test_resume_with_nothing_saved_starts_fresh_and_a_signal_before_any_trial_is_obeyed(tmp_path):
    write_sweep(tmp_path, SLOW)
    ran = interrupt(tmp_path, signal.SIGINT, "output  ", arguments=("--resume",))
    assert ran.code == 130
    assert [r for r in mlflow_runs(tmp_path) if r.info.status == "RUNNING"] == []


@pytest.mark.heavy
def test_driver_killed_at_the_end_is_resumed_to_the_bits_of_an_undisturbed_sweep(
    tmp_path, undisturbed
):
    write_sweep(tmp_path, SLOW)
    killed = interrupt(tmp_path, signal.SIGKILL, "final  ")
    assert killed.code == -signal.SIGKILL
    resumed = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert_as_if_undisturbed(assert_resumed_to_the_end(tmp_path, resumed), undisturbed)


@pytest.mark.heavy
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_mlflow_is_being_opened_leaves_no_run_running(tmp_path, signum):
    write_sweep(tmp_path, tiny(experts__rho=0.01))
    with running_sweep(tmp_path, "sweep.yaml") as process:
        wait_until("the parent run", lambda: parent_run(tmp_path), seconds=120, every=0.01)
        os.kill(process.pid, signum)
        code = process.wait(timeout=120)
    assert code == 128 + signum
    assert [r for r in mlflow_runs(tmp_path) if r.info.status == "RUNNING"] == []
    resumed = run_sweep(tmp_path, "sweep.yaml", "--resume")
    assert_resumed_to_the_end(tmp_path, resumed)


def parent_run(folder: Path) -> bool:
    """Whether MLflow's file has a run; looked up without MLflow, which would take its time."""
    import sqlite3

    path = folder / "mlflow.db"
    if not path.exists():
        return False
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
            return connection.execute("select count(*) from runs").fetchone()[0] > 0
    except sqlite3.OperationalError:
        return False


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one trial that was finished, and then asked for a second one."""
    folder = tmp_path_factory.mktemp("extended")
    done = run_to_the_end(folder, tiny(experts__rho=0.01, search__trials=1))
    assert len(done.ended) == 1
    more = run_sweep(folder, "sweep.yaml", "search.trials=2", "--resume")
    assert more.code == 0, more.out + more.err
    return folder


@pytest.mark.heavy
def test_finished_sweep_asked_for_more_trials_goes_on(extended):
    assert sum(summary_of(extended)["trials"].values()) == 2
    assert {r.info.status for r in mlflow_runs(extended)} == {"FINISHED"}


def forget_newer_keys(folder: Path) -> None:
    """Makes the saved sweep one from before some keys of the store were there."""
    path = folder / "runs" / "tiny" / "sweep.yaml"
    saved = yaml.safe_load(path.read_text())
    for key in ("precision", "cache_mb"):
        del saved["store"][key]
    path.write_text(yaml.safe_dump(saved))


def test_sweep_from_before_a_key_was_there_agrees_with_its_default_alone(here, capsys):
    saved = here / "runs" / "tiny" / "sweep.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text(yaml.safe_dump(load_config_in(here).resolved()))
    forget_newer_keys(here)
    assert main(["sweep.yaml", "--resume", "--dry-run", "store.cache_mb=5"]) == 0
    capsys.readouterr()
    assert main(["sweep.yaml", "--resume", "--dry-run", "store.precision=float16"]) == 2
    said = capsys.readouterr().err
    assert (
        "was started with store.precision='float32', and now it is store.precision='float16'"
        in said
    )


@pytest.mark.heavy
def test_sweep_from_before_a_key_was_there_goes_on(extended):
    before = summary_of(extended)["trials"]
    forget_newer_keys(extended)
    more = run_sweep(extended, "sweep.yaml", "search.trials=3", "--resume")
    assert more.code == 0, more.out + more.err
    after = summary_of(extended)["trials"]
    assert sum(after.values()) == sum(before.values()) + 1 == 3
    assert after["failed"] == 0


# --- half the bytes -------------------------------------------------------------------------


@pytest.mark.heavy
def test_sweep_of_half_precision_runs_on_expert_sets_of_its_own(tmp_path, undisturbed):
    point = {"experts.rho": 0.01}
    experts = next(e for p, e in undisturbed.config.expert_points() if p == point)
    description = make_description(undisturbed.config)
    whole = set_key(undisturbed.config.identity(experts, description))
    shutil.copytree(undisturbed.folder / "store" / whole, tmp_path / "store" / whole)
    before = files_of(tmp_path / "store")
    tree = tiny(experts__rho=0.01, search__trials=2, store__uri=str(tmp_path / "store"))
    tree["store"]["precision"] = "float16"
    half = run_to_the_end(tmp_path / "half", tree)
    assert before.items() <= files_of(tmp_path / "store").items()
    assert half.summary["trials"] == {"complete": 2, "pruned": 0, "failed": 0}
    assert half.summary["experts"]["built"] == 2 and half.summary["experts"]["reused"] == 0
    assert "for the experts to build in float16" in half.ran.out
    store = TrajectoryStore(str(tmp_path / "store"))
    keys = [p.name for p in (tmp_path / "store").iterdir() if (p / "set.json").exists()]
    sets = sorted((store.at(k) for k in keys), key=lambda s: s.precision)
    assert [s.precision for s in sets] == ["float16", "float32"]
    for a, b in zip(*(s.segment(0, 0, 3) for s in sets), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert not np.array_equal(a, b)


# --- determinism ----------------------------------------------------------------------------


@pytest.mark.heavy
def test_same_seed_twice_gives_the_same_experts_and_the_same_set_bit_for_bit(tmp_path, undisturbed):
    again = run_to_the_end(tmp_path, SLOW)
    assert_as_if_undisturbed(again, undisturbed)
    assert [e.value for e in again.ended] == [e.value for e in undisturbed.ended]
    keys = ("best", "baseline", "trials")
    strip = {"artifact"}
    for key in keys:
        a, b = again.summary[key], undisturbed.summary[key]
        assert {k: v for k, v in a.items() if k not in strip} == {
            k: v for k, v in b.items() if k not in strip
        }


@pytest.mark.heavy
def test_other_seed_reuses_the_experts_and_gives_another_set(tmp_path, undisturbed):
    store = undisturbed.folder / "store"
    write_sweep(tmp_path, SLOW | {"seed": 1, "store": {"uri": str(store)}})
    before = files_of(store)
    ran = run_sweep(tmp_path, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    summary = summary_of(tmp_path)
    assert summary["experts"]["built"] == 0
    assert summary["experts"]["reused"] >= 2
    assert files_of(store) == before
    ours = np.load(io.BytesIO((tmp_path / "runs/tiny/best/synthetic.npz").read_bytes()))["images"]
    theirs = np.load(undisturbed.output / "best" / "synthetic.npz")["images"]
    assert not np.array_equal(ours, theirs)


# --- nothing usable -------------------------------------------------------------------------


@pytest.mark.heavy
def test_sweep_of_which_every_trial_fails_exits_1_with_the_reasons(tmp_path):
    write_sweep(tmp_path, tiny(experts__rho=0.01, distill__lr_lr=1e30, search__trials=3))
    ran = run_sweep(tmp_path, "sweep.yaml")
    assert ran.code == 1, ran.out + ran.err
    summary = summary_of(tmp_path)
    assert summary["state"] == "failed"
    assert summary["trials"] == {"complete": 0, "pruned": 0, "failed": 3}
    assert summary["best"] is None
    assert ran.out.count("failed: step") == 3
    (failure,) = summary["failures"]
    assert failure["trials"] == [0, 1, 2] and "lr_lr" in failure["remedy"]
    assert ran.out.count("warning    3 of the first 3 trials failed for one reason.") == 1
    assert "failures    3 trials: " in ran.out
    assert "3 trials: " in (tmp_path / "runs" / "tiny" / "report.html").read_text()
    again = run_sweep(tmp_path, "sweep.yaml", "search.trials=4", "--resume")
    assert again.code == 1, again.out + again.err
    assert "failures    4 trials: " in again.out and "failed for one reason" not in again.out
    assert [r for r in mlflow_runs(tmp_path) if r.info.status == "RUNNING"] == []


@pytest.mark.heavy
def test_experts_that_diverge_fail_their_trials_with_that_reason(tmp_path):
    write_sweep(tmp_path, tiny(experts__lr=1e30, experts__rho=0.01, search__trials=1))
    ran = run_sweep(tmp_path, "sweep.yaml")
    assert ran.code == 1, ran.out + ran.err
    done = Done(tmp_path, ran)
    (ended,) = done.ended
    assert ended.state == "failed"
    assert "diverged" in ended.reason and "experts.lr" in ended.reason
    assert done.study.frozen(0).user_attrs[DIVERGED] is True


# --- a cluster ------------------------------------------------------------------------------


@pytest.mark.heavy
def test_second_sweep_of_a_cluster_reuses_the_experts_of_the_first(tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        for name in ("first", "second"):
            tree = tiny(name=name, experts__rho=0.0, search__trials=1, store__uri=f"{tmp_path}/s")
            write_sweep(tmp_path / name, tree)
            ran = run_sweep(tmp_path / name, "sweep.yaml", "--address", cluster.address)
            assert ran.code == 0, ran.out + ran.err
        first, second = (summary_of(tmp_path / n, n)["experts"] for n in ("first", "second"))
        assert (first["built"], first["reused"]) == (2, 0)
        assert (second["built"], second["reused"]) == (0, 2)
        assert second["seconds"] == 0
    finally:
        cluster.shutdown()


@pytest.mark.heavy
def test_cluster_that_does_not_answer_is_one_line_and_exit_2(tmp_path):
    write_sweep(tmp_path)
    ran = run_sweep(tmp_path, "sweep.yaml", "--address", "127.0.0.1:9")
    assert ran.code == 2
    assert "127.0.0.1:9" in ran.err and ran.err.count("\n") == 1


def test_store_of_a_sweep_is_read_by_its_keys(done):
    store = TrajectoryStore(str(done.folder / "store"))
    for params, experts in done.config.expert_points():
        identity = done.config.identity(experts, make_description(done.config))
        found = store.expert_set(identity)
        assert found.complete(3) == [0, 1], params
        for i in found.complete(3):
            found.verify(i)


def test_search_config_of_the_shared_sweep_is_what_the_file_says(done):
    assert done.config.search == SearchConfig(
        trials=5, concurrency=1, sampler="grid", pruner="asha", reduction_factor=2
    )
