"""Pictures of a search: what they show, and that no space and no lack of trials breaks them."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from ftd_ray.pictures import caption, contact_sheet, short_names, study_pictures
from ftd_ray.pictures.front import dominated
from ftd_ray.pictures.places import ABSENT, ABSENT_PLACE, place, place_of, ticks, value_text
from ftd_ray.pictures.sheet import MAX_PIXELS
from ftd_ray.search import Ended
from ftd_ray.space import Dimension, parse_dimension

RHO = parse_dimension("experts.rho", {"choice": [0.0, 0.01, 0.05]})
STEPS = parse_dimension("distill.syn_steps", {"choice": [10, 20]})
EPOCHS = parse_dimension("distill.expert_epochs", {"int": [1, 2]})
LR = parse_dimension("distill.lr_img", {"float": [1, 1000], "log": True})
SHARPNESS = parse_dimension("experts.sharpness", {"choice": ["none", "sam"]})


def trial(number: int, value: float | None = 0.5, state: str = "complete", **given: Any) -> Ended:
    """A trial; its parameters by their short names."""
    keys = {d.name: d.key for d in (RHO, STEPS, EPOCHS, LR, SHARPNESS)}
    values = given.pop("values", {})
    reports = {} if value is None else {10: value / 2, 20: value}
    params = {keys[name]: v for name, v in given.items()}
    return Ended(number, state, params, value, None, reports, values=values)


def texts(figure: Any) -> list[str]:
    """Everything that is written in a figure, after it was drawn."""
    figure.savefig(io.BytesIO(), dpi=50)
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [t.get_text() for t in found if t.get_visible() and t.get_text()]


def panels(figure: Any) -> list[Any]:
    """The axes that hold something, without colour bars."""
    return [a for a in figure.axes if a.axison and a.get_label() != "<colorbar>"]


@pytest.fixture(autouse=True)
def _no_picture_is_left_out():
    """A picture that fails is left out with a warning: here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- which pictures there are ---------------------------------------------------------------


def test_trials_of_one_objective_have_every_picture_but_a_front():
    trials = [trial(i, 0.5 + 0.1 * i, rho=0.01, syn_steps=10 + 10 * (i % 2)) for i in range(4)]
    names = ["history", "curves", "slices", "joint", "parallel_coordinates", "importance"]
    assert list(study_pictures(trials, [RHO, STEPS])) == names


def test_nothing_scored_gives_no_picture():
    assert study_pictures([], [RHO]) == {}
    assert study_pictures([trial(0, None, "failed", rho=0.0)], [RHO], ("accuracy", "ipc")) == {}


def test_trials_without_a_search_space_have_their_course_alone():
    assert list(study_pictures([trial(0), trial(1)], [])) == ["history", "curves"]


def test_joint_view_needs_one_of_its_three_dimensions_and_a_complete_trial():
    assert "joint" not in study_pictures([trial(0, lr_img=3.0)], [LR])
    assert "joint" not in study_pictures([trial(0, state="pruned", rho=0.0)], [RHO])


def test_picture_that_fails_is_left_out_with_a_warning_and_the_others_stay():
    stranger = trial(0, rho=0.77)  # no value of the space
    with pytest.warns(UserWarning, match="was left out"):
        assert "history" in study_pictures([stranger], [RHO])


def test_trial_that_won_is_marked_and_else_the_highest():
    trials = [trial(0, 0.6, rho=0.0), trial(1, 0.7, rho=0.01), trial(2, 0.9, "pruned", rho=0.0)]
    for best, marked in ((0, "best: trial 0"), (None, "best: trial 1"), (7, "best: trial 1")):
        figures = study_pictures(trials, [RHO], best=best)
        for name in ("curves", "slices"):
            assert {t for t in texts(figures[name]) if t.startswith("best: ")} == {marked}


# --- slices ---------------------------------------------------------------------------------


