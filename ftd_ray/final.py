"""The end of a sweep: the best trials by the full protocol, the winner on test, the baselines.

Finalists are compared on validation images by fresh networks. Test images are used for the winner
alone, once, beside what they say of random real images under the same protocol and of networks that
were trained on all data.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ftd.data.dataset import Description
from ftd.evaluate import Score
from ftd.synthetic import SyntheticSet
from ftd_ray.config import SweepConfig
from ftd_ray.search import Ended
from ftd_ray.shipping import Shipment
from ftd_ray.storage import join
from ftd_ray.trial import FinalSpec, WholeDataSpec, final_scores, whole_data_scores
from ftd_ray.workers import run_calls

BASELINE_LR = 0.01


class FinalEvaluation:
    """Evaluates the finalists of one sweep by workers of its pool."""

    def __init__(
        self,
        config: SweepConfig,
        data: Description,
        shipment: Shipment | None,
        pool: Any,
        say: Callable[[str], None],
        tick: Callable[[], None],
        worked: Callable[[float], None],
    ):
        """``worked`` is told the seconds of each piece of work when it has ended."""
        self._config, self._data, self._shipment = config, data, shipment
        self._pool, self._say, self._tick, self._tell_worked = pool, say, tick, worked
        self.worked = 0.0
        """Seconds of all its workers together."""

    def run(self, sets: Sequence[tuple[Ended, bytes]]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The parts of a summary that say what came out, and the files of the winner's set.

        ``sets`` are the best trials, the best first, each with the file of its synthetic set.
        """
        config, full = self._config, []
        winner, data = sets[0]
        if len(sets) > 1:
            self._say(
                f"final      the best {len(sets)} trials on validation images, "
                f"{self._protocol_text()}"
            )
            scores, _ = self._final([self._final_spec(data, test=False) for _, data in sets])
            full = [val for val, _ in scores]
            winner, data = sets[max(range(len(full)), key=lambda i: full[i].mean)]
        synthetic = SyntheticSet.load(io.BytesIO(data))
        self._say(
            f"final      trial {winner.number} and random real images on test images, "
            f"{self._protocol_text()}; the experts for comparison"
        )
        rates = sorted({BASELINE_LR, synthetic.syn_lr})
        specs = [self._final_spec(data), *(self._final_spec(data, baseline_lr=r) for r in rates)]
        ((val, test), *baselines), whole_data = self._final(specs, self._whole_data(winner))
        chosen = max(range(len(rates)), key=lambda i: baselines[i][0].mean)
        random_real = baselines[chosen][1]
        synthetic.provenance["scores"] = {
            "validation": val.to_json(),
            "test": test.to_json(),
            "random_real_test": random_real.to_json(),
        }
        baseline = {"random_real": random_real.to_json() | {"lr": rates[chosen]}}
        if whole_data.accuracies:
            synthetic.provenance["scores"]["whole_data_test"] = whole_data.to_json()
            baseline["whole_data"] = whole_data.to_json() | {"epochs": self._epochs_of(winner)}
        else:
            self._say("warning    the winner's experts cannot be read, so they are not compared")
        files = {"synthetic.npz": synthetic.to_bytes(), "synthetic.png": synthetic.png()}
        results = {
            "best": {
                "trial": winner.number,
                "params": winner.params,
                "val_accuracy": winner.value,
                "val_accuracy_full": val.to_json(),
                "test_accuracy": test.to_json(),
                "artifact": join(config.output_dir, "best", "synthetic.npz"),
            },
            "baseline": baseline,
            "finalists": [
                {
                    "trial": t.number,
                    "params": t.params,
                    "val_accuracy": t.value,
                    "val_accuracy_full": score.to_json(),
                }
                for (t, _), score in zip(sets, full or [val], strict=True)
            ]
            if config.search.finalists > 1
            else [],
        }
        return results, files

    def _protocol_text(self) -> str:
        e = self._config.evaluate
        return f"{e.networks} fresh networks each, {e.epochs} epochs"

    def _final_spec(self, data: bytes, **changes: Any) -> FinalSpec:
        config = self._config
        return FinalSpec(
            dataset=config.dataset,
            sender=self._shipment,
            numerics=config.resources.trial_numerics,
            seed=config.seed,
            synthetic=data,
            networks=range(config.evaluate.networks),
            **changes,
        )

    def _final(
        self, specs: Sequence[FinalSpec], whole_data: WholeDataSpec | None = None
    ) -> tuple[list[tuple[Score, Score]], Score]:
        """(validation, test) of each, its networks trained by as many workers as trials have.

        And, in one go, what the experts of ``whole_data`` reach on test.
        """
        n = self._config.evaluate.networks
        size = -(-n // self._config.search.concurrency)
        shares = [range(i, min(i + size, n)) for i in range(0, n, size)]
        calls: list[tuple[Callable[[Any], Any], Any]] = [
            (final_scores, replace(spec, networks=share)) for spec in specs for share in shares
        ]
        if whole_data is not None:
            calls.append((whole_data_scores, whole_data))
        parts = self._run(calls)
        results = []
        for i in range(0, len(specs) * len(shares), len(shares)):
            pairs = [pair for part in parts[i : i + len(shares)] for pair in part]
            results.append((Score(tuple(v for v, _ in pairs)), Score(tuple(t for _, t in pairs))))
        return results, Score(tuple(parts[-1]) if whole_data is not None else ())

    def _whole_data(self, winner: Ended) -> WholeDataSpec:
        """The winner's experts, which were trained on the whole training data."""
        config = self._config
        experts = config.at(winner.params).experts
        return WholeDataSpec(
            dataset=config.dataset,
            sender=self._shipment,
            numerics=config.resources.trial_numerics,
            network=experts.network,
            identity=config.identity(experts, self._data),
            experts=min(experts.count, config.evaluate.networks),
            epochs=experts.epochs,
            store_uri=config.store.uri,
        )

    def _run(self, calls: Sequence[tuple[Callable[[Any], Any], Any]]) -> list[Any]:
        at_once = self._config.search.concurrency
        done = run_calls(
            self._pool, calls, at_once=at_once, tick=self._tick, worked=self._tell_worked
        )
        self.worked += sum(seconds for _, seconds in done)
        return [result for result, _ in done]

    def _epochs_of(self, trial: Ended) -> int:
        return self._config.at(trial.params).experts.epochs
