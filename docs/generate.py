"""Writes docs/configuration.md from the configuration's own dataclasses and their docstrings."""

import ast
import inspect
import sys
import textwrap
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ftd_ray.config import SEARCHED, SECTIONS
from ftd_ray.presets import PRESETS

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

Every key of a sweep, with its default. This page is written from the code by `make docs`.

A sweep is a YAML file with the sections below, a `name` (it names the folder `runs/<name>` and the
MLflow experiment) and a `seed` (default 0: search, distillation and evaluation; experts and splits
have seeds of their own, so that new seeds reuse the experts).

Any value can be given on the command line, where it is YAML too and replaces what stands in the
file, a search dimension as well:

    python -m ftd_ray.sweep FILE distill.ipc=10 'experts.rho={choice: [0.01, 0.02]}'

## Search dimensions

A value of `experts` or `distill` may be a dimension of the search instead of a literal:

| written | means |
|---|---|
| `{choice: [a, b, c]}` | one of these; numbers are ordered, words are categories |
| `{int: [low, high], step: s}` | whole numbers from low to high |
| `{float: [low, high], log: true}` | any number between, on a logarithmic scale |
| `{float: [low, high], log: true, levels: n}` | n values between, evenly spaced on that scale |

Dimensions of `experts` must be discrete, so that trials share expert sets: one set is trained for
each distinct combination. Every point of the space is checked before anything starts.

A dimension may exist only where others have certain values, and has its default elsewhere:

    experts:
      sharpness: {choice: [sam, gsam]}
      gsam_alpha: {choice: [0.1, 0.4], when: {sharpness: gsam}}

`when` maps keys of other dimensions (`experts.sharpness`, or `sharpness` within the same section)
to a value or a list of values; all of them must hold.

## Images

`imagefolder` takes folders as `CLASS/...`, or `train/CLASS/...` beside `valid/` and `test/`;
`parquet` takes files named `train-*`, `validation-*` and `test-*`. A part may also be called
`training`, `val`, `valid`, `validation`, `dev` or `testing`. A part that is given is used as it is.
One that is not is held out of train, class by class: test first, then validation of the rest.
`imagenette` alone, as its papers do, takes its validation part for test where there is no test
part. The plan says what was done, and how many images of each class are where.

Images in folders below a class folder are of that class, and links are followed. Hidden files,
`__MACOSX`, files that are no images by their names and folders without an image are passed over.

Before anything else starts, every image is decoded, once, by all cores; a dry run does so too. The
pixels and what was found stay in `$FTD_CACHE`. Images are turned as their EXIF says, laid over
white where they are transparent, made RGB (grey, palette, CMYK), cut to a square in the middle and
resized. 16-bit values are white at 65535, floats at 1; values outside are not guessed at, and the
file counts as unreadable. Of an animation or of several pages the first is taken. A data set of
grey images has three equal channels.

Files that cannot be read are listed with their names and reasons. With `on_unreadable: skip` they
are left out, as if they had been deleted.

## Samplers, pruners and what they can do

| sampler | learns | not with |
|---|---|---|
| `tpe` | yes, also from `warm_start` | |
| `gp` | yes, also from `warm_start`; takes longer with every trial | conditions |
| `cmaes` | yes, from complete trials | words, conditions, a single dimension, several objectives |
| `nsga2` | yes, by generations of `population` trials | conditions, a single objective |
| `qmc` | no; spreads its points evenly | words, conditions |
| `random` | no | |
| `grid` | no; every point once, shuffled | continuous dimensions, conditions, `start_from` |

What is not possible is refused before anything starts: Optuna itself would go on with random draws.

`asha`, `hyperband` and `median` compare trials by validation accuracy at the same outer step.
`hyperband` splits the trials over brackets, each with a sampler that learns from its own trials
alone: with `tpe` or `gp` it wants many trials.
`wilcoxon` compares fresh networks one by one with those of the best trial, which had the same
seeds, and prunes between the distillations of a trial (`repeats`).

**Failed trials.** A trial that fails counts, and is not replaced. When its training or that of its
experts diverged, samplers and pruners take it for worse than every trial that lived, so that a
search leaves a corner of its space in which trials diverge; it stays FAIL in the study. Other
failures say nothing about their point and are passed over. When most of the first trials fail for
one reason, the sweep says so once, with what those trials have in common and what helps; the report
and `failures` in `summary.json` say it too.

**Backends.** `resources.expert_backend` and `resources.trial_backend` say how gradients are
computed. `native` (on CPU) is the ConvNet differentiated by hand over C kernels that are compiled
once a machine, in seconds, and kept in `$FTD_CACHE` (default `~/.cache/ftd`); it needs a C
compiler. `eager` is autograd, several times slower and the specification of the others;
`compiled` is autograd through torch.compile, for GPUs, and has not been measured on one yet.
`distill.gradient: direct` always is autograd.
`auto` is `native` on CPU where the machine that starts the sweep has a C compiler, and `eager`
otherwise; the plan says which. Backends differ in the last bits of float32, so a choice is part of
an expert set's key, is written into the sweep's `sweep.yaml`, and stays for `--resume`.

