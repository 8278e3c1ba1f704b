"""The end of a sweep in words, from its ``summary.json``."""

from collections.abc import Sequence
from typing import Any

from ftd_ray.pictures import short_names
from ftd_ray.progress import describe_params, duration
from ftd_ray.space import Dimension

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves MLflow."""


def result_text(summary: dict[str, Any], space: Sequence[Dimension]) -> str:
    """The best configuration, its accuracies beside the baseline's, and where things are."""
    t, e = summary["trials"], summary["experts"]
    lines = [
        f"{'done' if summary['state'] == 'done' else 'failed'} in {duration(summary['seconds'])}: "
        f"{t['complete']} trials complete, {t['pruned']} pruned, {t['failed']} failed; "
        f"{e['built']} experts built, {e['reused']} reused"
    ]
    if summary["best"] is None:
        lines.append("no trial came to its end, so there is no set. See the reasons above.")
    else:
        best, real = summary["best"], summary["baseline"]["random_real"]

        def score(s: dict[str, float]) -> str:
            return f"{100 * s['mean']:.1f} ± {100 * s['std']:.1f} %"

        lines += [
            f"best        trial {best['trial']}: "
            f"{describe_params(best['params'], short_names(space))}",
            f"validation  {100 * best['val_accuracy']:.1f} % (what was selected on), "
            f"{score(best['val_accuracy_full'])} by the full protocol",
            f"test        {score(best['test_accuracy'])} over {best['test_accuracy']['n']} fresh "
            f"networks; random real images {score(real)}",
            f"set         {best['artifact']}",
        ]
    mlflow = summary["mlflow"]
    if mlflow["tracking_uri"].startswith("http"):
        lines.append(f"mlflow      {mlflow['tracking_uri']}{mlflow['trials_path']}")
    else:
        lines.append(f"mlflow      make ui, then {LOCAL_UI}{mlflow['trials_path']}")
    return "\n".join(lines)