def test_slices_have_a_panel_for_each_dimension_what_the_method_is_about_first():
    some = trial(0, lr_img=30.0, expert_epochs=1, syn_steps=10, rho=0.0)
    figure = study_pictures([some], [LR, EPOCHS, STEPS, RHO])["slices"]
    labels = [a.get_xlabel() for a in panels(figure)]
    assert labels == ["rho", "syn_steps", "expert_epochs", "lr_img (log)"]


def test_slices_put_a_trial_without_a_value_at_a_place_of_its_own():
    trials = [trial(0, sharpness="sam", rho=0.05), trial(1, sharpness="none")]
    rho, sharpness = panels(study_pictures(trials, [RHO, SHARPNESS])["slices"])
    assert [t.get_text() for t in rho.get_xticklabels()] == [ABSENT, "0", "0.01", "0.05"]
    assert [t.get_text() for t in sharpness.get_xticklabels()] == ["none", "sam"]
    assert rho.get_xticks()[0] == ABSENT_PLACE < 0


def test_two_dimensions_of_one_name_are_told_apart():
    space = [Dimension("experts.lr", values=(1, 2)), Dimension("distill.lr", values=(1, 2))]
    some = Ended(0, "complete", {d.key: 1 for d in space}, 0.5, None, {1: 0.5})
    figure = study_pictures([some], space)["slices"]
    assert [a.get_xlabel() for a in panels(figure)] == ["experts.lr", "distill.lr"]


# --- the joint view -------------------------------------------------------------------------


def test_joint_view_has_a_panel_for_each_rho_even_where_nothing_was_tried():
    figure = study_pictures(
        [trial(0, 0.5, rho=0.0, syn_steps=10, expert_epochs=1)], [RHO, STEPS, EPOCHS]
    )["joint"]
    assert [a.get_title() for a in panels(figure)] == ["rho 0", "rho 0.01", "rho 0.05"]
    hatched = [len([p for p in a.patches if p.get_hatch()]) for a in panels(figure)]
    assert hatched == [3, 4, 4]


def test_cell_of_the_joint_view_is_the_mean_of_complete_trials_and_counts_all():
    point = {"rho": 0.01, "syn_steps": 20}
    trials = [
        trial(0, 0.40, **point),
        trial(1, 0.50, **point),
        trial(2, 0.10, "pruned", **point),
        trial(3, None, "failed", **point),
        trial(4, None, "failed", rho=0.0, syn_steps=10),
    ]
    written = texts(study_pictures(trials, [RHO, STEPS])["joint"])
    assert "45.0" in written and "2 of 4" in written and "0 of 1" in written


def test_values_with_dollars_are_shown_as_they_are():
    word = Dimension("experts.rho", values=("$\\frac$", "a$b"))
    some = Ended(0, "complete", {word.key: "a$b"}, 0.5, None, {1: 0.5})
    for figure in study_pictures([some], [word]).values():
        figure.savefig(io.BytesIO(), dpi=50)  # as mathematics it could not be drawn


def test_joint_view_groups_a_continuous_dimension_and_keeps_inactive_trials_apart():
    rho = parse_dimension("experts.rho", {"float": [0.001, 0.1], "log": True})
    some = [trial(0, 0.4, rho=0.001), trial(1, 0.5, rho=0.1), trial(2, 0.6)]
    (axes,) = panels(study_pictures(some, [rho])["joint"])
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert labels[0].startswith("0.001–") and labels[-2].endswith("–0.1") and labels[-1] == ABSENT
    empty = [bool(p.get_hatch()) for p in axes.patches]
    assert empty == [False, True, True, True, False, False]


# --- parallel coordinates and importance ----------------------------------------------------


def test_line_of_a_trial_passes_below_the_axis_where_it_has_no_value():
    trials = [trial(0, sharpness="sam", rho=0.05), trial(1, sharpness="none")]
    figure = study_pictures(trials, [SHARPNESS, RHO])["parallel_coordinates"]
    lines = [ln.get_ydata() for ln in figure.axes[0].lines if len(ln.get_ydata()) == 3]
    assert sorted(round(y[1]) for y in lines) == [0, 1]
    assert min(y[1] for y in lines) == pytest.approx(ABSENT_PLACE, abs=0.02)
    assert ABSENT in texts(figure)


