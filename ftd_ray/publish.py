"""What a finished search leaves to look at: pictures, the contact sheet, the report, MLflow."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd.synthetic import SyntheticSet
from ftd_ray.config import SweepConfig
from ftd_ray.pictures import caption, contact_sheet, short_names, study_pictures
from ftd_ray.report import report_html
from ftd_ray.search import Ended, SweepStudy, read_study
from ftd_ray.storage import join, open_uri, read_bytes, write_bytes
from ftd_ray.tracking.tracker import Tracker

DPI = 110
SHEET_SETS = 8
"""Best sets on the contact sheet."""
SHEET_CELL = 64
"""Pixels of an image there."""


def send_late(
    config: SweepConfig,
    summary: dict[str, Any],
    sets: Callable[[Ended], tuple[str, str]],
    tracker: Tracker,
) -> int:
    """Tells MLflow of a finished sweep what it did not hear; returns how much is still waiting.

    From what the folder holds: the study, the summary, the pictures. ``sets`` gives the key and
    the place of a trial's expert set.
    """
    found = read_study(config.output_dir)
    ended = found[0] if found is not None else []
    names = short_names(config.space)
    parent = summary["mlflow"]["parent_run_id"] or None
    tracker.start(config.name, config.resolved(), names, parent)
    tracker.reconcile(ended, sets)
    filesystem, path = open_uri(config.output_dir)
    for info in filesystem.get_file_info(pafs.FileSelector(path)):
        if info.base_name.endswith((".png", ".html", "sweep.yaml")):
            content = read_bytes(join(config.output_dir, info.base_name))
            tracker.log_files({info.base_name: content or b""})
    for name in ("synthetic.npz", "synthetic.png"):
        if (content := read_bytes(join(config.output_dir, "best", name))) is not None:
            tracker.log_files({name: content}, "best")
    tracker.log_summary(summary)
    tracker.finish("FINISHED" if summary["best"] else "FAILED")
    summary["mlflow"] |= {
        "parent_run_id": tracker.parent_id,
        "trials_path": tracker.trials_path(),
        "waiting": tracker.waiting,
    }
    text = json.dumps(summary, indent=2) + "\n"
    write_bytes(join(config.output_dir, "summary.json"), text.encode())
    return tracker.waiting


def publish(
    config: SweepConfig,
    study: SweepStudy,
    summary: dict[str, Any],
    files: Mapping[str, bytes],
    configuration: str,
    tracker: Tracker,
) -> None:
    """Writes pictures and ``report.html`` to the sweep's folder, and them all to MLflow.

    ``files`` are those of the best set, ``configuration`` is the resolved YAML.
    """
    ended, best = study.ended(), summary["best"]
    figures = study_pictures(
        ended, config.space, config.search.objectives, best["trial"] if best else None
    )
    pictures = {name: _png(figure) for name, figure in figures.items()}
    if sets := _best_sets(config, study):
        pictures["sets"] = contact_sheet(sets)
    for name, content in pictures.items():
        write_bytes(join(config.output_dir, f"{name}.png"), content)
    shown = contact_sheet([("", files["synthetic.png"])]) if files else None
    report = report_html(summary, ended, config.space, configuration, pictures, shown).encode()
    write_bytes(join(config.output_dir, "report.html"), report)
    tracker.log_files({f"{name}.png": content for name, content in pictures.items()})
    tracker.log_files({"report.html": report})
    tracker.log_files(files, "best")
    tracker.log_summary(summary)


def _best_sets(config: SweepConfig, study: SweepStudy) -> list[tuple[str, bytes]]:
    """Captions and pictures of the best sets, the best first, as far as they are there."""
    names, found = short_names(config.space), []
    for trial in study.best(SHEET_SETS):
        place = join(config.output_dir, "trials", f"{trial.number:04d}", "synthetic.npz")
        if (data := read_bytes(place)) is not None:
            try:
                synthetic = SyntheticSet.load(io.BytesIO(data))
            except UserError:  # damaged, and not the winner's: only its picture is lost
                continue
            found.append((caption(trial, names), synthetic.png(cell=SHEET_CELL)))
    return found


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
