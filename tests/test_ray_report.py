"""The page about a sweep: whole, escaped, in one file, and alive in a browser without a network."""

import copy
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftd_ray.report import LONGEST_REASON, report_html
from ftd_ray.results import result_text
from ftd_ray.search import Ended
from ftd_ray.space import parse_dimension

RHO = parse_dimension("experts.rho", {"choice": [0.0, 0.01, 0.05]})
STEPS = parse_dimension("distill.syn_steps", {"choice": [5, 10, 20, 100]})
LABELS = parse_dimension("distill.labels", {"choice": ["hard", "soft"]})
SPACE = [RHO, STEPS, LABELS]

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0\x90wS\xde"
    b"\0\0\0\x0cIDATx\x9cc\xb8\xb6\xf5\x1e\0\x04\xbe\x02Q\xa8\x8d\xf0\x12\0\0\0\0IEND\xaeB`\x82"
)

SUMMARY: dict[str, Any] = {
    "name": "mine",
    "state": "done",
    "seconds": 160.4,
    "best": {
        "trial": 2,
        "params": {"experts.rho": 0.05, "distill.syn_steps": 100, "distill.labels": "soft"},
        "val_accuracy": 0.9303,
        "val_accuracy_full": {"mean": 0.9383, "std": 0.0064, "n": 10},
        "test_accuracy": {"mean": 0.9438, "std": 0.0059, "n": 10},
        "artifact": "/runs/mine/best/synthetic.npz",
    },
    "baseline": {"random_real": {"mean": 0.7282, "std": 0.0513, "n": 10, "lr": 0.01}},
    "trials": {"complete": 2, "pruned": 1, "failed": 1},
    "experts": {"built": 3, "reused": 9, "seconds": 1.0, "bytes": 10},
    "mlflow": {
        "tracking_uri": "sqlite:////data/mlflow.db",
        "experiment": "mine",
        "parent_run_id": "5c86",
        "trials_path": "/#/experiments/1/runs?a=1&b=2",
    },
    "protocol": {
        "selected_on": "validation images held out of train",
        "test": "the best configuration only, once, at the end",
        "networks": 10,
        "epochs": 1000,
    },
}

CONFIGURATION = yaml.safe_dump(
    {
        "name": "mine",
        "dataset": {"name": "digits", "zca": False},
        "experts": {"network": "ConvNetD2W64", "rho": {"choice": [0.0, 0.01, 0.05]}},
        "distill": {"ipc": 1},
        "search": {"max_hours": 2.0, "max_gpu_hours": None},
        "evaluate": {"search_networks": 2, "search_epochs": 200, "networks": 10, "epochs": 1000},
        "store": {"uri": "/data/store"},
        "output": {"dir": "/runs/mine"},
    }
)

REASON = 'step 4: <script>alert("x")</script> & <img src=x onerror=alert(1)>'


def point(rho: float, steps: int, labels: str) -> dict[str, Any]:
    return {RHO.key: rho, STEPS.key: steps, LABELS.key: labels}


FAILURES = [
    {
        "reason": "eta became …, <b>and</b> a learning rate must stay above 0",
        "trials": [3, 4, 5],
        "in_common": "all 3 have syn_steps of 10; of those that lived, none of 3",
        "remedy": "Lower distill.lr_lr.",
    },
    {"reason": "its worker was lost", "trials": [6], "in_common": None, "remedy": ""},
]

ENDED = [
    Ended(0, "complete", point(0.01, 20, "hard"), 0.0991, None, {30: 0.0991}, seconds=1000.4),
    Ended(1, "pruned", {STEPS.key: 5}, 0.8, None, {30: 0.8}, seconds=99.0),
    Ended(2, "complete", point(0.05, 100, "soft"), 0.9303, None, {30: 0.9303}, seconds=12.6),
    Ended(3, "failed", point(0.0, 10, "hard"), None, REASON, {}),
]


def page(
    changes: dict[str, Any] | None = None,
    ended: list[Ended] = ENDED,
    configuration: str = CONFIGURATION,
    pictures: dict[str, bytes] | None = None,
    best_set: bytes | None = PNG,
) -> str:
    summary = copy.deepcopy(SUMMARY) | (changes or {})
    shown = {"history": PNG} if pictures is None else pictures
    return report_html(summary, ended, SPACE, configuration, shown, best_set)


class Reader(HTMLParser):
    """Elements, the cells of the table of trials, and what a reader sees."""

    VOID = ("meta", "img", "input", "br", "wbr", "link")

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self._in_trials = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._in_trials = dict(attrs).get("id") == "trials"
        if self._in_trials and tag == "tr":
            self.rows.append([])
        if self._in_trials and tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what is not open"
        if tag == "table":
            self._in_trials = False

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if self._in_trials and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for t, attrs in self.elements if t == tag]


