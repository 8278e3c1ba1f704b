"""The benchmark measures what it says it measures."""

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, evaluation, experts, matching, scale
from benchmarks.__main__ import PARTS, devices, merged, page
from benchmarks.report import HERE, conditions, machine, read_results
from benchmarks.watch import Watch
from ftd.matching import InnerStep

MACHINE = {
    "processor": "Some CPU", "cpus": 2, "memory_gib": 24, "python": "3.11", "torch": "2.11",
    "date": "2026-01-01",
}  # fmt: skip


@pytest.fixture
def double() -> Iterator[None]:
    with compare.double():
        yield


# --- the same numbers -----------------------------------------------------------------------


def test_matching_steps_have_the_same_loss_and_gradients() -> None:
    assert matching.difference(matching.Case(2, 4, "ConvNetD1W8"), torch.float64) < 1e-12


def test_matching_steps_on_a_part_of_the_images_have_the_same_gradients() -> None:
    p = matching.problem(matching.Case(2, 3, "ConvNetD1W8"), dtype=torch.float64)
    steps = [
        InnerStep(torch.arange(k, 20, 2), s.draw and s.draw.rows(0, 10))
        for k, s in zip((0, 1, 0), p.steps, strict=True)
    ]
    p = replace(p, steps=steps)
    for a, b in zip(matching.ours(p), matching.theirs(p), strict=True):
        assert compare.relative(a, b) < 1e-12


def test_a_matching_step_is_the_same_at_every_call() -> None:
    case = matching.Case(1, 3, "ConvNetD1W8")
    for a, b in zip(
        matching.ours(matching.problem(case)), matching.ours(matching.problem(case)), strict=True
    ):
        assert a.equal(b)


@pytest.mark.usefixtures("double")
def test_experts_take_the_same_epoch() -> None:
    assert experts.difference(experts.Case(40, 2, "ConvNetD1W8", batch_size=16)) < 1e-12


@pytest.mark.usefixtures("double")
def test_evaluations_train_the_same_networks_to_the_same_accuracies() -> None:
    weights, accuracy = evaluation.difference(evaluation.Case(2, 5, 60, 2, "ConvNetD1W8"))
    assert weights < 1e-12 and accuracy == 0


def test_nothing_is_measured_when_the_numbers_differ() -> None:
    compare.check({"float64": 1e-14, "float32": 1e-3})
    for wrong in ({"float64": 1e-6, "float32": 1e-6}, {"float64": 1e-14, "float32": 0.3}):
        with pytest.raises(AssertionError, match="do not give the same numbers"):
            compare.check(wrong)


# --- measurements ---------------------------------------------------------------------------


def test_a_measurement_runs_in_a_process_of_its_own() -> None:
    for variant in compare.VARIANTS:
        found = compare.in_a_process("matching", matching.CURVES["N"][5], variant, "cpu")
        assert found["seconds"] > 0 and found["mib"] > 10


def test_on_a_gpu_memory_is_what_its_allocator_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(compare.Numerics, "apply", lambda self: torch.device(self.device))
    for name, answer in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 3 * 2**20),
        ("max_memory_allocated", 10 * 2**20),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name, answer=answer: seen.append(name) or answer
        )

    def work(case: str, variant: str, device: torch.device) -> Any:
        return lambda: seen.append(f"{case} {variant} {device}")

    found = compare.measure(work, "a case", "ours", "cuda", "a warm-up")
    assert found["mib"] == 7
    run = "a case ours cuda"  # twice: its first run chooses kernels
    assert [s for s in seen if s in (run, "synchronize")] == [run, "synchronize"] * 2


def test_variants_take_turns_and_ratios_are_taken_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[str] = []

    def fake(part: str, case: str, variant: str, device: str) -> dict[str, float]:
        turns.append(variant)
        drift = 1.0 + len(turns[1:]) // 2
        return {"seconds": drift * (2 if variant == "textbook" else 1), "mib": 10.0}

    monkeypatch.setattr(compare, "in_a_process", fake)
    row = compare.side_by_side("matching", "some case", "cpu", repeats=2)
    assert turns == ["textbook", "ours"] * 2
    assert row["ratios"] == {"seconds": [0.5, 0.5], "mib": [1.0, 1.0]}


def test_a_curve_leaves_the_textbook_version_out_where_it_needs_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(part: str, case: str, variant: str, device: str) -> dict[str, float]:
        return {"seconds": 1.0, "mib": 1000.0 * int(case) if variant == "textbook" else 50.0}

    monkeypatch.setattr(compare, "in_a_process", fake)
    points = compare.curve("matching", {x: str(x) for x in (1, 5, 10, 20)}, "cpu")
    assert [p["x"] for p in points if "textbook" in p] == [1, 5]
    assert [p["x"] for p in points if "ours" in p] == [1, 5, 10, 20]


# --- the page -------------------------------------------------------------------------------


def runs(seconds: Sequence[float], mib: float) -> list[dict[str, float]]:
    return [{"seconds": s, "mib": mib} for s in seconds]


def canned(part: Any, factor: float = 1.0) -> dict[str, Any]:
    """Results of a part: the textbook takes 3 s, ours ``factor`` s."""
    rows = []
    for name in part.CASES:
        textbook, ours = runs((3, 2, 4), 1000), runs((factor, 2 * factor / 3, 4 * factor / 3), 50)
        ratios = {"seconds": [factor / 3] * 3, "mib": [0.05] * 3}
        both = {"textbook": textbook, "ours": ours}
        row: dict[str, Any] = {"case": name, "runs": both, "ratios": ratios}
        if name in getattr(part, "ALONE", ()):
            row = {"case": name, "runs": {"ours": runs((100.0,), 3000)}, "ratios": {}}
        rows.append(row)
    rng = random.Random(0)
    curves = {
        key: [
            {"x": x} | {v: runs((x * rng.uniform(0.1, 0.2),), 20 * x)[0] for v in compare.VARIANTS}
            for x in points
        ]
        for key, points in getattr(part, "CURVES", {}).items()
    }
    differences = {"float64": 1e-15, "float32": 2e-6, "accuracy": 0.0}
    return {
        "threads": 2, "backend": "some backend", "differences": differences, "rows": rows,
        "curves": curves,
    }  # fmt: skip


