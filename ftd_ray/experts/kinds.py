"""Fleets on several kinds of GPU, for builds that fit on any of them."""

from collections.abc import Sequence

from ftd_ray.experts.fleet import Build, Fleet


class Kinds:
    """A build waits in all of the fleets, and the first actor that is free takes it.

    So no build waits for one kind of GPU while another has nothing to do.
    """

    def __init__(self, fleets: Sequence[Fleet]) -> None:
        self._fleets = fleets

    async def run(self, build: Build) -> float | None:
        """As a fleet's; ``build.fleet`` says which one took it last."""
        for fleet in self._fleets:
            fleet.offer(build)
        return await build.done

    def hasten(self, build: Build, rank: tuple[int, int, int]) -> None:
        if rank < build.rank:
            build.rank = rank
            for fleet in self._fleets:
                fleet.reorder()

    def drop(self, build: Build) -> None:
        for fleet in self._fleets:
            fleet.drop(build)
