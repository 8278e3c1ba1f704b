"""python -m ftd experts | distill | evaluate | export: FTD on one machine, without Ray.

Flags carry the names of the configuration keys, as in ``--experts.rho 0.01``.
"""

import argparse
import os
import sys
import time
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs as pafs

from ftd import __version__
from ftd.backends import BACKENDS, gradients_for
from ftd.data import DatasetConfig, describe, load
from ftd.data.dataset import Description
from ftd.data.unreadable import listed
from ftd.distill import DistillConfig, DistillState, distill
from ftd.errors import Diverged, UserError
from ftd.evaluate import EvaluateConfig, Protocol, evaluate, evaluate_random_real
from ftd.expert import ExpertConfig, Numerics, identity, network_for, train_expert
from ftd.native import unavailable
from ftd.synthetic import SyntheticSet
from ftd.trajectory import ExpertSet

PROGRESS_SECONDS = 5
"""Between two lines of a pass over images."""

SECTIONS: dict[str, type] = {
    "dataset": DatasetConfig,
    "experts": ExpertConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:  # at once: threads may be training networks for hours
        print("ftd: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except UserError as error:
        print(f"ftd: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"ftd: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ftd: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def run_experts(args: argparse.Namespace) -> int:
    """Trains experts into a folder, going on with what is there."""
    numerics = _numerics(args)
    device = _device(numerics)
    config = _section(args, "experts")
    network_for(config.network, _described(args))
    data = load(_section(args, "dataset"), device)
    who = identity(config, data.description, data.strategy, numerics)
    store = ExpertSet(_local(), str(Path(args.out).resolve()), who)
    store.create()
    for index in range(config.count):
        resume = store.resume_point(index)
        if resume is not None and resume.epoch >= config.epochs:
            print(f"expert {index}: {resume.epoch} epochs are there")
            continue
        training = train_expert(
            config,
            data,
            index,
            epochs=config.epochs,
            resume=resume,
            device=device,
            backend=numerics.backend,
        )
        *_, snapshot = store.record(index, training, last=config.epochs)
        print(
            f"expert {index}: {snapshot.epoch} epochs, "
            f"validation accuracy {100 * snapshot.val_accuracy:.1f} %",
            flush=True,
        )
    print(f"{config.count} experts in {args.out} (set {store.key}, {store.size() / 1e6:.1f} MB)")
    return 0


def run_distill(args: argparse.Namespace) -> int:
    """Distils from a folder of experts and saves the set."""
    numerics = _numerics(args)
    device = _device(numerics)
    config, settings = _section(args, "distill"), _section(args, "evaluate")
    store = ExpertSet(_local(), str(Path(args.experts).resolve()))
    description = _described(args)
    trained_on = store.identity["data"]
    if trained_on["fingerprint"] != description.fingerprint:
        raise UserError(
            f"the experts in {args.experts} were trained on {trained_on['name']} "
            f"{trained_on['fingerprint'][:8]}, and this is {description.name} "
            f"{description.fingerprint[:8]}. Give the same dataset flags to both commands."
        )
    epochs = config.max_start_epoch - 1 + config.expert_epochs
    complete = store.complete(epochs)
    if not complete:
        longest = max((m.epochs for i in store.complete(0) if (m := store.manifest(i))), default=0)
        config.check(epochs=longest, per_class=description.per_class)
    config.check(epochs=epochs, per_class=description.per_class)
    _writable(args.out)
    data = load(_section(args, "dataset"), device)
    if data.strategy != store.identity["augment"]:
        raise UserError(
            f"the experts were trained with dataset.augment={store.identity['augment']}, and this "
            f"is {data.strategy}. Use the same."
        )
    network_name = store.identity["experts"]["network"]
    gradients = gradients_for(network_for(network_name, description), numerics.backend)
    protocol = Protocol.of(settings, network=network_name, augment=data.strategy)
    short = Protocol.of(
        settings, network=network_name, augment=data.strategy, epochs=settings.search_epochs
    )
    state: DistillState | None = None
    for state, record in distill(
        config,
        data,
        Picked(store, complete),
        network_name,
        epochs=epochs,
        seed=args.seed,
        backend=numerics.backend,
    ):
        if record.step % settings.every == 0 or record.step == config.iterations:
            score = evaluate(
                gradients, state.ema_images, state.label_targets, record.syn_lr, short, data.val,
                networks=range(settings.search_networks), seed=args.seed,
            )  # fmt: skip
            print(
                f"step {record.step:5d}  loss {record.loss:.4f}  eta {record.syn_lr:.5f}  "
                f"validation {score}",
                flush=True,
            )
    assert state is not None
    result = SyntheticSet(
        images=state.ema_images.cpu(),
        labels=state.label_targets.cpu(),
        syn_lr=state.syn_lr.item(),
        normalisation=data.normalisation.to(torch.device("cpu")),
        class_names=description.class_names,
        protocol=protocol,
        provenance={
            "ftd": __version__,
            "dataset": trained_on,
            "experts": store.key,
            "distill": asdict(config),
            "numerics": asdict(numerics),
            "seed": args.seed,
        },
    )
    result.save(args.out)
    print(f"saved {args.out}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluates a saved set by its own protocol, beside random real images."""
    numerics = _numerics(args)
    device = _device(numerics)
    if args.networks < 1:
        raise UserError(f"--networks {args.networks} must be at least 1.")
    synthetic = SyntheticSet.load(args.file)
    _described(args)
    data = load(_section(args, "dataset"), device)
    if synthetic.class_names != data.description.class_names:
        raise UserError(
            f"{args.file} has the classes {', '.join(synthetic.class_names[:4])}, ...; the data "
            f"set has {', '.join(data.description.class_names[:4])}, .... Point at the same data."
        )
    if tuple(synthetic.images.shape[1:]) != data.shape:
        raise UserError(
            f"{args.file} has images of shape {tuple(synthetic.images.shape[1:])}, the data set "
            f"{data.shape}. Set dataset.resolution={synthetic.images.shape[-1]}."
        )
    data = data.normalised_by(synthetic.normalisation.to(device))
    network = network_for(synthetic.protocol.network, data.description)
    gradients = gradients_for(network, numerics.backend)
    split = data.test if args.split == "test" else data.val
    networks = range(args.networks)
    score = evaluate(
        gradients, synthetic.images.to(device), synthetic.labels.to(device), synthetic.syn_lr,
        synthetic.protocol, split, networks=networks, seed=args.seed,
    )  # fmt: skip
    print(f"distilled    {score}  ({args.split}, {len(networks)} networks)", flush=True)
    ipc = len(synthetic.images) // len(synthetic.class_names)
    best = max(
        (
            evaluate_random_real(
                gradients, data, ipc, lr, synthetic.protocol, data.val, networks=networks,
                seed=args.seed,
            ).mean,
            lr,
        )
        for lr in (0.01, synthetic.syn_lr)
    )  # fmt: skip
    baseline = evaluate_random_real(
        gradients, data, ipc, best[1], synthetic.protocol, split, networks=networks, seed=args.seed
    )
    print(f"random real  {baseline}  (same protocol, learning rate {best[1]:g})")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Writes a saved set as a picture, or as a folder of PNG files."""
    if not (args.picture or args.folder):
        raise UserError("nothing to write. Give --picture FILE.png or --folder DIR, or both.")
    synthetic = SyntheticSet.load(args.file)
    if args.picture:
        _writable(args.picture)
        if Path(args.picture).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
            raise UserError(f"--picture {args.picture} is no picture file. End it in .png.")
        synthetic.grid().save(args.picture)
        print(f"wrote {args.picture}")
    if args.folder:
        print(f"wrote {synthetic.export_folder(args.folder)} images below {args.folder}")
    return 0


class Picked:
    """The complete experts of a set, numbered from 0: what ``distill`` reads from."""

    def __init__(self, store: ExpertSet, experts: Sequence[int]):
        self._store, self._experts = store, experts

    @property
    def experts(self) -> int:
        return len(self._experts)

    def segment(self, expert: int, start: int, end: int) -> Any:
        return self._store.segment(self._experts[expert], start, end)


# --- flags ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ftd", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: typing.Callable[[argparse.Namespace], int], *sections: str) -> Any:
        doc = run.__doc__ or ""
        sub = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.set_defaults(run=run)
        for section in sections:
            _add_section(sub, section)
        if sections:
            sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
            sub.add_argument("--threads", type=int, default=torch.get_num_threads())
            sub.add_argument(
                "--backend", choices=BACKENDS, default="auto",
                help="how gradients are computed; auto is native on CPU, with a C compiler",
            )  # fmt: skip
        return sub

    sub = command("experts", run_experts, "dataset", "experts")
    sub.add_argument("--out", required=True, help="folder of the expert set")
    sub = command("distill", run_distill, "dataset", "distill", "evaluate")
    sub.add_argument("--experts", required=True, help="folder of the expert set")
    sub.add_argument("--out", required=True, help="file to save the synthetic set in (.npz)")
    sub.add_argument("--seed", type=int, default=0)
    sub = command("evaluate", run_evaluate, "dataset")
    sub.add_argument("file", help="a saved synthetic set")
    sub.add_argument("--split", choices=("test", "val"), default="test")
    sub.add_argument("--networks", type=int, default=5)
    sub.add_argument("--seed", type=int, default=0)
    sub = command("export", run_export)
    sub.add_argument("file", help="a saved synthetic set")
    sub.add_argument("--picture", help="PNG file for a grid of the images")
    sub.add_argument("--folder", help="folder for one PNG an image, by class")
    return parser


def _add_section(parser: argparse.ArgumentParser, section: str) -> None:
    group = parser.add_argument_group(section)
    hints = typing.get_type_hints(SECTIONS[section])
    for f in fields(SECTIONS[section]):
        kinds = [t for t in typing.get_args(hints[f.name]) if t is not types.NoneType]
        kind = kinds[0] if kinds else hints[f.name]
        flag = f"--{section}.{f.name}"
        required = f.default is MISSING
        if typing.get_origin(kind) is dict:
            group.add_argument(flag, type=_mapping, default=None, metavar="KEY=VALUE,...")
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            group.add_argument(
                flag,
                type=kind,
                required=required,
                default=None,
                metavar=kind.__name__.upper(),
                help=None if required or f.default is None else f"default {f.default}",
            )


def _mapping(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE,KEY=VALUE")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _section(args: argparse.Namespace, section: str) -> Any:
    given = {
        f.name: value
        for f in fields(SECTIONS[section])
        if (value := getattr(args, f"{section}.{f.name}")) is not None
    }
    return SECTIONS[section](**given)


def _described(args: argparse.Namespace) -> Description:
    """What the data set is; a pass over its images says now and then how far it is."""
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECONDS and done < total:
            told = time.monotonic()
            print(f"images {done}/{total} read", file=sys.stderr, flush=True)

    description = describe(_section(args, "dataset"), progress)
    if left_out := description.unreadable:
        print(f"left out {len(left_out)} unreadable images: {listed(left_out)}", file=sys.stderr)
    return description


def _numerics(args: argparse.Namespace) -> Numerics:
    numerics = Numerics.on(args.device, args.threads, args.backend)
    if args.backend == "auto" and args.device == "cpu" and (reason := unavailable()):
        print(f"ftd: backend eager, several times slower than native. {reason}", file=sys.stderr)
    return numerics


def _device(numerics: Numerics) -> torch.device:
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs an NVIDIA GPU, and torch sees none. Use --device cpu.")
    if numerics.device == "cpu" and numerics.threads < 1:
        raise UserError(f"--threads {numerics.threads} must be at least 1.")
    return numerics.apply()


def _writable(path: str) -> None:
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise UserError(f"the folder {folder} for {path} does not exist. Make it first.")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder. Name a file in it, such as {path}/set.npz.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} cannot be written. Choose another.")


def _local() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


if __name__ == "__main__":
    sys.exit(main())
