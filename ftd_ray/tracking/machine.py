"""MLflow's metrics of the machine that the driver runs on."""

import contextlib
from collections.abc import Callable

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


class Machine(SystemMetricsMonitor):
    """Sends through the outbox: MLflow's own monitor ends with the first outage."""

    def __init__(self, run_id: str, uri: str, send: Callable[[dict[str, float], int], None]):
        super().__init__(run_id, resume_logging=True, tracking_uri=uri)
        self._send = send

    def monitor(self) -> None:
        with contextlib.suppress(Exception):
            self.collect_metrics()
            while not self._shutdown_event.wait(self.sampling_interval):
                self.publish_metrics(self.aggregate_metrics())
                self.collect_metrics()

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        self._send({f"system/{k}": v for k, v in metrics.items()}, self._logging_step)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()
