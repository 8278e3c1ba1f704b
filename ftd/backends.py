"""Which way of computing gradients is used: by configuration, never by timing.

``auto`` is ``native`` on CPU where there is a C compiler, and ``eager`` otherwise. What it became
is recorded with everything that was computed so, since backends differ in the last bits.
"""

from ftd.compiled import CompiledGradients
from ftd.errors import UserError
from ftd.gradients import Gradients
from ftd.native import NativeGradients, unavailable
from ftd.networks import Network

BACKENDS = ("auto", "native", "compiled", "eager")

_BY_NAME: dict[str, type[Gradients]] = {
    "native": NativeGradients,
    "compiled": CompiledGradients,
    "eager": Gradients,
}


def resolve(backend: str, device: str) -> str:
    """``backend`` with ``auto`` replaced by what it means for workers on ``device``.

    Raises UserError for a backend that is not known, or not for this kind of device.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is not known. Take one of {', '.join(BACKENDS)}.")
    if backend == "native" and device != "cpu":
        raise UserError(
            f"backend native computes on CPUs, and the worker is on {device}. "
            "Take auto, compiled or eager."
        )
    if backend != "auto":
        return backend
    return "native" if device == "cpu" and unavailable() is None else "eager"


def gradients_for(network: Network, backend: str, *, room: int | None = None) -> Gradients:
    """The gradients of ``network`` by a backend that ``resolve`` has named, in so much memory."""
    return _BY_NAME[backend](network, room=room)