def record(part: Any) -> dict[str, Any]:
    return {"machine": MACHINE, "results": canned(part)}


GPU = {"machine": MACHINE | {"gpu": "Some GPU", "date": "2025-12-31"}}


def test_the_page_shows_medians_spread_and_targets() -> None:
    shown = page({"matching": record(matching)})
    assert "Some CPU, 2 CPUs, 24 GiB, Python 3.11, torch 2.11, 2026-01-01." in shown
    assert (
        "| IPC 10, N = 30 | time | at most x 0.33: reached "
        "| 3.00 s (2.00 s … 4.00 s) | 1.00 s (0.67 s … 1.33 s) | x 0.33 (x 0.33 … x 0.33) |"
    ) in shown
    assert (
        "| 1,000 images a step, N = 80 | memory | at most 2,048 MiB: not reached "
        "| – | 3,000 MiB | – |"
    ) in shown
    assert "GPU figures: none yet." in shown and "GPU: ours" not in shown


@pytest.mark.parametrize("name", [n for n, part in PARTS.items() if part.compared])
def test_every_compared_part_shows_both_devices_and_draws(name: str, tmp_path: Path) -> None:
    part = {"matching": matching, "experts": experts, "evaluation": evaluation}[name]
    both = record(part) | {"gpu": GPU | {"results": canned(part, 0.3)}}
    shown = page({name: both})
    assert "GPU: ours ÷ textbook" in shown and "x 0.10 (x 0.10 … x 0.10) |" in shown
    assert (
        "GPU figures: backend some backend; Some GPU, Some CPU" in shown and "2025-12-31." in shown
    )
    widths = {line.count("|") for line in shown.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    if both["results"]["curves"]:
        part.draw(both, tmp_path)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_run_without_a_gpu_keeps_the_gpu_figures() -> None:
    gpu = {"gpu": GPU | {"results": canned(matching)}}
    before = {"matching": record(matching) | gpu, "segments": {"machine": MACHINE, "results": {}}}
    new = {"machine": MACHINE | {"date": "2026-02-02"}, "results": canned(matching)}
    after = merged(before, "matching", new)
    assert after["matching"] == new | gpu and after["segments"] == before["segments"]


def test_a_run_on_a_gpu_alone_keeps_the_cpu_figures() -> None:
    gpu = {"gpu": GPU | {"results": canned(matching)}}
    assert merged({"matching": record(matching)}, "matching", gpu)["matching"] == (
        record(matching) | gpu
    )
    assert "##" not in page(merged({}, "matching", gpu))  # nothing to compare it with yet


def test_without_a_gpu_only_the_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices(None) == ("cpu",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices(None) == ("cpu", "cuda") and devices("cuda") == ("cuda",)


def test_conditions_leave_out_packages_that_are_not_there() -> None:
    here = machine()
    assert f"Ray {here['ray']}" in conditions(here)
    assert "Ray" not in conditions({k: v for k, v in here.items() if k != "ray"})


def test_the_page_is_that_of_the_results() -> None:
    assert page(read_results()) == (HERE / "README.md").read_text()


# --- a large cluster ------------------------------------------------------------------------


def test_sizes_that_are_not_named_stay() -> None:
    assert scale.Size.of("nodes=8,trials=50") == replace(scale.Size(), nodes=8, trials=50)
    with pytest.raises(ValueError, match="FTD_SCALE names knodes"):
        scale.Size.of("knodes=8")


def test_requests_are_counted_by_time_place_and_kind() -> None:
    line = '127.0.0.1 - - [26/Nov/2026 12:00:{}] "{} HTTP/1.1" 200 -\n'
    log = "".join(
        line.format(*asked)
        for asked in (
            ("01", "GET /buffers?list-type=2&max-keys=1000&prefix=store/3647/"),
            ("01", "\x1b[33mHEAD /buffers/store/3647/set.json"),
            ("02", "\x1b[35m\x1b[1mGET /buffers/store/3647/set.json"),
            ("03", "PUT /buffers/sweep/trials/0001/synthetic.npz"),
            ("03", "PUT /buffers"),
        )
    )
    asked = scale.requests_of(log)
    begin = asked[0].time
    assert scale.between(asked, begin, begin + 1) == {"store": {"LIST": 1, "HEAD": 1}, "sweep": {}}
    assert scale.between(asked, begin, begin + 9) == {
        "store": {"LIST": 1, "HEAD": 1, "GET": 1},
        "sweep": {"PUT": 1},
    }


def test_processes_are_watched_by_their_role() -> None:
    command = [sys.executable, "-c", "while True: sum(range(1000))", "a worker"]
    with subprocess.Popen(command) as process:
        try:
            watch = Watch({"worker": ("a worker",), "other": ("nobody",)}, lambda: 7)
            while not watch.samples or watch.samples[-1]["worker"]["cpu"] < 0.2:
                watch.sample()
        finally:
            process.kill()
    watch.sample()
    first, *_, last = watch.samples
    assert first["worker"]["count"] == 1 and first["worker"]["mib"] > 1 and first["done"] == 7
    assert last["worker"]["count"] == 0 and last["worker"]["cpu"] >= 0.2
    assert last["other"] == {"cpu": 0.0, "mib": 0.0, "count": 0}
