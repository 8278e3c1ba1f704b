"""What a browser shows of a finished sweep in MLflow's own pages."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_helpers import MIXED, mlflow_runs, run_sweep, summary_of, wait_until, write_sweep

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=2600,1400",
)

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()),
        reason=f"needs {CHROMIUM} and {DRIVER}",
    ),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    write_sweep(folder, MIXED)
    ran = run_sweep(folder, "sweep.yaml")
    assert ran.code == 0, ran.out + ran.err
    return folder


@pytest.fixture(scope="module")
def server(sweep: Path) -> Iterator[str]:
    """The address of ``mlflow server`` on the sweep's file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"sqlite:///{sweep / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(sweep / "server.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=sweep, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, (sweep / "server.txt").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
        return False

    try:
        wait_until("MLflow's server", healthy, seconds=120, every=0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def screenshot(request, browser, tmp_path) -> Iterator[None]:
    """Keeps what the browser shows at the end of the test."""
    yield
    folder = Path(os.environ.get("FTD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(folder / f"{request.node.name}.png"))


def text_of(browser: Any) -> str:
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By

    with contextlib.suppress(WebDriverException):
        return browser.find_element(By.TAG_NAME, "body").text
    return ""


def shows(browser: Any, *texts: str) -> None:
    def look() -> bool:
        shown = text_of(browser)
        return all(t in shown for t in texts)

    try:
        wait_until(f"{texts} on the page", look, seconds=90, every=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}; it shows: {text_of(browser)[:3000]}") from None


def has(browser: Any, selector: str) -> None:
    """Waits until the page draws something that a CSS selector finds."""
    from selenium.webdriver.common.by import By

    wait_until(
        f"{selector} on the page",
        lambda: browser.find_elements(By.CSS_SELECTOR, selector),
        seconds=90,
        every=0.5,
    )


def click(browser: Any, xpath: str) -> None:
    """Clicks on what an XPath finds, again if the page was just drawn anew."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By

    def clicked() -> bool:
        with contextlib.suppress(WebDriverException):
            browser.find_element(By.XPATH, xpath).click()
            return True
        return False

    wait_until(f"{xpath} to click on", clicked, seconds=90, every=0.5)


def experiment_of(folder: Path) -> str:
    return mlflow_runs(folder)[0].info.experiment_id


def test_address_that_the_sweep_prints_shows_the_curves_of_its_trials(
    sweep, server, browser, screenshot
):
    printed = re.search(r"/#/experiments/\S+", (sweep / "stdout.txt").read_text())
    assert printed, "the sweep printed no address of its trials"
    browser.get(f"{server}{printed[0]}")
    shows(browser, *(f"trial {i:03d}" for i in range(5)), "val_accuracy", "matching_loss")


def test_runs_table_shows_every_trial_with_varied_parameters_and_val_accuracy(
    sweep, server, browser, screenshot
):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    trials = "searchFilter=tags.%60ftd.kind%60%20%3D%20%27trial%27"
    by_score = "orderByKey=metrics.%60val_accuracy%60&orderByAsc=false"
    browser.get("about:blank")
    browser.get(f"{server}/#/experiments/{experiment_of(sweep)}/runs?{trials}&{by_score}")
    shows(browser, *(f"trial {i:03d}" for i in range(5)), "Columns")
    click(browser, "//button[contains(., 'Columns')]")
    shows(browser, "Parameters (3)", "val_accuracy")
    for column in ("val_accuracy", "rho", "lr_lr", "lr_init"):
        click(browser, f"//*[contains(@class, 'tree-title')][normalize-space(.)='{column}']")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    runs = [r for r in mlflow_runs(sweep) if r.data.tags.get("ftd.kind") == "trial"]
    scores = {str(r.data.metrics["val_accuracy"]) for r in runs if r.data.metrics}
    values = {v for r in runs for v in r.data.params.values()}
    assert scores and values == {"0.0", "0.01", "1e+30", "1e-09", "0.05"}
    shows(browser, *scores, *values)


def test_page_of_the_parent_run_shows_the_result(sweep, server, browser, screenshot):
    run = summary_of(sweep)["mlflow"]["parent_run_id"]
    browser.get(f"{server}/#/experiments/{experiment_of(sweep)}/runs/{run}")
    shows(browser, "test_accuracy", "random_real_accuracy", "experts.network", "ConvNetD1W8")


def test_compare_page_shows_what_differs_between_trials(sweep, server, browser, screenshot):
    done = [r for r in mlflow_runs(sweep) if r.data.tags.get("ftd.state") == "complete"]
    ids = ",".join(f'"{r.info.run_id}"' for r in done)
    experiment = experiment_of(sweep)
    browser.get(f'{server}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    shows(browser, "rho", "val_accuracy", *(r.info.run_name for r in done))
    has(browser, ".js-plotly-plot .parcoords")  # the parallel coordinates


def test_charts_of_trials_show_their_images_by_step(sweep, server, browser, screenshot):
    printed = re.search(r"/#/experiments/\S+", (sweep / "stdout.txt").read_text())
    assert printed is not None
    browser.get("about:blank")
    browser.get(f"{server}{printed[0]}")
    shows(browser, "synthetic")
    has(browser, "img[src*='synthetic'], img[src^='blob:']")  # drawn for step 0, and on
    (best,) = (r for r in mlflow_runs(sweep) if r.data.tags.get("ftd.best") == "true")
    experiment = experiment_of(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{best.info.run_id}/model-metrics")
    shows(browser, "val_accuracy", "matching_loss")


def test_images_of_a_trial_are_shown(sweep, server, browser, screenshot):
    (best,) = (r for r in mlflow_runs(sweep) if r.data.tags.get("ftd.best") == "true")
    experiment = experiment_of(sweep)
    browser.get(f"{server}/#/experiments/{experiment}/runs/{best.info.run_id}/artifacts/images")
    shows(browser, "synthetic")
