"""Backends: native and compiled against autograd, and how one is chosen."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftd import backends
from ftd.backends import gradients_for, resolve
from ftd.compiled import MULTIPLE, CompiledGradients
from ftd.data import Dataset
from ftd.errors import Diverged, UserError
from ftd.evaluate import Protocol, evaluate
from ftd.expert import ExpertConfig, Numerics, identity, train_expert
from ftd.gradients import Gradients, SecondOrder
from ftd.native import NativeGradients, convnet, library
from ftd.native.chunks import chunk_sizes
from ftd.networks import Network, build_network
from ftd.parallel import each

SHAPES = {
    "as the field's": ("ConvNetD3W32", 3, 32, 10, 7),
    "tiles of 4 and 2, odd width": ("ConvNetD2W20", 1, 12, 5, 3),
    "the deepest": ("ConvNetD5W16", 3, 32, 10, 2),
    "the smallest": ("ConvNetD1W3", 2, 6, 3, 5),
}


def network_of(shape: str) -> Network:
    name, channels, resolution, classes, _ = SHAPES[shape]
    return build_network(name, channels=channels, resolution=resolution, classes=classes)


def problem(
    shape: str, dtype: torch.dtype, soft: bool, n: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(params, images, targets, direction); norms and biases are moved off their initial values."""
    _, channels, resolution, classes, few = SHAPES[shape]
    n = n or few
    gen = torch.Generator().manual_seed(0)
    params = network_of(shape).init(gen)
    params = (params + 0.1 * torch.randn(params.shape, generator=gen)).to(dtype)
    images = torch.randn(n, channels, resolution, resolution, generator=gen).to(dtype)
    along = torch.randn(params.shape, generator=gen).to(dtype)
    targets = torch.arange(n) % classes
    if soft:  # rows that do not sum to 1, so that nothing leans on it
        targets = 1.3 * torch.rand(n, classes, generator=gen).to(dtype).softmax(1)
    return params, images, targets, along


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_agree(
    ours: Gradients, given: tuple[Tensor, Tensor, Tensor, Tensor], bound: float
) -> None:
    params, images, targets, along = given
    theirs = Gradients(ours.network)
    assert error(ours.logits(params, images), theirs.logits(params, images)) < bound
    (loss, grad), (loss_, grad_) = (g.gradient(params, images, targets) for g in (ours, theirs))
    assert error(loss, loss_) < bound and error(grad, grad_) < bound
    a, b = (g.second_order(params, images, targets, along) for g in (ours, theirs))
    assert (a.s - b.s).abs() < bound * along.norm() * grad.norm()
    assert error(a.grad_P, b.grad_P) < bound
    assert error(a.grad_images, b.grad_images) < bound
    if targets.is_floating_point():
        assert a.grad_targets is not None and b.grad_targets is not None
        assert error(a.grad_targets, b.grad_targets) < bound
    else:
        assert a.grad_targets is None and b.grad_targets is None
    assert a.grad_images.shape == images.shape and not a.grad_P.requires_grad


# --- native ---------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_autograd_in_float64(shape: str, soft: bool) -> None:
    given = problem(shape, torch.float64, soft)
    assert_agree(NativeGradients(network_of(shape)), given, 1e-12)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_autograd_in_float32(shape: str, soft: bool) -> None:
    given = problem(shape, torch.float32, soft)
    assert_agree(NativeGradients(network_of(shape)), given, 1e-4)


def test_native_second_order_is_a_difference_of_gradients() -> None:
    """Apart from autograd: d/de grad l(w + e v) at 0, and s is its product's first order."""
    shape = "the smallest"
    params, images, targets, along = problem(shape, torch.float64, soft=False)
    gradients, e = NativeGradients(network_of(shape)), 1e-6
    ahead, behind = (gradients.gradient(params + k * along, images, targets) for k in (e, -e))
    ds = gradients.second_order(params, images, targets, along)
    assert error((ahead[1] - behind[1]) / (2 * e), ds.grad_P) < 1e-6
    assert ((ahead[0] - behind[0]) / (2 * e)).item() == pytest.approx(ds.s.item(), rel=1e-6)


