"""Nodes that fail: what is their fault and what is not, who is left out, and the check before use.

No GPU was at hand: the errors are torch's own types with the words that CUDA and torch give them,
raised on a CPU.
"""

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_helpers import request_for

from ftd.errors import Diverged, UserError
from ftd.expert import Numerics
from ftd_ray import probe
from ftd_ray.experts.build import build_expert
from ftd_ray.experts.orders import GpuFull
from ftd_ray.node_faults import (
    GpuMemory,
    NodeFault,
    fault_of,
    faults_of_the_node,
    needs_the_data,
)
from ftd_ray.nodes import FAILURES, SUSPECT_SECONDS, Health, NothingLeft
from ftd_ray.storage import PlaceError

CPU = Numerics.on("cpu", 1, "eager")

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which {free} GiB is free. {others}Including non-PyTorch memory, this process has {own} GiB "
    "memory in use. Of the allocated memory 4.00 GiB is allocated by PyTorch, and 100.00 MiB is "
    "reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)


# --- whose fault it is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered" + ADVICE),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804: forward compat"),
        RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
    ids=lambda e: str(e)[:40],
)
def test_broken_gpu_or_driver_is_a_fault_of_the_node(error):
    fault = fault_of(error)
    assert isinstance(fault, NodeFault) and fault.kind == "gpu"
    assert "CUDA_LAUNCH_BLOCKING" not in fault.reason and "\n" not in fault.reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 7"),
        Diverged("step 3: the loss is not finite"),
        UserError("distill.ipc=0 must be at least 1."),
        PlaceError("store.uri=s3://b/x cannot be read (ACCESS_DENIED). Mend it."),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_the_work_does_by_itself_is_no_fault_of_the_node(error):
    assert fault_of(error) is None
    with pytest.raises(type(error)), faults_of_the_node():
        raise error


def test_gpu_that_strangers_hold_is_a_fault_of_the_node_and_says_how_much():
    text = FULL.format(free="0.50", others="Process 7 has 18.00 GiB memory in use. ", own="5.19")
    fault = fault_of(torch.OutOfMemoryError(text), gpus=1.0)
    assert isinstance(fault, NodeFault) and fault.kind == "full"
    assert "other processes hold 18.0 of 23.7 GiB" in fault.reason


@pytest.mark.parametrize(
    ("gpus", "own", "free"), [(0.25, "5.60", "0.60"), (1.0, "22.50", "0.70"), (0.5, "12.00", "0")]
)
def test_work_that_outgrows_its_own_share_is_told_what_it_needs(gpus, own, free):
    text = FULL.format(free=free, others="", own=own)
    fault = fault_of(torch.OutOfMemoryError(text), gpus=gpus)
    assert isinstance(fault, GpuMemory)
    assert f"it needs {float(own):.1f} GiB and 2.00 GiB more of a GPU of 23.7 GiB" in str(fault)
    assert f"on a share of {gpus:g}" in str(fault)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"],
)
def test_memory_that_cuda_itself_cannot_give_is_memory_too(text):
    assert isinstance(fault_of(torch.AcceleratorError(text)), GpuMemory)


def test_full_disk_of_a_node_is_its_fault():
    with pytest.raises(NodeFault, match="No space left on device") as caught, faults_of_the_node():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")
    assert caught.value.kind == "disk"


def test_missing_data_set_is_the_nodes_fault_for_the_driver_has_read_it():
    with pytest.raises(NodeFault, match=r"no images in /data/x") as caught, needs_the_data():
        raise UserError("no images in /data/x.")
    assert caught.value.kind == "data"


def test_fault_travels_whole():
    fault = pickle.loads(pickle.dumps(NodeFault("gpu", "its GPU: lost")))
    assert (fault.kind, fault.reason, str(fault)) == ("gpu", "its GPU: lost", "its GPU: lost")


# --- building experts -----------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def test_expert_that_outgrows_its_share_names_its_need_and_what_to_set(tmp_path, monkeypatch):
    text = FULL.format(free="0.60", others="", own="5.60")
    monkeypatch.setattr("ftd_ray.experts.build.train_expert", raising(torch.OutOfMemoryError(text)))
    with pytest.raises(GpuFull, match=r"5\.6 GiB.*resources\.gpus_per_expert"):
        build_expert(request_for(tmp_path / "store"), 0, lambda snapshot: None, gpus=0.25)


def test_expert_without_its_data_set_is_the_nodes_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("ftd_ray.experts.build._dataset", raising(FileNotFoundError("/d/x.npz")))
    with pytest.raises(NodeFault) as caught:
        build_expert(request_for(tmp_path / "store"), 0, lambda snapshot: None)
    assert caught.value.kind == "data"


