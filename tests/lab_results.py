"""Says as JSON what a sweep left: its trials, its summary, its runs in MLflow, and its store.

python lab_results.py OUTPUT STORE TRACKING

It runs on a host of the lab, from where all three can be reached.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from mlflow import MlflowClient

from ftd_ray.search import read_begun
from ftd_ray.storage import join, read_bytes
from ftd_ray.store.inventory import take_inventory
from ftd_ray.store.tables import inventory_json


def results(output: str, store: str, tracking: str) -> dict[str, Any]:
    begun = read_begun(output)
    written = read_bytes(join(output, "summary.json"))
    assert begun is not None and written is not None, f"{output} holds no sweep that has ended"
    summary = json.loads(written)
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name(summary["mlflow"]["experiment"])
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return {
        "summary": summary,
        "trials": [asdict(t) for t in begun.ended],
        "interrupted": begun.interrupted,
        "runs": [{"id": r.info.run_id, "status": r.info.status, "tags": r.data.tags} for r in runs],
        "store": inventory_json(take_inventory(store), time.time()),
    }


if __name__ == "__main__":
    json.dump(results(*sys.argv[1:]), sys.stdout)