def test_chunks_share_a_batch_evenly_and_stay_below_the_limit() -> None:
    assert chunk_sizes(100, 10, 1) == [10] * 10
    assert chunk_sizes(10, 11, 2) == [5, 5]
    assert chunk_sizes(7, 3, 2) == [2, 2, 2, 1]
    assert chunk_sizes(1, 10, 4) == [1]
    for n in (1, 2, 9, 64, 255):
        for limit in (1, 3, 300):
            for threads in (1, 2, 3):
                sizes = chunk_sizes(n, limit, threads)
                assert sum(sizes) == n and 0 < min(sizes) <= max(sizes) <= limit
                assert len(sizes) % threads == 0 or len(sizes) == n
                assert max(sizes) - min(sizes) <= 1


def test_a_batch_in_chunks_is_the_batch_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = "as the field's"
    given = problem(shape, torch.float64, soft=True, n=11)
    whole = NativeGradients(network_of(shape))
    monkeypatch.setattr(convnet, "CHUNK", 3 * 32 * 32 * 32)
    assert_agree(NativeGradients(network_of(shape)), given, 1e-12)
    a, b = (g.second_order(*given) for g in (whole, NativeGradients(network_of(shape))))
    assert error(a.grad_P, b.grad_P) < 1e-12
    assert error(a.grad_images, b.grad_images) < 1e-12


def bits(ds: SecondOrder) -> list[bytes]:
    return [t.numpy().tobytes() for t in (ds.s, ds.grad_P, ds.grad_images)]


def test_the_same_bits_come_again_whichever_thread_is_faster() -> None:
    shape = "as the field's"
    given = problem(shape, torch.float32, soft=False, n=40)
    torch.set_num_threads(3)
    runs = {tuple(bits(NativeGradients(network_of(shape)).second_order(*given))) for _ in range(5)}
    assert len(runs) == 1
    assert torch.get_num_threads() == 3


def test_what_was_in_a_workspace_before_does_not_matter() -> None:
    """The same arrays serve batches of every size and both orders."""
    shape = "as the field's"
    gradients = NativeGradients(network_of(shape))
    given = problem(shape, torch.float32, soft=False)
    fresh = bits(gradients.second_order(*given))
    large = problem(shape, torch.float32, soft=True, n=19)
    gradients.second_order(*(torch.full_like(t, torch.nan) for t in large[:2]), *large[2:])
    gradients.gradient(*large[:3])
    assert bits(gradients.second_order(*given)) == fresh


def test_a_norms_scale_hides_the_bias_before_it() -> None:
    params, images, targets, _ = problem("as the field's", torch.float32, soft=False)
    network = network_of("as the field's")
    _, grad = NativeGradients(network).gradient(params, images, targets)
    pieces = network.pieces(grad)
    assert not any(pieces[4 * i + 1].any() for i in range(3))
    assert all(pieces[4 * i + k].any() for i in range(3) for k in (0, 2, 3))


SMALL = ExpertConfig(network="ConvNetD2W16", lr=0.1, batch_size=200, rho=0.05)


def test_an_expert_is_the_same_but_for_rounding(digits: Dataset) -> None:
    config = replace(SMALL, lr=0.01)
    eager, native = (
        [s.params_P for s in train_expert(config, digits, 0, epochs=1, backend=backend)]
        for backend in ("eager", "native")
    )
    assert torch.equal(eager[0], native[0])
    assert 0 < (eager[1] - native[1]).norm() < 1e-3 * (eager[1] - eager[0]).norm()