# --- the table ------------------------------------------------------------------------------


def test_table_has_every_trial_once_with_its_values():
    head, *rows = Reader(page()).rows
    assert head == [
        "trial", "state", "val accuracy (%)", "rho", "syn_steps", "labels", "seconds", "note",
    ]  # fmt: skip
    assert rows == [
        ["0", "● complete", "9.9", "0.01", "20", "hard", "1000", ""],
        ["1", "○ pruned", "80.0", "–", "5", "–", "99", ""],
        ["★ best 2", "● complete", "93.0", "0.05", "100", "soft", "13", ""],
        ["3", "✕ failed", "–", "0", "10", "hard", "–", REASON],
    ]


def test_point_that_the_search_began_with_is_named():
    known = Ended(0, "failed", {}, None, REASON, {}, start_from="ftd-cifar10-ipc10")
    assert Reader(page({}, [known])).rows[1][-1] == f"from ftd-cifar10-ipc10; {REASON}"


def test_other_objectives_have_columns_and_trials_on_the_front_a_mark():
    values = {"accuracy": 0.93, "gpu_seconds": 71.2, "ipc": 10.0}
    ended = [Ended(2, "complete", ENDED[2].params, 0.93, None, {1: 0.93}, values=values), ENDED[1]]
    front = [{"trial": 2, "params": ENDED[2].params, "values": values}]
    made = page({"objectives": ["accuracy", "gpu_seconds", "ipc"], "front": front}, ended)
    head, *rows = Reader(made).rows
    assert head[-3:] == ["GPU seconds", "images per class", "note"]
    assert [r[0] for r in rows] == ["1", "★ best front 2"]
    assert [r[-3:-1] for r in rows] == [["–", "–"], ["71.2", "10"]]
    assert "Pareto front" in Reader(made).text


def test_state_that_is_new_here_has_a_row_and_a_filter_too():
    ended = [
        *ENDED,
        Ended(4, "interrupted", {}, None, None, {}),
        Ended(5, "odd", {}, 0.1, None, {}),
    ]
    read = Reader(page(ended=ended))
    assert [r[1] for r in read.rows[-2:]] == ["◌ interrupted", "· odd"]
    boxes = [i["value"] for i in read.all("input")]
    assert boxes == ["complete", "pruned", "failed", "interrupted", "odd"]


def test_page_of_a_thousand_trials_stays_below_two_megabytes():
    keys = [f"distill.key_{i}" for i in range(8)]
    space = [parse_dimension(k, {"float": [0.0, 1.0]}) for k in keys]
    ended = [
        Ended(n, "failed", dict.fromkeys(keys, n / 1007), 0.123456789, "why <&> " * 1000, {},
              seconds=n / 7)
        for n in range(1000)
    ]  # fmt: skip
    html = report_html(copy.deepcopy(SUMMARY), ended, space, CONFIGURATION, {}, None)
    assert len(html.encode()) < 2_000_000
    rows = Reader(html).rows[1:]
    assert len(rows) == 1000 and max(len(r[-1]) for r in rows) == LONGEST_REASON + 1


# --- what comes from outside ----------------------------------------------------------------


def test_names_values_and_reasons_are_text_and_never_markup():
    evil = "<script>alert(1)</script>"
    changes = {"name": evil, "state": evil, "stopped_by": evil, "budget": {evil: 1.0}}
    ended = [Ended(0, evil, {RHO.key: evil, LABELS.key: '" onclick="x'}, 0.5, evil, {})]
    html = page(changes, ended, configuration=f"name: '{evil}'", pictures={evil: PNG})
    read = Reader(html)
    assert len(read.all("script")) == 1
    assert evil in read.text
    assert not any(name.startswith("on") for _, attrs in read.elements for name in attrs)
    assert read.open == []


def test_page_refers_to_nothing_outside_itself_but_links_to_mlflow():
    html = page({"mlflow": SUMMARY["mlflow"] | {"tracking_uri": "http://mlflow.lan:5000/"}})
    read = Reader(html)
    assert {i["src"][:22] for i in read.all("img")} == {"data:image/png;base64,"}
    assert not read.all("link") and not read.all("iframe")
    assert "src" not in read.all("script")[0]
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    outside = [a["href"] for a in read.all("a") if not (a["href"] or "").startswith("#")]
    assert outside == ["http://mlflow.lan:5000/#/experiments/1/runs?a=1&b=2"]
    (policy,) = (m["content"] for m in read.all("meta") if "http-equiv" in m)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:")