**Optimisers.** `distill.optimiser: sgd` is the paper's. Its learning rates have units: gradients
scale with the loss, N, M, IPC, the resolution and the experts, so that rates which suit one point
kill the next (eta becomes negative, the loss leaves the numbers). `rmsprop` descends log L and log
eta, and divides each image's gradient by its running root mean square: `lr_img` is what a class
changes by in one step, in standard deviations of the pixels (0.03 to 0.3, of which each of its
images gets an equal part), eta cannot leave (0, inf), and starts where some segments are matched
best. A dimension can choose between both, each with its own rates:

    optimiser: {choice: [sgd, rmsprop]}
    lr_img: {choice: [0.03, 0.1, 0.3], when: {optimiser: rmsprop}}

**The average.** `ema_decay` counts in outer steps and starts at the initial images, as the paper's:
after 200 steps at 0.999 they still are 82 % of it. `ema_share: 0.1` remembers a tenth of the
iterations, however many there are, and none of the initial images.

**Repeats.** The trials of a sweep distil from the same seed and are evaluated by fresh networks of
the same seeds, so that they differ by their configurations alone. With `repeats: 3` each trial
distils three times, from three seeds that are the same in all trials, one after the other; outer
steps count on, and a report is the mean over the repeats so far. The set of a trial is that of its
best repeat. A point that is drawn again (`duplicates: repeat`) distils from seeds of its own and
says so.

**Points to begin with.** `start_from` takes presets and points. The presets are {presets}: FTD's
Table 7, and for the ImageNet subsets its author's values. Where the sweep fixes a key otherwise
than the preset, the plan says so.

**Budgets.** When `max_hours` or `max_gpu_hours` is spent, no trial goes on: the best complete trial
is evaluated, and the summary says `stopped_by`. Trials under way count as interrupted: with a
larger budget, `--resume` goes on with them. Experts count once, in the sweep that had them built.

**What may change on `--resume`:** the number of trials, the concurrency, budgets, finalists,
resources (with the same threads and devices), where things are, `dataset.columns` and
`dataset.on_unreadable`. Anything else is refused. Where the images have changed since the sweep
began, for instance because a damaged one was removed, accuracies before and after cannot be
compared: if no trial is complete or pruned, the search begins anew on them and says so (the old
journal stays in the folder as `study.journal.*`); otherwise the sweep is refused.

**The study** is Optuna's journal, `study.journal` in the sweep's folder. On an object store a sweep
puts what is new beside it, in `study.journal.d/`, and makes it one file again when it ends; to copy
a sweep that was killed, take both.
"""

TAIL = """\
## What a trial's state is called

| here, in `summary.json` | Optuna | Ray Tune | MLflow |
|---|---|---|---|
| complete | COMPLETE | TERMINATED | FINISHED, tag `ftd.state` = complete |
| pruned | PRUNED | TERMINATED | FINISHED, tags `ftd.state` = pruned and `pruned` |
| failed | FAIL, user attributes `reason` and `diverged` | ERROR | FAILED, tag `ftd.reason` |
| lost with its process, taken up again | RUNNING | ERROR, and there once more | RUNNING |
| interrupted, to be resumed | RUNNING | (gone) | KILLED until resumed |

## What is lost, and what then

- A process (of Tune's, a worker, the pool, the broker, an expert's) or a node: its trials and
  experts are taken up again under their own numbers, from their checkpoints, without bound. Only
  what ends its own process eight times in a row, on nodes that stay, and gets no further fails for
  it.
- A GPU or its driver, the data set or the experts on one node, the room on its disk, a GPU that
  strangers hold: the same, elsewhere first. A node where that happens three times in a row, and
  nothing succeeds in between, is left out, named once, and listed as `left_out` in `summary.json`.
- The memory of a GPU, to a trial or an expert that is too large for its share: it is tried three
  times, for there may be larger ones; then it fails, with what it needed and what to set.
- The store, the sweep's folder, or the last node: the sweep stops with its state saved, and
  `--resume` goes on.

Before its first use each device does a small matching step with a known answer.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The string that stands below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
        else:
            name = ""
    return docs


def render() -> str:
    names = ", ".join(f"`{name}`" for name in PRESETS)
    parts = [HEAD.replace("{presets}", names)]
    for section, cls in SECTIONS.items():
        docs, hints = field_docs(cls), typing.get_type_hints(cls)
        note = " Values may be search dimensions." if section in SEARCHED else ""
        parts.append(f"## `{section}`\n\n{(cls.__doc__ or '').strip()}{note}\n")
        rows = ["| key | default | meaning |", "|---|---|---|"]
        for f in fields(cls):
            meaning = docs.get(f.name, "")
            if typing.get_origin(hints[f.name]) is typing.Literal:
                choices = ", ".join(f"`{v}`" for v in typing.get_args(hints[f.name]))
                meaning = f"One of {choices}. {meaning}".strip()
            meaning = meaning.replace("``", "`").replace("<", "&lt;")
            rows.append(f"| `{f.name}` | {_default(f.default)} | {meaning} |")
        parts.append("\n".join(rows) + "\n")
    parts.append(TAIL)
    return "\n".join(parts)


def _default(value: Any) -> str:
    if value is MISSING:
        return "(required)"
    if value is None:
        return "`null`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    TARGET.write_text(render())
    print(f"wrote {TARGET}", file=sys.stderr)