def test_an_evaluation_does_not_depend_on_threads(digits: Dataset) -> None:
    network = build_network("ConvNetD2W16", channels=1, resolution=8, classes=10)
    images, labels = digits.train.batch(torch.arange(20)), digits.train.labels[:20]
    protocol = Protocol(
        network=network.name, epochs=6, batch_size=8, momentum=0.9, weight_decay=0.0,
        augment="flip",
    )  # fmt: skip

    def accuracies(threads: int) -> tuple[float, ...]:
        torch.set_num_threads(threads)
        gradients = gradients_for(network, "native")
        where = {"networks": range(3), "seed": 0}
        return evaluate(gradients, images, labels, 0.1, protocol, digits.val, **where).accuracies

    assert accuracies(2) == accuracies(1)


@pytest.mark.parametrize("lr", [1e3, 1e6, 1e19, 1e30])
def test_weights_that_run_away_are_noticed(digits: Dataset, lr: float) -> None:
    """Kernels take NaN for a number below 0; the norm's scale tells."""
    config = ExpertConfig(network="ConvNetD2W16", lr=lr, batch_size=100, sharpness="none")
    with pytest.raises(Diverged, match="expert 0 diverged"):
        list(train_expert(config, digits, 0, epochs=3, backend="native"))


def test_images_of_another_shape_are_not_read(digits: Dataset) -> None:
    shape = "as the field's"
    params, images, targets, _ = problem(shape, torch.float32, soft=False)
    with pytest.raises(AssertionError, match="no bounds"):
        NativeGradients(network_of(shape)).gradient(params, images[..., :16, :16], targets)


def test_a_piece_that_fails_leaves_the_threads_as_they_were() -> None:
    torch.set_num_threads(2)

    def piece(i: int) -> int:
        if i == 0:
            raise ValueError("no")
        time.sleep(0.05)
        return torch.get_num_threads()

    with pytest.raises(ValueError, match="no"):
        each(piece, range(6))
    assert torch.get_num_threads() == 2
    assert each(piece, range(1, 5)) == [1] * 4


# --- the compiler ---------------------------------------------------------------------------

COUNTING = """#!/bin/sh
echo "$*" >> {log}
exec cc "$@"
"""


def counting_compiler(folder: Path) -> tuple[Path, Path]:
    compiler, log = folder / "counting-cc", folder / "log"
    compiler.write_text(COUNTING.format(log=log))
    compiler.chmod(0o755)
    return compiler, log


def test_processes_of_a_node_compile_once(tmp_path: Path) -> None:
    compiler, log = counting_compiler(tmp_path)
    environment = {**os.environ, "FTD_CACHE": str(tmp_path / "cache"), "CC": str(compiler)}
    code = "from ftd.native import unavailable; assert unavailable() is None"
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [p.wait() for p in running] == [0, 0, 0]
    compiled = [line for line in log.read_text().splitlines() if "kernels.c" in line]
    assert len(compiled) == 1
    assert [p.suffix for p in (tmp_path / "cache" / "native").glob("*.so")] == [".so"]


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("FTD_CACHE", str(tmp_path / "cache"))
    library.kernels.cache_clear()
    yield monkeypatch
    library.kernels.cache_clear()


def test_without_a_compiler_auto_is_eager(fresh_compiler: pytest.MonkeyPatch) -> None:
    fresh_compiler.setenv("CC", "no-such-compiler")
    assert resolve("auto", "cpu") == "eager"
    assert Numerics.on("cpu", 1).backend == "eager"
    shape = "the smallest"
    with pytest.raises(UserError, match=r"no-such-compiler is not on this machine.*Install gcc"):
        NativeGradients(network_of(shape)).gradient(*problem(shape, torch.float32, False)[:3])


