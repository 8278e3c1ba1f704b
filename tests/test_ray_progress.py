"""What is said of the experts while they train: one line, and metrics in MLflow."""

import io
from typing import Any

import pytest
from mlflow import MlflowClient
from ray_helpers import parse_tiny
from rich.console import Console

from ftd_ray.experts.orders import FleetStatus, NodeStatus, SetStatus
from ftd_ray.progress import ExpertLine, Progress, duration, folded, per_second
from ftd_ray.tracking import tracker as tracking
from ftd_ray.tracking.tracker import Tracker


def set_status(needed: int, present: int = 0, built: int = 0, **given: Any) -> SetStatus:
    """A set whose first ``built`` experts were trained for us."""
    fields: dict[str, Any] = {
        "epochs": 50,
        "running": {},
        "ours": frozenset(),
        "epochs_left": 0,
        "curves": {},
        "broker": "one",
    }
    return SetStatus(
        needed=needed,
        present=frozenset(range(present)),
        built=dict.fromkeys(range(built), 2.0),
        **(fields | given),
    )


def nodes(*rates: tuple[int, float]) -> dict[str, NodeStatus]:
    return {
        f"10.0.0.{i}": NodeStatus(running=running, epochs_per_second=rate)
        for i, (running, rate) in enumerate(rates, 1)
    }


def line(**fields: Any) -> str:
    shown = ExpertLine()
    shown.update(FleetStatus(**fields))
    return shown.text().removeprefix("experts    ")


# --- the line -------------------------------------------------------------------------------


def test_line_counts_over_all_sets_and_tells_what_was_there_already():
    sets = {"a": set_status(10, 4, 1), "b": set_status(10, 10)}
    assert line(sets=sets) == "14/20, 13 from the store"
    assert line(sets={"a": set_status(10, 4, 4)}) == "4/10"
    assert line() == "0/0"


def test_line_tells_the_rate_and_when_the_experts_may_be_there():
    a = set_status(10, 2, 2, running={2: 7, 3: 0}, epochs_left=300)
    b = set_status(5, epochs_left=300)
    text = line(sets={"a": a, "b": b}, nodes=nodes((2, 0.5)))
    assert text == "2/15, 2 in training, 0.5 epochs/s, about 20 min to go"
    assert line(sets={"a": a}) == "2/10, 2 in training"  # nothing is known of the rate yet
    whole = set_status(2, 2, 2)
    assert line(sets={"a": whole}, nodes=nodes((0, 0.5))) == "2/2"


def test_line_tells_of_actors_that_wait_for_room_as_long_as_experts_are_missing():
    assert line(sets={"a": set_status(4)}, starting=3) == "0/4, 3 waiting for room"
    assert line(sets={"a": set_status(4, 4)}, starting=3) == "4/4, 4 from the store"


def test_line_tells_the_accuracy_of_finished_experts_at_the_end_of_what_was_trained():
    curves = {0: {0: 0.1, 49: 0.5, 50: 0.6}, 1: {50: 0.7}, 2: {50: 0.0}, 3: {}}
    sets = {"a": set_status(4, 2, 2, curves=curves)}
    assert line(sets=sets) == "2/4, validation 65.0 %"


def test_line_names_a_few_nodes_and_counts_many():
    a = set_status(9, running={1: 1, 2: 1, 3: 1})
    assert line(sets={"a": a}, nodes=nodes((3, 0))) == "0/9, 3 in training"
    two = nodes((2, 0), (1, 0), (0, 0))
    assert line(sets={"a": a}, nodes=two) == "0/9, 3 in training (10.0.0.1: 2, 10.0.0.2: 1)"
    many = nodes(*[(4, 0.0)] * 12)
    assert line(sets={"a": a}, nodes=many) == "0/9, 3 in training on 12 nodes"


