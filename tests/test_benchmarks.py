"""The benchmark measures what it says it measures."""

from benchmarks.matching import Case, in_a_process, relative_error, render, step

SMALL = Case("IPC 1, N = 50", "ConvNetD3", 1, 50)


def test_the_two_variants_are_compared_only_when_they_give_the_same_gradients() -> None:
    assert 0 <= relative_error(Case("small", "ConvNetD3", 1, 4)) < 1e-10


def test_a_case_is_the_same_step_at_every_call() -> None:
    case = Case("small", "ConvNetD1W8", 1, 3)
    a, b = step(case, "rematerialised"), step(case, "rematerialised")
    assert a.grad_images.equal(b.grad_images) and a.grad_lr.equal(b.grad_lr)


def test_the_page_shows_medians_spread_and_conditions() -> None:
    runs = [{"seconds": s, "mib": m} for s, m in ((1.0, 10.0), (3.0, 30.0), (2.0, 20.0))]
    row = {
        "case": {"name": "some case"},
        "relative_error": 1e-6,
        "runs": {"direct": runs, "rematerialised": runs},
        "ratios": {"seconds": [1.0, 1.1, 0.9], "mib": [0.1, 0.1, 0.1]},
    }
    page = "\n".join(render({"threads": 2, "rows": [row]}))
    assert "2.0 s (1.0 s … 3.0 s), 20 MiB (10 MiB … 30 MiB)" in page
    assert "2 threads" in page


def test_a_measurement_runs_in_a_process_of_its_own() -> None:
    found = in_a_process(SMALL, "rematerialised", threads=1)
    assert found["seconds"] > 0 and found["mib"] > 10