def test_a_compiler_that_fails_is_told_in_a_line(
    fresh_compiler: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh_compiler.setenv("CC", str(compiler))
    reason = library.unavailable()
    assert reason is not None and "broken-cc failed (no space left)" in reason
    assert "\n" not in reason
    assert not list((tmp_path / "cache" / "native").glob("*.so"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/no/such/shell\n", "cannot be run"),
        ("#!/bin/sh\nexit 0\n", "failed (no message)"),
    ],
)
def test_a_compiler_that_is_none_is_told(
    fresh_compiler: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    compiler = tmp_path / "strange-cc"
    compiler.write_text(script)
    compiler.chmod(0o755)
    fresh_compiler.setenv("CC", str(compiler))
    reason = library.unavailable()
    assert reason is not None and said in reason and "strange-cc" in reason


def test_a_compiler_command_that_cannot_be_read_is_told(
    fresh_compiler: pytest.MonkeyPatch,
) -> None:
    fresh_compiler.setenv("CC", 'gcc "x')
    assert "is no command" in (library.unavailable() or "")


def test_a_cache_that_cannot_be_written_is_told(
    fresh_compiler: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    reason = library.unavailable()
    assert reason is not None and str(tmp_path / "cache") in reason and "FTD_CACHE" in reason


# --- the choice -----------------------------------------------------------------------------


def test_auto_is_native_on_cpu_and_eager_elsewhere() -> None:
    assert resolve("auto", "cpu") == "native"
    assert resolve("auto", "cuda") == "eager"
    assert [resolve(b, "cpu") for b in backends.BACKENDS[1:]] == list(backends.BACKENDS[1:])
    with pytest.raises(UserError, match="native computes on CPUs"):
        resolve("native", "cuda")
    with pytest.raises(UserError, match=r"'fast' is not known. Take one of auto, native"):
        resolve("fast", "cpu")


def test_the_backend_is_part_of_what_an_expert_is(digits: Dataset) -> None:
    def numerics(backend: str) -> dict[str, object]:
        who = identity(SMALL, digits.description, "none", Numerics.on("cpu", 1, backend))
        return who["numerics"]

    assert numerics("native") == numerics("eager") | {"backend": "native"}
    assert "backend" not in numerics("eager")  # keys of older stores stay


# --- compiled -------------------------------------------------------------------------------


def compiled(shape: str, engine: str | Callable[..., Any] = "aot_eager") -> CompiledGradients:
    torch._dynamo.reset()
    return CompiledGradients(network_of(shape), engine)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_traced_graph_is_autograd(soft: bool) -> None:
    shape = "the smallest"
    assert_agree(compiled(shape), problem(shape, torch.float64, soft), 1e-12)


def test_traced_chunks_are_filled_up_and_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = "the smallest"
    counted = []
    gradients = compiled(shape, lambda graph, _: counted.append(graph) or graph)
    monkeypatch.setattr(gradients, "_limit", 2 * MULTIPLE)
    for n in (2 * MULTIPLE, 5 * MULTIPLE + 3, 2 * MULTIPLE - 1):  # one size of chunk
        assert_agree(gradients, problem(shape, torch.float64, True, n=n), 1e-12)
    assert len(counted) == 2  # the gradient and the second order


def test_a_process_may_compile_more_sizes_than_torch_expects() -> None:
    shape = "the smallest"
    gradients = compiled(shape, lambda graph, _: graph)
    for n in range(1, 12):
        params, images, targets, _ = problem(shape, torch.float32, False, n=n * MULTIPLE)
        gradients.gradient(params, images, targets)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_compiled_by_inductor_is_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["sh", "-c", "command -v g++"], capture_output=True).returncode:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    shape = "tiles of 4 and 2, odd width"
    assert_agree(compiled(shape, "inductor"), problem(shape, torch.float32, False), 1e-4)


def test_a_compiler_that_torch_cannot_use_is_told_in_a_line() -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no triton here")

    shape = "the smallest"
    gradients = compiled(shape, broken)
    with pytest.raises(
        UserError, match=r"torch.compile cannot compile here.*no triton here.*backend eager"
    ):
        gradients.gradient(*problem(shape, torch.float32, False)[:3])


def test_soft_targets_of_one_class_are_the_hard_ones() -> None:
    shape = "as the field's"
    params, images, hard, along = problem(shape, torch.float64, soft=False)
    gradients = NativeGradients(network_of(shape))
    a = gradients.second_order(params, images, hard, along)
    b = gradients.second_order(params, images, F.one_hot(hard, 10).double(), along)
    assert error(b.grad_P, a.grad_P) < 1e-12 and error(b.grad_images, a.grad_images) < 1e-12
