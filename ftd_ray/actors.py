"""Actors that everybody on a cluster shares: found by name, ended when nobody uses them."""

import asyncio
import hashlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ftd
import ftd_ray


def digest(*packages: ModuleType) -> str:
    """Of the sources of packages, wherever they are installed."""
    summed = hashlib.sha256()
    for package in packages:
        folder = Path(str(package.__file__)).parent
        sources = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.py")}
        for name in sorted(sources):
            content = hashlib.sha256(sources[name].read_bytes()).hexdigest()
            summed.update(f"{package.__name__} {name} {content}\n".encode())
    return summed.hexdigest()


CODE = digest(ftd, ftd_ray)
"""Names what this process runs, so it is taken as early as can be: files may change later. An actor
that was left by another version of the code has another name, and is not spoken to."""

NAMESPACE = "ftd"
IDLE_SECONDS = 600
"""A shared actor that nobody has used for this long ends."""
ANSWER_SECONDS = 5
"""A user that has not answered after so long is at work."""


class Lingering:
    """Ends its actor when it was neither ``used`` nor ``busy`` for a while, and no user lives."""

    idle_seconds = IDLE_SECONDS
    _last_used = 0.0
    _linger: "asyncio.Task[None] | None" = None
    _users: "tuple[_User, ...]" = ()

    async def join(self, user: Any) -> None:
        """For an actor that will use this one now and then: this one does not end before it."""
        self.used()
        self._users += (_User(user),)

    def used(self) -> None:
        """To be called in the actor's event loop by whatever serves somebody."""
        self._last_used = time.monotonic()
        self._linger = self._linger or asyncio.create_task(self._end_when_idle())

    def busy(self) -> bool:
        """Whether there is work that nobody has to ask for."""
        return False

    async def _end_when_idle(self) -> None:
        while self._wanted() or await self._has_users() or self._wanted():  # since it has asked
            await asyncio.sleep(self.idle_seconds / 10)
        ray.kill(ray.get_runtime_context().current_actor)

    def _wanted(self) -> bool:
        return self.busy() or time.monotonic() - self._last_used < self.idle_seconds

    async def _has_users(self) -> bool:
        asked = self._users
        alive = await asyncio.gather(*(user.lives() for user in asked))
        gone = {user for user, lives in zip(asked, alive, strict=True) if not lives}
        self._users = tuple(user for user in self._users if user not in gone)
        return bool(self._users)


class _User:
    """An actor that uses another one."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked: asyncio.Task[None] | None = None

    async def lives(self) -> bool:
        """Whether it answers, or has not answered yet: it does so between two calls."""
        self._asked = self._asked or asyncio.create_task(self._answer())
        done, _ = await asyncio.wait([self._asked], timeout=ANSWER_SECONDS)
        if not done:
            return True
        asked, self._asked = self._asked, None
        return asked.exception() is None

    async def _answer(self) -> None:
        await self._actor.__ray_ready__.remote()


def actor_name(kind: str, *args: Any, node: str | None = None) -> str:
    """The name of the shared actor of this code with these arguments."""
    text = "\0".join(map(repr, (CODE, *args, node)))
    return f"ftd-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def shared_actor(cls: type, kind: str, *args: Any, node: str | None = None) -> Any:
    """The actor of ``cls`` with these arguments; started by whoever asks first.

    It books no CPU. It lives on one ``node`` (an id), or wherever there is room,
    again and again when it dies.
    """
    options: dict[str, Any] = {
        "name": actor_name(kind, *args, node=node),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": 10_000,
        "max_restarts": -1,
        "max_task_retries": -1,
    }
    if node is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(cls).options(**options).remote(*args)
