"""The end of a sweep in words, from its ``summary.json``."""

from collections.abc import Sequence
from typing import Any

from ftd_ray.failures import patterns
from ftd_ray.pictures import short_names
from ftd_ray.progress import describe_params, duration
from ftd_ray.space import Dimension

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves MLflow."""


def _whole_data(baseline: dict[str, Any]) -> str:
    if (whole := baseline.get("whole_data")) is None:
        return ""
    accuracy = f"{100 * whole['mean']:.1f} ± {100 * whole['std']:.1f} %"
    return f"; the experts, {whole['epochs']} epochs on all data, {accuracy}"


def _front_line(point: dict[str, Any], space: Sequence[Dimension]) -> str:
    values = dict(point["values"])
    accuracy = 100 * values.pop("accuracy")
    others = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    params = describe_params(point["params"], short_names(space))
    return f"front       trial {point['trial']}: {accuracy:.1f} %, {others}: {params}"


def result_text(summary: dict[str, Any], space: Sequence[Dimension]) -> str:
    """The best configuration, its accuracies beside the baseline's, and where things are."""
    t, e = summary["trials"], summary["experts"]
    left = summary.get("interrupted", 0)
    lines = [
        f"{'done' if summary['state'] == 'done' else 'failed'} in {duration(summary['seconds'])}: "
        f"{t['complete']} trials complete, {t['pruned']} pruned, {t['failed']} failed"
        f"{f', {left} interrupted' if left else ''}; "
        f"{e['built']} experts built, {e['reused']} reused"
    ]
    if (limit := summary.get("stopped_by", "trials")) != "trials":
        lines.append(f"the budget of {limit} is spent; with a larger one, --resume goes on")
    lines += [
        f"failures    {len(f.trials)} trials: {f}" for f in patterns(summary.get("failures", ()))
    ]
    if summary["best"] is None:
        lines.append("no trial came to its end, so there is no set. See the reasons above.")
    else:
        best, baseline = summary["best"], summary["baseline"]
        finalists = len(summary.get("finalists", ()))

        def score(s: dict[str, float]) -> str:
            return f"{100 * s['mean']:.1f} ± {100 * s['std']:.1f} %"

        lines += [
            f"best        trial {best['trial']}: "
            f"{describe_params(best['params'], short_names(space))}",
            f"validation  {100 * best['val_accuracy']:.1f} % (what was selected on), "
            f"{score(best['val_accuracy_full'])} by the full protocol"
            + (f", the best of {finalists} finalists" if finalists > 1 else ""),
            f"test        {score(best['test_accuracy'])} over {best['test_accuracy']['n']} fresh "
            f"networks; random real images {score(baseline['random_real'])}"
            + _whole_data(baseline),
            *(_front_line(p, space) for p in summary.get("front", ())),
            f"set         {best['artifact']}",
        ]
    if "report" in summary:
        lines.append(f"report      {summary['report']}")
    mlflow = summary["mlflow"]
    if mlflow["tracking_uri"].startswith("http"):
        lines.append(f"mlflow      {mlflow['tracking_uri']}{mlflow['trials_path']}")
    else:
        lines.append(f"mlflow      make ui, then {LOCAL_UI}{mlflow['trials_path']}")
    return "\n".join(lines)