def test_importance_leaves_out_what_not_all_trials_have_and_says_so():
    trials = [
        trial(i, 0.3 + 0.05 * i, syn_steps=10 + 10 * (i % 2), lr_img=10.0 + i) for i in range(8)
    ]
    trials.append(trial(8, 0.7, syn_steps=20, lr_img=5.0, rho=0.01))
    written = texts(study_pictures(trials, [RHO, STEPS, LR])["importance"])
    assert {"syn_steps", "lr_img"} <= set(written)
    assert "rho" not in written
    assert "Without rho: not active in every trial." in written


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([trial(0, 0.5, rho=0.0, syn_steps=10), trial(1, 0.5, rho=0.01, syn_steps=20)], "same"),
        ([trial(0, 0.5, syn_steps=10), trial(1, 0.6, rho=0.01, syn_steps=20)], "fewer than two"),
    ],
)
def test_importance_that_cannot_be_told_is_a_note_with_the_reason(trials, reason):
    written = " ".join(texts(study_pictures(trials, [RHO, STEPS])["importance"]))
    assert "Cannot be told" in written and reason in written


# --- the front ------------------------------------------------------------------------------


def test_front_has_a_panel_for_each_cost_named_in_words():
    trials = [
        trial(i, 0.5 + 0.1 * i, values={"accuracy": 0.5, "gpu_seconds": 10.0 * i + 5, "ipc": 1.0})
        for i in range(3)
    ]
    figure = study_pictures(trials, [], ("accuracy", "gpu_seconds", "ipc"))["front"]
    assert [a.get_xlabel() for a in panels(figure)] == ["GPU seconds", "images per class"]


def test_front_is_left_out_without_values_and_passes_over_trials_without_them():
    bare = [trial(0), trial(1, 0.6)]
    assert "front" not in study_pictures(bare, [], ("accuracy", "ipc"))
    valued = trial(2, 0.4, values={"accuracy": 0.4, "ipc": 10.0})
    figure = study_pictures([*bare, valued], [], ("accuracy", "ipc"))["front"]
    assert "2" in texts(figure)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12
    )
)
def test_dominated_is_what_another_is_as_good_as_everywhere_and_better_somewhere(points):
    def beats(a: Sequence[int], b: Sequence[int]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [any(beats(q, p) for q in points) for p in points]
    assert dominated(np.array(points)).tolist() == expected


# --- axes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [4, 6, 12])
@pytest.mark.parametrize(
    "d",
    [
        LR,
        RHO,
        parse_dimension("distill.ema_decay", {"float": [0.9, 0.999]}),
        parse_dimension("distill.ema_decay", {"float": [-3e-9, 2e-9]}),
        parse_dimension("distill.lr_img", {"float": [1e-9, 1e9], "log": True}),
        parse_dimension("distill.syn_steps", {"int": [1, 97]}),
        parse_dimension("distill.syn_steps", {"int": [1, 1000]}),
    ],
    ids=str,
)
def test_ticks_go_from_end_to_end_in_order_and_have_room(d, most):
    marks = ticks(d, most)
    places = [where for where, _ in marks]
    assert places == sorted(places) and (places[0], places[-1]) == (0, 1)
    assert len(marks) <= most + 1
    assert len({text for _, text in marks}) == len(marks)


def test_values_are_written_in_few_characters():
    values = [0.05, 100.0, 10000.0, 1e-05, 0.046415888, 30, "gsam", None, True, "a" * 40]
    written = ["0.05", "100", "10000", "1e-5", "0.04642", "30", "gsam", "None", "True"]
    assert [value_text(v) for v in values] == [*written, "a" * 13 + "…"]


def test_absent_value_has_a_place_below_all_values():
    assert place(RHO, trial(0)) < min(place_of(RHO, v) for v in RHO.values)


# --- any space ------------------------------------------------------------------------------

KEYS = ("experts.rho", "distill.syn_steps", "distill.expert_epochs", "distill.lr_img", "other.word")


@st.composite
def dimensions(draw: st.DrawFn, key: str) -> Dimension:
    kind = draw(st.sampled_from(["numbers", "words", "one", "linear", "log", "many"]))
    if kind == "numbers":
        values = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True))
        return parse_dimension(key, {"choice": values})
    if kind == "words":
        return parse_dimension(key, {"choice": ["a_very_long_word_" * 3, None, True, "$x_1$"]})
    if kind == "one":
        return parse_dimension(key, {"choice": [3]})
    if kind == "many":
        return parse_dimension(key, {"int": [1, draw(st.integers(10, 300))]})
    return parse_dimension(key, {"float": [1e-4, 50.0], "log": kind == "log"})


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[Dimension], list[Ended]]:
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True))
    space = [draw(dimensions(key)) for key in keys]
    trials = []
    for number in range(draw(st.integers(1, 6))):
        params = {}
        for d in space:
            if draw(st.booleans()) or draw(st.booleans()):  # else it is inactive
                choices = st.sampled_from(d.values) if d.discrete else st.floats(*d.bounds)
                params[d.key] = draw(choices)
        state = draw(st.sampled_from(["complete", "complete", "pruned", "failed", "interrupted"]))
        value = draw(st.floats(0, 1)) if state != "failed" or draw(st.booleans()) else None
        values = {}
        if state == "complete" and value is not None:
            values = {"accuracy": value, "cpu_seconds": draw(st.floats(0, 1e5))}
        reports = {} if value is None else {10: value}
        trials.append(Ended(number, state, params, value, None, reports, values=values))
    return space, trials


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],  # a failure is clear as it is, and drawing is slow
    suppress_health_check=[HealthCheck.too_slow],
)
@given(searches())
def test_every_space_and_every_course_of_a_search_can_be_drawn(search):
    space, trials = search
    for figure in study_pictures(trials, space, ("accuracy", "cpu_seconds")).values():
        figure.savefig(io.BytesIO(), dpi=20)


