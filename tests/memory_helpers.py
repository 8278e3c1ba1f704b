"""How many bytes of tensors live at the same time, on any device, meta included."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Counts storages that operations make in this thread; ``bytes`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t.untyped_storage() for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._known or any(storage is s for s in given):
                continue
            self._known.add(storage)
            weakref.finalize(storage, self._freed, storage.nbytes())
            self._now += storage.nbytes()
            self.bytes = max(self.bytes, self._now)
        return out

    def _freed(self, count: int) -> None:
        self._now -= count