def test_counts_change_with_what_is_there_and_not_with_what_is_under_way():
    shown = ExpertLine()
    assert shown.update(FleetStatus(sets={"a": set_status(4)}))
    assert not shown.update(FleetStatus(sets={"a": set_status(4, running={0: 1})}))
    assert shown.update(FleetStatus(sets={"a": set_status(4, 1, 1)}))


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0123, "0.012"), (0.26, "0.26"), (3.44, "3.4"), (127.3, "127")]
)
def test_rates_are_numbers_that_one_reads(rate, text):
    assert per_second(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_rounded_to_what_matters(seconds, text):
    assert duration(seconds) == text


# --- on a terminal --------------------------------------------------------------------------

BUSY = FleetStatus(
    sets={
        "a": set_status(
            100,
            40,
            20,
            running={40: 1, 41: 3, 42: 1},
            epochs_left=30_000,
            curves={0: {50: 0.612}},
        )
    },
    nodes=nodes((2, 0.26), (1, 0.5)),
    starting=11,
)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_foot_is_broken_between_facts_and_no_line_is_too_wide(width):
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    with Progress(console, 10, 2, {}) as progress:
        progress.experts(BUSY)
        before = output.tell()
        console.print(progress._foot())
    text = output.getvalue()[before:]
    whole = line(sets=BUSY.sets, nodes=BUSY.nodes, starting=11)
    for fact in whole.split(", "):
        assert fact in text
    assert "trials     0/10" in text
    assert all(len(row.rstrip()) <= width for row in text.splitlines())


def test_line_that_fits_stays_whole_and_others_go_on_below_their_text():
    assert folded("experts    1/2, 3 in training", 80) == "experts    1/2, 3 in training"
    assert (
        folded("experts    1/2, 3 in training", 20) == "experts    1/2,\n           3 in training"
    )


def test_elsewhere_a_line_is_said_for_every_expert_done_and_no_more():
    output = io.StringIO()
    with Progress(Console(file=output, width=80), 0, 0, {}) as progress:
        progress.experts(FleetStatus())
        for status in (BUSY, BUSY, FleetStatus(sets={"a": set_status(100, 41, 21)})):
            progress.experts(status)
    rows = output.getvalue().splitlines()
    assert rows[0] == "experts    " + line(sets=BUSY.sets, nodes=BUSY.nodes, starting=11)
    assert rows[1:] == ["experts    41/100, 20 from the store"]


# --- MLflow ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with its tables, which take a while to make."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    MlflowClient(tracking_uri=uri).search_experiments()
    return uri


@pytest.fixture
def tracker(uri, tmp_path, request, monkeypatch) -> Any:
    monkeypatch.setattr(tracking, "FLEET_SECONDS", 0)
    made = Tracker(uri, request.node.name, str(tmp_path))
    open_parent(made)
    yield made
    made.finish("FINISHED")


def open_parent(tracker: Tracker, parent: str | None = None) -> None:
    config = parse_tiny()
    tracker.start("tiny", config.resolved(), {"experts.rho": "rho"}, parent)
    for key, rho in (("aaaa", 0.0), ("bbbb", 0.01)):
        tracker.expert_set(key, {"experts": {"rho": rho}}, "/store", {"experts.rho": rho})


class Look:
    """What MLflow holds, seen by another client."""

    def __init__(self, tracker: Tracker) -> None:
        self.client = MlflowClient(tracking_uri=tracker.uri)
        self.drain = lambda: tracker.drain(60)
        self.parent = tracker.parent_id
        self.experiment = tracker.experiment_id

    def run_of(self, key: str) -> Any:
        assert self.drain() == 0
        (run,) = self.client.search_runs([self.experiment], f"tags.`ftd.expert_set` = '{key}'")
        return run

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        assert self.drain() == 0
        found = self.client.get_metric_history(run_id, metric)
        return sorted((m.step, m.value) for m in found)


def test_experts_in_training_are_metrics_of_their_set_and_of_the_fleet(tracker):
    look = Look(tracker)
    for epochs, present in ((3, 0), (50, 1)):
        curves = {0: {e: e / 100 for e in range(epochs + 1)}, 1: {0: 0.1}}
        a = set_status(2, present, present, running={1: 0}, curves=curves)
        sets = {"aaaa": a, "bbbb": set_status(2)}
        tracker.fleet(FleetStatus(sets=sets, nodes=nodes((1, 0.5), (2, 1.5))))
        tracker.drain(60)  # the same value in the same millisecond would be one
    run = look.run_of("aaaa")
    assert run.info.status == "RUNNING"
    assert look.history(run.info.run_id, "experts_done") == [(3, 0), (50, 1)]
    assert run.data.metrics["experts_needed"] == 2
    assert look.history(run.info.run_id, "expert_val_accuracy_so_far") == [(50, 0.5)]
    assert look.run_of("bbbb").data.metrics["experts_done"] == 0
    assert [v for _, v in look.history(look.parent, "fleet/epochs_per_second")] == [2.0, 2.0]
    for node, (running, rate) in {"10.0.0.1": (1, 0.5), "10.0.0.2": (2, 1.5)}.items():
        assert [v for _, v in look.history(look.parent, f"fleet/{node}/experts_running")] == [
            running
        ] * 2
        assert [v for _, v in look.history(look.parent, f"fleet/{node}/epochs_per_second")] == [
            rate
        ] * 2


def test_complete_set_is_closed_once_with_its_cost_and_its_curve(tracker):
    look = Look(tracker)
    curves = {0: {0: 0.1, 1: 0.4}, 1: {0: 0.3, 1: 0.8}}
    whole = {"aaaa": set_status(3, 3, 2, curves=curves), "bbbb": set_status(2)}
    tracker.fleet(FleetStatus(sets=whole))
    run = look.run_of("aaaa")
    assert run.info.status == "FINISHED"
    assert look.history(run.info.run_id, "expert_val_accuracy") == [
        (0, pytest.approx(0.2)),
        (1, pytest.approx(0.6)),
    ]
    found = run.data.metrics
    assert (found["experts_built"], found["experts_reused"], found["seconds"]) == (2, 1, 4.0)
    assert look.run_of("bbbb").info.status == "RUNNING"
    for _ in range(2):
        tracker.fleet(FleetStatus(sets=whole), last=True)
    again = look.run_of("aaaa")
    assert again.info.end_time == run.info.end_time
    for metric in ("experts_built", "experts_done", "expert_val_accuracy"):
        assert len(look.history(run.info.run_id, metric)) == (2 if "accuracy" in metric else 1)


def test_set_that_an_earlier_session_closed_stays_as_it_was(tracker, uri, request, tmp_path):
    look = Look(tracker)
    tracker.fleet(FleetStatus(sets={"aaaa": set_status(2, 2, 2)}))
    before = look.run_of("aaaa")
    later = Tracker(uri, request.node.name, str(tmp_path))
    open_parent(later, tracker.parent_id)
    later.fleet(FleetStatus(sets={"aaaa": set_status(2, 2), "bbbb": set_status(2, 2)}))
    later.finish("FINISHED")
    after = look.run_of("aaaa")
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert after.data.metrics == before.data.metrics
    assert look.run_of("bbbb").data.metrics["experts_reused"] == 2


def test_words_of_the_fleet_are_written_every_few_seconds_and_at_once_when_a_set_is_complete(
    tracker, monkeypatch
):
    monkeypatch.setattr(tracking, "FLEET_SECONDS", 1000)
    look, run_id = Look(tracker), Look(tracker).run_of("bbbb").info.run_id
    ahead = set_status(2, 2, 2)  # no trial has asked for it, so it has no run yet
    for epoch in (1, 2, 3):
        b = set_status(2, curves={0: {epoch: 0.5}})
        tracker.fleet(FleetStatus(sets={"aaaa": set_status(2), "bbbb": b, "cccc": ahead}))
    assert look.history(run_id, "experts_done") == [(1, 0)]
    tracker.fleet(FleetStatus(sets={"aaaa": set_status(2, 2, 2), "bbbb": b}))
    assert look.run_of("aaaa").info.status == "FINISHED"
    assert look.history(run_id, "experts_done") == [(1, 0), (3, 0)]
    tracker.fleet(FleetStatus(sets={"aaaa": set_status(2, 2, 2), "bbbb": b}))
    assert look.history(run_id, "experts_done") == [(1, 0), (3, 0)]
    tracker.fleet(FleetStatus(sets={"bbbb": b}), last=True)
    assert look.history(run_id, "experts_done") == [(1, 0), (3, 0), (3, 0)]


def test_no_fleet_no_metrics_of_it(tracker):
    tracker.fleet(FleetStatus(sets={"aaaa": set_status(2, 2)}))
    assert tracker.drain(60) == 0
    parent = MlflowClient(tracking_uri=tracker.uri).get_run(tracker.parent_id)
    assert [m for m in parent.data.metrics if m.startswith("fleet/")] == []