def test_passwords_in_addresses_stay_out_of_the_page():
    uri = "https://me:geheim@mlflow.lan"
    html = page(
        {"mlflow": SUMMARY["mlflow"] | {"tracking_uri": uri}},
        configuration=f"store: {{uri: 's3://key:geheim@bucket/x'}}\ntracking: {{uri: '{uri}'}}",
    )
    assert "geheim" not in html and "me:***@mlflow.lan" in html and "key:***@bucket" in html
    assert 'href="https://mlflow.lan/#/experiments/1' in html


# --- what is said ---------------------------------------------------------------------------


def test_headline_has_every_accuracy_with_its_spread_and_number_of_networks():
    whole = {"mean": 0.982, "std": 0.001, "n": 10}
    text = Reader(page({"baseline": SUMMARY["baseline"] | {"whole_data": whole}})).text
    for said in (
        "Trial 2 is the best: rho 0.05, syn_steps 100, labels soft.",
        "test: best set 94.4 ± 0.6 %, n = 10",
        "test: random real images 72.8 ± 5.1 %, n = 10",
        "test: whole data set 98.2 ± 0.1 %, n = 10",
        "validation: as selected on 93.0 %",
        "validation: full protocol 93.8 ± 0.6 %, n = 10",
    ):
        assert said in text


def test_protocol_says_in_words_what_the_numbers_depend_on():
    text = Reader(page()).text
    for said in (
        "compared on validation images held out of train, by 2 fresh networks of 200 epochs each",
        "Test images: the best configuration only, once, at the end.",
        "10 fresh networks, trained for 1,000 epochs each",
        "ConvNetD2W64",
        "no ZCA",
        "not comparable",
    ):
        assert said in text
    searched = CONFIGURATION.replace("ipc: 1", "ipc: {choice: [1, 10]}")
    searched = searched.replace("zca: false", "zca: true")
    best = SUMMARY["best"] | {"params": {"distill.ipc": 10}}
    text = Reader(page({"best": best}, configuration=searched)).text
    assert "searched, 10 in the best set" in text and "ZCA." in text and "no ZCA" not in text


def test_places_name_the_set_the_store_mlflow_and_the_command_to_go_on():
    text = Reader(page()).text
    for said in (
        "/runs/mine/best/synthetic.npz",
        "/data/store",
        "sqlite:////data/mlflow.db",
        "python -m ftd_ray.sweep /runs/mine/sweep.yaml --resume",
    ):
        assert said in text
    assert "make again --resume" in Reader(page({"command": "make again --resume"})).text


def test_finalists_are_shown_with_both_their_accuracies_and_the_chosen_one_marked():
    full = {"mean": 0.91, "std": 0.01, "n": 10}
    finalists = [
        {"trial": 2, "val_accuracy": 0.9303, "val_accuracy_full": full},
        {"trial": 0, "val_accuracy": 0.92, "val_accuracy_full": full},
    ]
    read = Reader(page({"finalists": finalists}))
    assert "2 best 93.0 % 91.0 ± 1.0 %, n = 10 0 92.0 % 91.0 ± 1.0 %, n = 10" in read.text
    assert "2 finalists of the search" in read.text


@pytest.mark.parametrize(
    ("changes", "ended", "said"),
    [
        ({"state": "failed", "best": None}, ENDED[3:], "No trial came to its end"),
        ({"state": "failed", "best": None}, ENDED, "stopped by an error before its end"),
        ({"state": "interrupted", "best": None}, ENDED, "can go on where it was"),
        ({"state": "interrupted", "best": None}, ENDED, "Trial 2 leads with 93.0 %"),
        ({"state": "interrupted", "best": None}, [], "can go on where it was"),
        ({"stopped_by": "wall time"}, ENDED, "stopped when the budget of wall time was used up"),
        ({"stopped_by": "trials"}, ENDED, "all trials ran"),
        ({"interrupted": 2}, ENDED, "6 trials: 2 complete, 1 pruned, 1 failed, 2 interrupted"),
        ({"budget": {"hours": 0.254, "gpu_hours": 4.5}}, ENDED, "0.25 of 2 hours, 4.50 GPU hours."),
    ],
)
def test_every_end_of_a_sweep_is_told(changes, ended, said):
    assert said in Reader(page(changes, ended)).text


def test_interrupted_sweep_is_not_said_to_have_run_all_its_trials():
    changes = {"state": "interrupted", "best": None, "baseline": None, "stopped_by": "trials"}
    assert "all trials ran" not in Reader(page(changes)).text


def test_what_failures_have_in_common_is_told_and_single_ones_are_left_to_the_table():
    read = Reader(page({"failures": FAILURES}))
    said = (
        "3 trials: Eta became …, <b>and</b> a learning rate must stay above 0. All 3 have "
        "syn_steps of 10; of those that lived, none of 3. Lower distill.lr_lr."
    )
    assert said in read.text and "Why trials failed" in read.text
    assert "its worker was lost" not in read.text.lower()
    assert "Why trials failed" not in Reader(page({"failures": FAILURES[1:]})).text


