"""In front of all routes: request ids, API keys, each key's limits, and a log line at the end."""

import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.accounts import Account
from deployments.errors import Failure
from deployments.keys import KeyRing
from deployments.visits import LOGGER, Visit, new_request_id

GUARDED = ("/v1/", "/tokenize", "/detokenize", "/reset_prefix_cache")
"""Beginnings of the paths that need a key and are logged; health, load and metrics are open."""
REQUEST_ID = "X-Request-Id"


class Gate:
    """ASGI middleware. Every answer carries X-Request-Id, the client's own if it sent one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        processes: int = 1,
        is_logged: bool = True,
        has_proxy: bool = False,
    ) -> None:
        """keys: None lets anybody in. processes: how many gates share the keys' limits. has_proxy:
        Ray Serve's stands in front: it gives each request its id, and puts that on the answer."""
        self._app = app
        self._keys = keys
        self._accounts: Mapping[str, Account] = {
            key.name: Account(key, processes=processes) for key in (keys.keys if keys else ())
        }
        self._is_logged = is_logged
        self._has_proxy = has_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        visit = Visit(new_request_id(headers.get(REQUEST_ID)), scope["method"], path)
        scope.setdefault("state", {})["visit"] = visit
        is_guarded = path.startswith(GUARDED)
        answer = _Answer(send, visit, tells_id=not self._has_proxy)
        refusal = self._enter(visit, headers) if is_guarded else None
        visit.is_open = visit.account is not None and refusal is None
        try:
            if refusal is None:
                await self._app(scope, receive, answer)
            else:
                visit.error = refusal.code
                await refusal.response()(scope, receive, answer)
        finally:
            visit.leave()
            if is_guarded and self._is_logged:
                LOGGER.info(visit.line())

    def _enter(self, visit: Visit, headers: Headers) -> Failure | None:
        """Find out whose request it is and begin it; or why it may not begin."""
        if self._keys is None:
            return None
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            return _unauthorized("no API key" if not secret else "a wrong API key")
        visit.account = self._accounts[key.name]
        return visit.account.enter()


class _Answer:
    """Passes an answer on, with the gate's headers, and takes down when and how it came."""

    def __init__(self, send: Send, visit: Visit, *, tells_id: bool) -> None:
        self._send = send
        self._visit = visit
        self._tells_id = tells_id

    async def __call__(self, message: Message) -> None:
        visit = self._visit
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            headers = MutableHeaders(scope=message)
            if self._tells_id:
                headers[REQUEST_ID] = visit.request_id
            if visit.account is not None:
                headers.update(visit.account.headers())
        elif visit.first_byte_s is None and message.get("body"):
            visit.first_byte_s = time.monotonic() - visit.begun_s
        await self._send(message)


def _unauthorized(what: str) -> Failure:
    return Failure(
        401,
        f"The request came with {what}; send one as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
