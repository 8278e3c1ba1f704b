"""Where a browser finds what MLflow holds of sweeps."""

from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote, urlencode

from mlflow import MlflowClient


@dataclass(frozen=True)
class SweepPage:
    """A sweep that MLflow holds, and where a browser finds it."""

    name: str
    began: datetime
    best: float | None
    """Validation accuracy."""
    path: str


def newest_sweeps(uri: str, limit: int) -> list[SweepPage]:
    """The sweeps that began last, the newest first."""
    client = MlflowClient(tracking_uri=uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    if not experiments:
        return []
    runs = client.search_runs(
        experiments,
        "tags.`ftd.kind` = 'sweep'",
        max_results=limit,
        order_by=["attributes.start_time DESC"],
    )
    pages = []
    for run in runs:
        experiment, run_id = run.info.experiment_id, run.info.run_id
        best = client.search_runs(
            [experiment],
            f"tags.`ftd.state` = 'complete' and tags.mlflow.parentRunId = '{run_id}'",
            max_results=1,
            order_by=["metrics.val_accuracy DESC"],
        )
        pages.append(
            SweepPage(
                name=run.info.run_name,
                began=datetime.fromtimestamp(run.info.start_time / 1000),
                best=best[0].data.metrics.get("val_accuracy") if best else None,
                path=trials_path(experiment, run_id),
            )
        )
    return pages


def trials_path(experiment_id: str, parent_id: str) -> str:
    """Where a browser finds a sweep's trials as charts, below the server's address.

    Sorted by a metric, since MLflow folds children into their parent otherwise.
    """
    query = {
        "compareRunsMode": "CHART",
        "searchFilter": f"tags.`ftd.kind` = 'trial' AND tags.`mlflow.parentRunId` = '{parent_id}'",
        "orderByKey": "metrics.`val_accuracy`",
        "orderByAsc": "false",
    }
    return f"/#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"
