"""The documentation says what the code does."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_configuration_page_is_what_the_code_says() -> None:
    render = runpy.run_path(str(ROOT / "docs" / "generate.py"))["render"]
    assert (ROOT / "docs" / "configuration.md").read_text() == render(), "run `make docs`"


def test_every_field_of_the_configuration_has_a_word_in_the_page_or_speaks_for_itself() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    silent = [line.split("`")[1] for line in page.splitlines() if line.endswith("|  |")]
    plain = {"batch_size", "momentum", "weight_decay", "uri", "cpus_per_expert", "gpus_per_expert",
             "cpus_per_trial", "gpus_per_trial"}  # fmt: skip
    assert set(silent) <= plain
