"""The driver: python -m ftd_ray.sweep FILE [key.path=value ...] [--dry-run] [--resume].

Checks everything, prints the plan, runs the search on Ray, evaluates the winner once on test,
and leaves ``summary.json`` and ``best/`` in the sweep's folder. Exit codes: 0 done, 1 nothing
usable came out, 2 usage or configuration, 128 + signal after an interrupt, with state saved.
"""

import argparse
import contextlib
import copy
import fcntl
import io
import json
import logging
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pyarrow as pa
import yaml
from rich.console import Console

from ftd.errors import UserError
from ftd.evaluate import Score
from ftd.expert import Numerics, set_key
from ftd.synthetic import SyntheticSet
from ftd_ray.config import SweepConfig, load_config
from ftd_ray.plan import Plan, lacking, machine_resources, make_plan
from ftd_ray.progress import describe_params, duration
from ftd_ray.storage import is_local, join, probe, read_bytes, write_bytes
from ftd_ray.store import TrajectoryStore

CHANGEABLE = (
    "search.trials", "search.concurrency", "resources", "tracking", "output", "store",
    "dataset.root", "dataset.download",
)  # fmt: skip
"""What a resumed sweep may have otherwise than the saved one."""

BASELINE_LR = 0.01

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves MLflow."""


class Interrupted(BaseException):
    """A signal arrived; it carries the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ftd_ray.sweep",
        description="Search FTD's hyperparameters over a buffer of flat experts.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="the sweep, as in sweeps/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values in place of the file's"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", action="store_true", help="go on with what is saved, if any")
    parser.add_argument("--address", help="of a Ray cluster; else RAY_ADDRESS, else a local one")
    args = parser.parse_intermixed_args(argv)
    console = Console(highlight=False)
    try:
        return _main(args, console)
    except UserError as error:
        print(f"sweep: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        return 128 + interrupt.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _main(args: argparse.Namespace, console: Console) -> int:
    config = load_config(args.file, args.overrides)
    address = args.address or os.environ.get("RAY_ADDRESS")
    try:
        plan = make_plan(config)
        saved = _saved(config)
    except (OSError, pa.ArrowException) as error:  # of a data set, the store or the output
        raise UserError(
            f"a file or a server does not answer ({error}). Check dataset.root, "
            f"store.uri={config.store.uri} and output.dir={config.output_dir}."
        ) from error
    if saved is not None and not args.resume and not args.dry_run:
        raise UserError(
            f"{config.output_dir} holds a sweep already. Go on with it by --resume, or give "
            "another output.dir."
        )
    if saved is not None and args.resume:
        _check_same(saved, config)
        if (summary := _finished(config)) is not None:
            console.print(_result_text(summary, config), soft_wrap=True, markup=False)
            return 0 if summary["state"] == "done" else 1
    probe(config.output_dir, "output.dir")
    probe(config.store.uri, "store.uri")
    tracker = _tracker(config, dry_run=args.dry_run)
    here = machine_resources()
    missing = lacking(config, here) if address is None else []
    console.print(plan.text(missing), soft_wrap=True, markup=False)
    if args.dry_run:
        return 0
    _check_room(plan)
    if missing:
        raise UserError(
            f"{missing[0]} on this machine. Lower resources.*, or give the --address of a cluster."
        )
    with _signals(), _only_one(config.output_dir):
        return Sweep(config, plan, tracker, console, _resume_command(args)).run(address)


class Sweep:
    """One run of a sweep, from the start of Ray to the summary."""

    def __init__(
        self, config: SweepConfig, plan: Plan, tracker: Any, console: Console, command: str
    ):
        from ftd_ray.pictures import short_names
        from ftd_ray.progress import Progress
        from ftd_ray.search import SweepStudy

        self.config, self.plan, self.tracker, self.console = config, plan, tracker, console
        self._command = command
        self._began = time.monotonic()
        self._names = short_names(config.space)
        self._warned = False
        self._sets = {s.key: s for s in plan.sets}
        self._expert_status: dict[str, Any] = {}
        self._status_before: dict[str, Any] = {}
        self._wanted: set[str] = set()
        self._pending_status: Any = None
        self._polled = 0.0
        self._study_class, self._progress = (
            SweepStudy,
            Progress(console, config.search.trials, config.search.concurrency, self._names),
        )
        self._say = self._progress.say

    # --- the whole --------------------------------------------------------------------------

    def run(self, address: str | None) -> int:
        import ray

        _start_ray(address)
        _arm_signals()  # Ray has taken SIGTERM for itself
        try:
            self._check_cluster(ray)
            try:
                self._open()
                with self._progress:
                    self._search()
                summary = self._conclude()
            except (Interrupted, KeyboardInterrupt) as interrupt:
                self._interrupted()
                if isinstance(interrupt, KeyboardInterrupt):
                    raise Interrupted(signal.SIGINT) from None
                raise
            except BaseException:
                with contextlib.suppress(Exception):
                    self._write_summary(self._summary("failed"))
                with contextlib.suppress(Exception):
                    self.tracker.finish("FAILED")
                raise
            finally:
                if hasattr(self, "study"):
                    self.study.close()
        finally:
            ray.shutdown()
        print()
        self.console.print(_result_text(summary, self.config), soft_wrap=True, markup=False)
        return 0 if summary["state"] == "done" else 1

    def _open(self) -> None:
        config = self.config
        text = yaml.safe_dump(config.resolved(), sort_keys=False)
        write_bytes(join(config.output_dir, "sweep.yaml"), text.encode())
        self.study = self._study_class(
            config.output_dir,
            name=config.name,
            space=config.space,
            search=config.search,
            seed=config.seed,
            every=config.evaluate.every,
            iterations=max(config.values_of("distill.iterations")),
        )
        data = self.study.recall("data")
        if data not in (None, self.plan.data.fingerprint):
            raise UserError(
                f"{config.output_dir} was started on other images (fingerprint {data[:8]}; now "
                f"{self.plan.data.fingerprint[:8]}). Restore them, or give another output.dir."
            )
        self.study.remember("data", self.plan.data.fingerprint)
        self._status_before = copy.deepcopy(self._ask_broker())
        self._seconds_before = float(self.study.recall("seconds") or 0.0)
        self._experts_before = self.study.recall("experts") or {}
        ended = self.study.ended()
        if ended:
            self._say(f"resumed    {len(ended)} of {config.search.trials} trials are done")
        self._progress.already_ended(ended)
        with self._tracking():
            self.tracker.start(
                config.name, config.resolved(), self._names, self.study.recall("mlflow_run")
            )
            self.study.remember("mlflow_run", self.tracker.parent_id)
            self.tracker.log_text(text, "sweep.yaml")

    def _search(self) -> None:
        from ray import tune

        from ftd_ray.bridge import StudyScheduler, StudySearcher, Ticker
        from ftd_ray.workers import LIGHT_BYTES, SweepTrial

        config = self.config
        left = config.search.trials - len(self.study.ended())
        if left <= 0:
            return
        scratch = tempfile.mkdtemp(prefix="ftd-tune-")
        try:
            tune.Tuner(
                tune.with_resources(
                    SweepTrial, tune.PlacementGroupFactory([{"CPU": 0, "memory": LIGHT_BYTES}])
                ),
                tune_config=tune.TuneConfig(
                    search_alg=StudySearcher(self.study, self._order, self),
                    scheduler=StudyScheduler(self.study, self),
                    num_samples=left,
                    max_concurrent_trials=config.search.concurrency,
                    reuse_actors=False,
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Ticker(self._tick)],
                ),
            ).fit()
            self._expert_status = self._ask_broker()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _conclude(self) -> dict[str, Any]:
        """Evaluates the winner and the baseline, writes the results, closes MLflow's runs."""
        best = self.study.best()
        if best is None:
            summary = self._summary("failed")
        else:
            summary = self._summary("done") | self._evaluate(best)
            summary["seconds"] = self._seconds()
        self._publish(summary)
        with self._tracking():
            self.tracker.finish("FINISHED" if best is not None else "FAILED")
        self._write_summary(summary)  # last: with it the sweep is over
        return summary

    def _evaluate(self, best: Any) -> dict[str, Any]:
        from ftd_ray.trial import FinalSpec
        from ftd_ray.workers import evaluate_finally

        config, n = self.config, self.config.evaluate.networks
        data = read_bytes(join(self._trial_folder(best.number), "synthetic.npz"))
        if data is None:
            raise UserError(
                f"the set of trial {best.number} is gone from {self._trial_folder(best.number)}. "
                "Restore the sweep's folder."
            )
        synthetic = SyntheticSet.load(io.BytesIO(data))
        self._say(
            f"final      trial {best.number} and random real images, {n} fresh networks each, "
            f"{config.evaluate.epochs} epochs"
        )
        spec = partial(
            FinalSpec,
            dataset=config.dataset,
            numerics=config.resources.trial_numerics,
            seed=config.seed,
            synthetic=data,
        )
        rates = sorted({BASELINE_LR, synthetic.syn_lr})
        r = config.resources
        results = evaluate_finally(
            [spec(), *(spec(baseline_lr=lr) for lr in rates)],
            n,
            cpus=r.cpus_per_trial,
            gpus=r.gpus_per_trial,
            at_once=config.search.concurrency,
        )
        scores = [tuple(Score(tuple(s[i] for s in one)) for i in (0, 1)) for one in results]
        (val, test), *baselines = scores
        chosen = max(range(len(rates)), key=lambda i: baselines[i][0].mean)
        synthetic.provenance["scores"] = {
            "validation": val.to_json(),
            "test": test.to_json(),
            "random_real_test": baselines[chosen][1].to_json(),
        }
        files = self._best_files(synthetic)
        for name, content in files.items():
            write_bytes(join(config.output_dir, "best", name), content)
        return {
            "best": {
                "trial": best.number,
                "params": best.params,
                "val_accuracy": best.value,
                "val_accuracy_full": val.to_json(),
                "test_accuracy": test.to_json(),
                "artifact": join(config.output_dir, "best", "synthetic.npz"),
            },
            "baseline": {
                "random_real": baselines[chosen][1].to_json() | {"lr": rates[chosen]},
            },
        }

    # --- what the search tells (ftd_ray.bridge.Listener) ------------------------------------

    def trial_started(self, suggestion: Any) -> None:
        self._progress.trial_started(suggestion)
        experts = self.config.at(suggestion.params).experts
        identity = self.config.identity(experts, self.plan.data)
        key = set_key(identity)
        source = TrajectoryStore(self.config.store.uri).location(key)
        self._wanted |= {f"{key}/{i}" for i in range(experts.count)}
        with self._tracking():
            self.tracker.expert_set(key, identity, source, dict(self._sets[key].params))
            self.tracker.trial_started(suggestion, key, source)

    def trial_reported(self, number: int, report: Any) -> None:
        self._progress.trial_reported(number, report)
        with self._tracking():
            self.tracker.trial_reported(number, report)

    def trial_ended(self, ended: Any) -> None:
        from ftd_ray.trial import forget_checkpoint

        self._progress.trial_ended(ended)
        forget_checkpoint(self._trial_folder(ended.number))
        self.study.remember("experts", self._experts())
        self.study.remember("seconds", self._seconds())
        with self._tracking():
            self.tracker.trial_ended(ended)

    # --- parts ------------------------------------------------------------------------------

    def _order(self, suggestion: Any) -> Any:
        """The work that a suggestion stands for."""
        from ftd_ray.broker import ExpertOrder, broker
        from ftd_ray.experts import ExpertRequest
        from ftd_ray.trial import TrialSpec
        from ftd_ray.workers import TrialOrder

        config, r = self.config, self.config.resources
        point = config.at(suggestion.params)
        identity = config.identity(point.experts, self.plan.data)
        spec = TrialSpec(
            number=suggestion.number,
            seed=config.seed,
            repeat=suggestion.repeat,
            dataset=config.dataset,
            network=point.experts.network,
            identity=identity,
            experts=point.experts.count,
            distill=point.distill,
            evaluate=config.evaluate,
            numerics=r.trial_numerics,
            store_uri=config.store.uri,
            folder=self._trial_folder(suggestion.number),
        )
        request = ExpertRequest(
            store_uri=config.store.uri,
            identity=identity,
            dataset=config.dataset,
            experts=point.experts,
            numerics=r.expert_numerics,
        )
        order = ExpertOrder(
            key=set_key(identity),
            identity=identity,
            count=point.experts.count,
            epochs=point.experts.epochs,
            work=pickle.dumps(request),
            cpus=r.cpus_per_expert,
            gpus=r.gpus_per_expert,
        )
        return TrialOrder(
            number=suggestion.number,
            spec=pickle.dumps(spec),
            experts=order,
            broker=broker(config.store.uri),
            cpus=r.cpus_per_trial,
            gpus=r.gpus_per_trial,
        )

    def _ask_broker(self) -> dict[str, Any]:
        import ray

        from ftd_ray.broker import broker

        return ray.get(broker(self.config.store.uri).progress.remote())

    def _tick(self) -> None:
        """Asks the broker how far the experts are, about once a second, without waiting."""
        import ray

        from ftd_ray.broker import broker

        if self._pending_status is None:
            if time.monotonic() - self._polled < 1:
                return
            self._polled = time.monotonic()
            self._pending_status = broker(self.config.store.uri).progress.remote()
        ready, _ = ray.wait([self._pending_status], timeout=0)
        if ready:
            with contextlib.suppress(ray.exceptions.RayError):
                self._expert_status = ray.get(self._pending_status)
                ours = {k: v for k, v in self._expert_status.items() if k in self._sets}
                self._progress.experts(ours)
            self._pending_status = None

    def _experts(self) -> dict[str, Any]:
        """What this sweep built and what it found, over all its sessions."""
        built, there, seconds = set(), set(), 0.0
        for key, s in self._expert_status.items():
            if key not in self._sets:
                continue
            before = self._status_before.get(key)  # of other sweeps, on a cluster that lives on
            there |= {f"{key}/{i}" for i in s.built | s.reused}
            built |= {f"{key}/{i}" for i in s.built - (before.built if before else set())}
            seconds += s.seconds - (before.seconds if before else 0.0)
        reused = (there & self._wanted) | set(self._experts_before.get("reused", []))
        built |= set(self._experts_before.get("built", []))
        reused -= built
        seconds += self._experts_before.get("seconds", 0.0)
        return {"built": sorted(built), "reused": sorted(reused), "seconds": seconds}

    def _summary(self, state: str) -> dict[str, Any]:
        config = self.config
        ended = self.study.ended()
        experts = self._experts()
        self.study.remember("experts", experts)
        self.study.remember("seconds", self._seconds())
        sizes = {key: s.parameters * 4 * (s.experts.epochs + 1) for key, s in self._sets.items()}
        used = [e.partition("/")[0] for e in experts["built"]]
        return {
            "name": config.name,
            "state": state,
            "seconds": self._seconds(),
            "best": None,
            "baseline": None,
            "trials": {
                s: sum(e.state == s for e in ended) for s in ("complete", "pruned", "failed")
            },
            "experts": {
                "built": len(experts["built"]),
                "reused": len(experts["reused"]),
                "seconds": experts["seconds"],
                "bytes": sum(sizes[key] for key in used),
            },
            "mlflow": {
                "tracking_uri": config.tracking.uri,
                "experiment": config.experiment,
                "parent_run_id": self.tracker.parent_id,
                "trials_path": self.tracker.trials_path(),
            },
            "protocol": {
                "selected_on": "validation images held out of train",
                "test": "the best configuration only, once, at the end",
                "networks": config.evaluate.networks,
                "epochs": config.evaluate.epochs,
            },
        }

    def _publish(self, summary: dict[str, Any]) -> None:
        """Pictures, expert sets and the best set to MLflow, pictures to the folder too."""
        from ftd_ray.pictures import study_pictures

        pictures = study_pictures(self.study.ended(), self.config.space)
        for name, figure in pictures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=110)
            write_bytes(join(self.config.output_dir, f"{name}.png"), buffer.getvalue())
        with self._tracking():
            for key, s in self._expert_status.items():
                if key in self._sets and (s.built or s.reused):
                    self.tracker.experts_done(
                        key,
                        built=len(s.built),
                        reused=len(s.reused),
                        seconds=s.seconds,
                        curve=_mean_curve(s.curves.values()),
                    )
            for name, figure in pictures.items():
                self.tracker.log_figure(figure, f"{name}.png")
            if summary["best"]:
                best = join(self.config.output_dir, "best")
                names = ("synthetic.npz", "synthetic.png")
                found = {n: read_bytes(join(best, n)) for n in names}
                self.tracker.log_files({n: c for n, c in found.items() if c is not None}, "best")
            self.tracker.log_summary(summary)

    def _best_files(self, synthetic: SyntheticSet) -> dict[str, bytes]:
        picture = io.BytesIO()
        synthetic.grid().save(picture, "PNG")
        return {"synthetic.npz": synthetic.to_bytes(), "synthetic.png": picture.getvalue()}

    def _interrupted(self) -> None:
        with contextlib.suppress(Exception):
            self._write_summary(self._summary("interrupted"))
        with contextlib.suppress(Exception):
            self.tracker.finish("KILLED")
        done = len(self.study.ended()) if hasattr(self, "study") else 0
        self._say(f"interrupted with {done} of {self.config.search.trials} trials done. Go on by:")
        self._say(f"  {self._command}")

    def _write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        write_bytes(join(self.config.output_dir, "summary.json"), text.encode())

    def _check_cluster(self, ray: Any) -> None:
        from ftd_ray.broker import capacity

        nodes = [n for n in ray.nodes() if n["Alive"]]
        missing = lacking(self.config, capacity())
        if missing:
            raise UserError(f"{missing[0]} in the cluster. Lower resources.*, or add such nodes.")
        if capacity() == dict(ray.cluster_resources()):  # it will not grow: one node must do
            short = [lacking(self.config, n["Resources"]) for n in nodes]
            if all(short):
                raise UserError(
                    f"{short[0][0]} on any one node. Lower resources.*, or add larger nodes."
                )
        if len(nodes) > 1:
            self._check_shared(ray, nodes)

    def _check_shared(self, ray: Any, nodes: list[dict[str, Any]]) -> None:
        """Local places must be the same place on every node: a probe file tells."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for key, uri in (
            ("store.uri", self.config.store.uri),
            ("output.dir", self.config.output_dir),
        ):
            if not is_local(uri):
                continue
            name = f".probe-{os.getpid()}-{time.time_ns()}"
            write_bytes(join(uri, name), b"")
            try:
                sees = ray.remote(os.path.exists).options(num_cpus=0)
                for node in nodes:
                    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    there = sees.options(scheduling_strategy=strategy).remote(join(uri, name))
                    if not ray.get(there):
                        raise UserError(
                            f"{key}={uri} is not the same folder on node "
                            f"{node['NodeManagerAddress']}. Give a place that all nodes share, "
                            "such as s3://."
                        )
            finally:
                os.unlink(join(uri, name))

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[None]:
        from ftd_ray.tracking import tolerant

        def warn(text: str) -> None:
            if not self._warned:
                self._warned = True
                self._say(f"warning    {text}")

        with tolerant(warn):
            yield

    def _trial_folder(self, number: int) -> str:
        return join(self.config.output_dir, "trials", f"{number:04d}")

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 1)


# --- around a sweep -------------------------------------------------------------------------


def _start_ray(address: str | None) -> None:
    """Joins or starts Ray, quietly: what is worth saying, the driver says itself."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if address is None else "")
    if not os.environ["RAY_AUTH_MODE"]:
        del os.environ["RAY_AUTH_MODE"]
    for key, value in {
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(key, value)
    import ray

    warnings.filterwarnings("ignore")
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        options["include_dashboard"] = False
    try:
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        if address is None:
            raise UserError(f"Ray could not be started here ({error}).") from error
        raise UserError(
            f"no Ray cluster answers at {address} ({error}). "
            "Correct --address or RAY_ADDRESS, or leave both out for a local one."
        ) from error
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _tracker(config: SweepConfig, *, dry_run: bool) -> Any:
    """The tracker, once its server has answered; a dry run makes no database."""
    from ftd_ray.tracking import Tracker

    artifacts = None
    prefix = "sqlite:///"
    if config.tracking.uri.startswith(prefix):
        folder = os.path.dirname(config.tracking.uri.removeprefix(prefix)) or "."
        probe(folder, "tracking.uri")
        if dry_run:
            return None
        os.makedirs(folder, exist_ok=True)
        artifacts = os.path.join(folder, "mlartifacts", config.experiment)
    return Tracker(config.tracking.uri, config.experiment, artifacts)


def _saved(config: SweepConfig) -> dict[str, Any] | None:
    """The configuration of the sweep that the folder holds, if it holds one."""
    place = join(config.output_dir, "sweep.yaml")
    text = read_bytes(place)
    if text is None:
        return None
    try:
        saved = yaml.safe_load(text)
    except yaml.YAMLError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{place} is damaged. Restore it from a copy, or give another output.dir.")
    return saved


def _finished(config: SweepConfig) -> dict[str, Any] | None:
    """The summary of a finished sweep of as many trials as are asked for.

    A summary that cannot be read is none: the study knows all that it said.
    """
    text = read_bytes(join(config.output_dir, "summary.json"))
    try:
        summary = json.loads(text or b"{}")
        trials, state = summary["trials"], summary["state"]
        nothing_usable = state == "failed" and not trials["complete"]
        over = (state == "done" or nothing_usable) and (
            sum(trials.values()) >= config.search.trials
        )
        _result_text(summary, config)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return summary if over else None


def _check_same(saved: dict[str, Any], config: SweepConfig) -> None:
    """A resumed sweep must search the same space of the same data by the same rules."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(tree, dict) and prefix.count(".") < 2:
            inner = [flat(v, f"{prefix}{k}.") for k, v in tree.items()]
            return {k: v for one in inner for k, v in one.items()}
        return {prefix.rstrip("."): tree}

    now = yaml.safe_load(yaml.safe_dump(config.resolved()))
    before, after = flat(saved), flat(now)
    r = config.resources
    for kind, numerics in (("expert", r.expert_numerics), ("trial", r.trial_numerics)):
        cpus, gpus = (before.get(f"resources.{unit}_per_{kind}", 0) for unit in ("cpus", "gpus"))
        was = Numerics.on("cuda" if gpus else "cpu", max(1, int(cpus)))
        if was != numerics:  # other bits: other experts, and checkpoints that do not fit
            raise UserError(
                f"{config.output_dir} was started with a {kind} on {was.device} with {was.threads} "
                f"threads, and now it is {numerics.device} with {numerics.threads}. Resume with "
                f"the same resources.*_per_{kind}, or give another output.dir."
            )
    for key in sorted({*before, *after}):
        allowed = any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE)
        if not allowed and before.get(key) != after.get(key):
            raise UserError(
                f"{config.output_dir} was started with {key}={before.get(key)!r}, and now it is "
                f"{after.get(key)!r}. Resume with the same, or give another output.dir."
            )


def _check_room(plan: Plan) -> None:
    free = plan.disk_free()
    if free is not None and plan.bytes_missing > free:
        raise UserError(
            f"store.uri={plan.config.store.uri} has {free / 1e9:.1f} GB free, and the experts to "
            f"build take {plan.bytes_missing / 1e9:.1f} GB. Make room, or lower experts.count "
            "or experts.epochs."
        )


def _resume_command(args: argparse.Namespace) -> str:
    words = [".venv/bin/python" if ".venv" in sys.executable else "python", "-m", "ftd_ray.sweep"]
    words += [args.file, *args.overrides]
    if args.address:
        words += ["--address", args.address]
    return shlex.join([*words, "--resume"])


def _result_text(summary: dict[str, Any], config: SweepConfig) -> str:
    from ftd_ray.pictures import short_names

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
            f"{describe_params(best['params'], short_names(config.space))}",
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


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM become an exception of the main thread; the second one is not softened."""

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    _arm_signals()
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _arm_signals() -> None:
    def handle(signum: int, frame: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise Interrupted(signum)

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, handle)


@contextlib.contextmanager
def _only_one(folder: str) -> Iterator[None]:
    """Two drivers of one local folder would take each other's trials for interrupted ones."""
    if not is_local(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(join(folder, ".lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder} is being worked on by another process. Wait for it, or give another "
                "output.dir."
            ) from None
        yield


def _mean_curve(curves: Iterable[dict[int, float]]) -> dict[int, float]:
    """Epoch -> mean over the experts that have it."""
    by_epoch: dict[int, list[float]] = {}
    for curve in curves:
        for epoch, value in curve.items():
            by_epoch.setdefault(epoch, []).append(value)
    return {epoch: fmean(values) for epoch, values in sorted(by_epoch.items())}


if __name__ == "__main__":
    sys.exit(main())
