"""The other ranks of a replica whose model several processes compute: Ray actors beside it.

Each lies in a bundle of the replica's placement group and ends with it. A follower that ends first
takes the replica with it, which Ray Serve then replaces.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.config import LLMConfig
from nsa_platform.config.serve import EngineConfig
from nsa_platform.serve.loading import load_follower
from nsa_platform.serve.ranks import Ranks, find_meeting, open_meeting

REASON_TIMEOUT_S = 5.0
"""For a follower that has failed to say why."""


class Follower:
    """One rank that is not the first, as an actor."""

    def follow(
        self, folder: Path, config: EngineConfig, device: str, *, rank: int, host: str, port: int
    ) -> None:
        """Compute what the first rank computes until it ends.

        Raises:
            ValueError, OSError: the model cannot be loaded.
            RuntimeError: another rank has gone.
        """
        size = config.tensor_parallel_size
        ranks = Ranks.meet(find_meeting(host, port), rank=rank, size=size, device=device)
        try:
            load_follower(folder, config, device, ranks).follow()
        finally:
            ranks.part()


class Followers:
    """All ranks of a replica but the first, which is this process."""

    def __init__(self, config: LLMConfig) -> None:
        """Nothing is started yet."""
        self._config = config
        self._ranks: Ranks | None = None
        self._actors: list[Any] = []
        self._work: list[Any] = []

    def meet(self, folder: Path) -> Ranks:
        """Start the followers, each on its way to load its share of the model in `folder`.

        Raises:
            RuntimeError: they do not come.
        """
        engine = self._config.engine_kwargs
        device = "cuda" if self._config.num_gpus else "cpu"
        ranks = range(1, self._config.num_ranks)
        self._actors = [
            ray.remote(Follower).options(**self._options(rank)).remote() for rank in ranks
        ]
        try:
            ray.get([actor.__ray_ready__.remote() for actor in self._actors])
        except RayError as error:
            raise RuntimeError(f"a rank of the model does not start: {error}") from None
        host = ray.util.get_node_ip_address()
        meeting = open_meeting(host)
        self._work = [
            actor.follow.remote(folder, engine, device, rank=rank, host=host, port=meeting.port)
            for rank, actor in zip(ranks, self._actors, strict=True)
        ]
        self._ranks = Ranks.meet(meeting, rank=0, size=engine.tensor_parallel_size, device=device)
        return self._ranks

    def problem(self) -> str | None:
        """Why the first follower that has ended did so; None if all go on."""
        ended, _ = ray.wait(self._work, timeout=REASON_TIMEOUT_S) if self._work else ([], [])
        if not ended:
            return None
        try:
            ray.get(ended[0])
        except RayError as error:
            return _reason(error)
        return _reason(None)

    async def ended(self) -> str:
        """Wait until a follower ends; why it did."""
        tasks = [asyncio.ensure_future(_outcome(work)) for work in self._work]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    def end(self) -> None:
        """Let the followers go, if all are there; the first rank computes nothing any more."""
        if self._ranks is not None and not ray.wait(self._work, timeout=0)[0]:
            self._ranks.end()

    def _options(self, rank: int) -> Mapping[str, Any]:
        """A bundle's worth of what the replica itself takes."""
        config, bundles = self._config, ray.util.get_current_placement_group()
        assert bundles is not None, "deployment_options gives a replica with ranks one"
        settings = config.deployment_config.ray_actor_options
        return {
            "num_cpus": 1 if settings.num_cpus is None else settings.num_cpus,
            "num_gpus": config.num_gpus / config.num_ranks,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=bundles,
                placement_group_bundle_index=rank,
            ),
        }


async def _outcome(work: Any) -> str:
    try:
        await work
    except RayError as error:
        return _reason(error)
    return _reason(None)


def _reason(error: RayError | None) -> str:
    """Why a follower's work has ended."""
    if error is None:
        return "a rank of the model has ended"
    if isinstance(error, RayTaskError):
        return str(error.cause or error)
    return f"a rank of the model has died: {str(error).splitlines()[0]}"