# --- the contact sheet ----------------------------------------------------------------------


def picture(width: int, height: int, red: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (red, 0, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def sheet(*entries: tuple[str, bytes]) -> Image.Image:
    return Image.open(io.BytesIO(contact_sheet(entries))).convert("RGB")


@pytest.mark.parametrize(
    ("width", "height", "sets"),
    [(1004, 104, 5), (1004, 1004, 5), (2004, 504, 5), (2004, 5004, 5), (104, 104, 1)],
    ids=["10 classes", "IPC 10", "100 classes", "100 classes at IPC 10", "one image"],
)
def test_contact_sheet_is_bounded_and_shows_every_set(width, height, sets):
    reds = [40 + 20 * i for i in range(sets)]
    made = sheet(*((f"trial {red}", picture(width, height, red)) for red in reds))
    assert made.width * made.height <= MAX_PIXELS
    column = [made.getpixel((30, y)) for y in range(made.height)]
    shown = list(dict.fromkeys(c[0] for c in column if c[1:] == (0, 60)))
    assert shown == reds
    assert all(column.count((red, 0, 60)) >= min(height, 60) for red in reds)


def test_small_sets_are_not_blown_up_and_captions_have_room():
    made = sheet(("trial 9 · 93.0 % · rho 0.05, syn_steps 20", picture(104, 104)))
    assert (np.array(made) == (128, 0, 60)).all(2).sum() == 104 * 104
    assert made.width > 400


def test_sheet_of_many_sets_shows_the_first_and_says_that_there_are_more():
    twenty = sheet(*[("trial", picture(100, 20))] * 20)
    thousand = sheet(*[("trial", picture(100, 20))] * 1000)
    assert twenty.height < thousand.height < twenty.height + 60


def test_sheet_without_sets_is_an_empty_picture():
    assert sheet().height > 0


def test_caption_names_trial_accuracy_and_values():
    some = trial(9, 0.9303, rho=0.05, syn_steps=20)
    assert caption(some, short_names([RHO, STEPS])) == "trial 9 · 93.0 % · rho 0.05, syn_steps 20"
    assert caption(trial(3, None), {}) == "trial 3"
