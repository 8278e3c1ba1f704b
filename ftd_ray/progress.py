"""What a sweep shows while it runs: plain lines, and on a terminal a live foot below them."""

import time
from collections.abc import Sequence
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ftd_ray.experts.orders import FleetStatus
from ftd_ray.search import Ended, Suggestion
from ftd_ray.trial import Report

NODES_NAMED = 3
"""Nodes that a line names at most."""

INDENT = 11
"""Where the text of a line begins, after what it is about."""


class ExpertLine:
    """Experts done and needed, how fast, where, how good, and when they may be there."""

    def __init__(self) -> None:
        self._status = FleetStatus()

    def update(self, status: FleetStatus) -> bool:
        """Takes the fleet's latest word; says whether the counts changed."""
        before, self._status = self.counts(), status
        return self.counts() != before

    def counts(self) -> tuple[int, int]:
        """Experts that are there, and that are needed."""
        sets = self._status.sets.values()
        return sum(len(s.present) for s in sets), sum(s.needed for s in sets)

    def text(self) -> str:
        status, sets = self._status, self._status.sets.values()
        done, needed = self.counts()
        built = sum(len(s.built.keys() & s.present) for s in sets)
        training = sum(len(s.running) for s in sets)
        parts = [f"{done}/{needed}"]
        if done > built:
            parts.append(f"{done - built} from the store")
        if training:
            parts.append(f"{training} in training{_where(status)}")
        if status.starting and done < needed:
            parts.append(f"{status.starting} waiting for room")
        rate = status.epochs_per_second
        left = sum(s.epochs_left for s in sets)
        if rate and left:
            parts += [f"{per_second(rate)} epochs/s", f"about {duration(left / rate)} to go"]
        if finals := [a for s in sets for a in s.final_accuracies()]:
            parts.append(f"validation {100 * fmean(finals):.1f} %")
        return "experts    " + ", ".join(parts)


def _where(status: FleetStatus) -> str:
    """How many are in training on which node; of many nodes only their number."""
    busy = {name: n.running for name, n in sorted(status.nodes.items()) if n.running}
    if len(status.nodes) < 2 or not busy:
        return ""
    if len(busy) > NODES_NAMED:
        return f" on {len(busy)} nodes"
    return f" ({', '.join(f'{name}: {count}' for name, count in busy.items())})"


class Progress:
    """Counts of experts and trials, the best so far, and when it may be over.

    With 0 trials it is about experts alone.
    """

    def __init__(self, console: Console, trials: int, concurrency: int, names: dict[str, str]):
        self._console, self._names = console, names
        self._trials, self._concurrency = trials, concurrency
        self._began: dict[int, float] = {}
        """Running trial -> when it started."""
        self._ended: list[Ended] = []
        self._durations: list[float] = []
        self._experts = ExpertLine()
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._foot, console=self._console, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def already_ended(self, ended: Sequence[Ended]) -> None:
        """Trials from before an interruption."""
        self._ended += ended

    def trial_started(self, suggestion: Suggestion) -> None:
        self._began[suggestion.number] = time.monotonic()
        again = f" (repeat {suggestion.repeat}: another seed)" if suggestion.repeat else ""
        first = f" ({suggestion.start_from})" if suggestion.start_from else ""
        self.say(f"trial {suggestion.number:3d}  {self._text(suggestion.params)}{first}{again}")

    def trial_reported(self, number: int, report: Report) -> None:
        last = report.curve[-1]
        self.say(
            f"trial {number:3d}  step {report.step:5d}  "
            f"validation {100 * report.val_accuracy:5.1f} ± {100 * report.val_std:.1f} %  "
            f"loss {last.loss:.3f}  eta {last.syn_lr:.4f}"
        )

    def trial_ended(self, ended: Ended) -> None:
        now = time.monotonic()
        self._durations.append(now - self._began.pop(ended.number, now))
        self._ended.append(ended)
        tail = f": {ended.reason}" if ended.reason else ""
        score = "" if ended.value is None else f" at {100 * ended.value:.1f} %"
        self.say(f"trial {ended.number:3d}  {ended.state}{score}{tail}")
        if self._live is None:
            self.say("; ".join(self._trial_lines()))

    def experts(self, status: FleetStatus) -> None:
        """The broker's latest word; a line for each expert done, where there is no foot."""
        if self._experts.update(status) and self._experts.counts()[1] and self._live is None:
            self.say(self._experts.text())

    @property
    def expert_counts(self) -> tuple[int, int]:
        """Experts that are there, and that are needed."""
        return self._experts.counts()

    # --- texts ------------------------------------------------------------------------------

    def _foot(self) -> RenderableType:
        lines = [self._experts.text()] if self._experts.counts()[1] else []
        lines += self._trial_lines()
        width = self._console.width
        return Group(*(Text(folded(line, width), style="bold cyan") for line in ["", *lines]))

    def _trial_lines(self) -> list[str]:
        if not self._trials:
            return []
        counts = {s: sum(e.state == s for e in self._ended) for s in ("complete", "pruned")}
        failed = len(self._ended) - sum(counts.values())
        trials = (
            f"trials     {len(self._ended)}/{self._trials}: {len(self._began)} running, "
            f"{counts['complete']} complete, {counts['pruned']} pruned"
            + (f", {failed} failed" if failed else "")
            + self._eta()
        )
        done = [e for e in self._ended if e.state == "complete" and e.value is not None]
        lines = [trials]
        if done:
            best = max(done, key=lambda e: e.value or 0.0)
            lines.append(
                f"best so far {100 * (best.value or 0):.1f} %, trial {best.number}: "
                f"{self._text(best.params)}"
            )
        return lines

    def _eta(self) -> str:
        left = self._trials - len(self._ended)
        if not self._durations or not left:
            return ""
        mean = sum(self._durations) / len(self._durations)
        return f", about {duration(left * mean / max(1, self._concurrency))} to go"

    def _text(self, params: dict[str, object]) -> str:
        return describe_params(params, self._names)


def describe_params(params: dict[str, object], names: dict[str, str]) -> str:
    """``rho 0.01  syn_steps 20``."""
    shown = (
        f"{names.get(k, k)} {v:g}" if isinstance(v, float) else f"{names.get(k, k)} {v}"
        for k, v in params.items()
    )
    return "  ".join(shown) or "(nothing varied)"


def folded(text: str, width: int) -> str:
    """A line broken after commas where it is too wide, and indented as the text of all lines."""
    lines, *parts = text.split(", ")
    used = len(lines)
    for part in parts:
        if used + len(part) + 3 <= width:
            lines, used = f"{lines}, {part}", used + len(part) + 2
        else:
            lines, used = f"{lines},\n{' ' * INDENT}{part}", INDENT + len(part)
    return lines


def per_second(rate: float) -> str:
    """0.26, 3.4, 127."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
