"""Ray Serve's request router: follow-up turns go to the replica that holds their beginning."""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.prefix_routes import Load, PrefixRoutes, prefix_keys


class PrefixCacheRouter(RequestRouter):
    """PrefixRoutes for Ray Serve; its arguments are `request_router_kwargs`."""

    def initialize_state(self, **settings: Any) -> None:
        self._routes: PrefixRoutes[Any] = PrefixRoutes(**settings)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each candidate in a rank of its own, the best first."""
        candidates = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {name: self._load(replica) for name, replica in candidates.items()}
        if pending_request is not None:
            # All that there are have been offered: the next round may wait a little.
            pending_request.routing_context.should_backoff = True
        keys = [] if pending_request is None else _keys_of(pending_request)
        return [[candidates[name]] for name in self._routes.ranked(keys, loads)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: Any, result: object
    ) -> None:
        self._routes.routed(_keys_of(pending_request), replica_id)

    def _load(self, replica: RunningReplica) -> Load:
        said = replica.routing_stats or {}
        return Load(
            num_open=self.replica_queue_len_cache.get(replica.replica_id) or 0,
            predicted_ttft_s=said.get("predicted_ttft_s", 0.0),
        )


def _keys_of(pending_request: PendingRequest) -> list[bytes]:
    return prefix_keys(pending_request.args[0]) if pending_request.args else []