def test_result_on_the_terminal_tells_of_failures_too():
    lines = result_text(copy.deepcopy(SUMMARY) | {"failures": FAILURES}, SPACE).splitlines()
    (told,) = (line for line in lines if line.startswith("failures"))
    assert told.startswith("failures    3 trials: Eta became …, ")
    assert not any("failures" in line for line in result_text(SUMMARY, SPACE).splitlines())


def test_page_of_a_bare_summary_is_whole():
    bare = {k: SUMMARY[k] for k in ("name", "seconds", "trials", "protocol")}
    bare |= {"state": "interrupted", "best": None}
    read = Reader(report_html(bare, [], [], "not: [yaml", {}, None))
    assert read.open == [] and "interrupted" in read.text and "not: [yaml" in read.text


# --- in a browser ---------------------------------------------------------------------------

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1280,1000",
)

in_a_browser = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason=f"needs {CHROMIUM} and {DRIVER}"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(page(), "utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.address = (folder / "report.html").as_uri()
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def opened(request, browser, tmp_path) -> Iterator[Any]:
    """The page, as first opened; keeps what it shows at the end."""
    browser.get(browser.address)
    yield browser
    folder = Path(os.environ.get("FTD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(folder / f"{request.node.name}.png"))


def trials_shown(browser: Any) -> list[int]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#trials tbody tr')]"
        ".filter(r => r.offsetParent !== null).map(r => Number(r.id.replace('trial-', '')))"
    )


def head(browser: Any, title: str) -> Any:
    from selenium.webdriver.common.by import By

    return browser.find_element(By.XPATH, f"//table[@id='trials']//th[button[.='{title}']]")


def click(browser: Any, title: str) -> str:
    """Clicks a column's head; says what it then announces."""
    from selenium.webdriver.common.by import By

    head(browser, title).find_element(By.TAG_NAME, "button").click()
    return head(browser, title).get_attribute("aria-sort")


@in_a_browser
def test_click_on_a_column_sorts_numbers_as_numbers_and_says_so(opened):
    assert trials_shown(opened) == [0, 1, 2, 3]
    assert click(opened, "syn_steps") == "ascending"
    assert trials_shown(opened) == [1, 3, 0, 2]  # 5, 10, 20, 100
    assert click(opened, "syn_steps") == "descending"
    assert trials_shown(opened) == [2, 0, 3, 1]
    assert head(opened, "trial").get_attribute("aria-sort") == "none"


@in_a_browser
def test_best_come_first_and_missing_numbers_last_in_both_orders(opened):
    assert click(opened, "val accuracy (%)") == "descending"
    assert trials_shown(opened) == [2, 1, 0, 3]  # 93.0, 80.0, 9.9, none
    assert click(opened, "val accuracy (%)") == "ascending"
    assert trials_shown(opened) == [0, 1, 2, 3]


@in_a_browser
def test_words_sort_as_words(opened):
    click(opened, "labels")
    assert trials_shown(opened) == [0, 3, 2, 1]  # hard, hard, soft, inactive


@in_a_browser
def test_table_sorts_from_the_keyboard(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    head(opened, "seconds").find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert trials_shown(opened) == [2, 1, 0, 3]
    assert opened.switch_to.active_element.text.strip() == "seconds"


@in_a_browser
def test_states_can_be_hidden_and_the_count_follows(opened):
    from selenium.webdriver.common.by import By

    opened.find_element(By.CSS_SELECTOR, "input[value=pruned]").click()
    opened.find_element(By.CSS_SELECTOR, "input[value=failed]").click()
    click(opened, "val accuracy (%)")
    assert trials_shown(opened) == [2, 0]
    assert opened.find_element(By.ID, "shown").text == "2 of 4 shown"


@in_a_browser
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_is_as_wide_as_the_window(opened, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 1000}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(opened, scheme):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    names = ["ink", "quiet", "accent", "complete", "pruned", "failed", "interrupted", "paper"]
    *inks, paper = opened.execute_script(
        "const s = getComputedStyle(document.documentElement);"
        "return arguments[0].map(n => s.getPropertyValue('--' + n).trim())",
        names,
    )
    for name, ink in zip(names, inks, strict=False):
        assert contrast(ink, paper) >= 4.5, name  # WCAG AA


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@in_a_browser
def test_browser_has_nothing_to_complain_of(opened):
    opened.get_log("browser")
    opened.refresh()
    assert opened.get_log("browser") == []