def test_store_that_is_full_is_a_place_and_no_fault_of_a_node(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("ftd.trajectory.put", raising(full))
    with pytest.raises(PlaceError, match=r"store\.uri=.*No space left"):
        build_expert(request_for(tmp_path / "store"), 0, lambda snapshot: None)


# --- who is left out ------------------------------------------------------------------------


@pytest.fixture
def health() -> Health:
    return Health(clock=lambda: 0.0, name=str)


def fail(health: Health, node: str, times: int, **how: Any) -> None:
    for i in range(times):
        health.failed(node, how.get("task", i), "its GPU: lost", own=how.get("own", False))


def test_node_that_fails_several_times_in_a_row_is_left_out(health):
    fail(health, "a", FAILURES - 1)
    assert not health.left_out
    fail(health, "a", 1)
    assert health.left_out == {"a": "its GPU: lost"}
    assert health.avoid({"a", "b"}) == {"a"}


def test_success_in_between_begins_a_new_row(health):
    for _ in range(3):
        fail(health, "a", FAILURES - 1)
        health.worked("a")
    assert not health.left_out


def test_one_task_does_not_take_nodes_with_it_on_which_others_succeed(health):
    health.worked("a")
    fail(health, "a", 10, task="t", own=True)
    assert not health.left_out
    for task in ("u", "v"):
        fail(health, "a", 1, task=task, own=True)
    assert "a" in health.left_out


def test_one_task_suffices_where_nothing_has_ever_succeeded(health):
    fail(health, "a", FAILURES, task="t", own=True)
    assert "a" in health.left_out


def test_node_where_something_was_lost_is_avoided_for_a_while_if_there_are_others():
    now = 0.0
    health = Health(clock=lambda: now, name=str)
    health.suspect("a")
    assert health.avoid({"a", "b"}) == {"a"}
    assert health.avoid({"a"}) == set()
    health.suspect("b")
    assert health.avoid({"a", "b"}) == set()
    now = SUSPECT_SECONDS + 1
    assert health.avoid({"a", "b"}) == set()


def test_nothing_is_left_when_all_nodes_that_could_are_left_out(health):
    assert health.avoid(set()) == set()  # one may come
    for node in "ab":
        fail(health, node, FAILURES)
    with pytest.raises(NothingLeft, match=r"Node a failed 3 times in a row: its GPU: lost\. Node"):
        health.avoid({"a", "b"})
    assert health.avoid({"a", "b", "c"}) == {"a", "b"}


def test_what_others_found_counts_and_the_first_reason_stays(health):
    fail(health, "a", FAILURES)
    health.leave_out({"a": "no data", "b": "no data"})
    assert health.left_out == {"a": "its GPU: lost", "b": "no data"}


# --- the check before use -------------------------------------------------------------------


def test_device_that_computes_right_passes_and_its_answer_is_the_formula_in_float64(monkeypatch):
    monkeypatch.setattr(probe, "_checked", set())
    probe.check(CPU)
    exact = probe.matching_step(torch.device("cpu"), torch.float64)
    assert exact == pytest.approx(probe.ANSWER, rel=1e-6)
    assert probe.matching_step(torch.device("cpu")) == pytest.approx(probe.ANSWER, rel=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), 1.05], ids=["nan", "5 percent"])
@pytest.mark.parametrize("which", range(len(probe.ANSWER)))
def test_device_that_computes_something_else_does_not_pass(monkeypatch, which, wrong):
    monkeypatch.setattr(probe, "_checked", set())
    answer = [x * wrong if i == which else x for i, x in enumerate(probe.ANSWER)]
    monkeypatch.setattr(probe, "matching_step", lambda device: tuple(answer))
    with pytest.raises(NodeFault, match="its cpu computes") as caught:
        probe.check(CPU)
    assert caught.value.kind == "check"


def test_check_is_made_once_a_process_and_moves_no_generator(monkeypatch):
    monkeypatch.setattr(probe, "_checked", set())
    before = torch.get_rng_state()
    probe.check(CPU)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(probe, "matching_step", raising(AssertionError("again")))
    probe.check(CPU)


def test_gpu_that_is_not_there_is_found_by_the_check(monkeypatch, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(probe, "_checked", set())
    with pytest.raises(NodeFault, match="a small step fails there") as caught:
        probe.check(Numerics.on("cuda", 1, "eager"))
    assert caught.value.kind == "check"
