"""The first thing that every request meets: its API key, where it comes from, a place, and errors as objects.

Nothing is served without a key but `OPEN`, whatever the route and the method, known or not.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.access.call_pool import Caller
from cluster.access.keys import Keys, key_id
from cluster.common.addresses import is_loopback
from cluster.http.core.backend import Backend
from cluster.http.core.calls import HttpCall, no_key
from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.core.following import ClientGone
from cluster.http.core.sse import event, named_event
from cluster.http.page import routes as page
from cluster.jobs.tenants.tenant import ANYONE

# monitors and load balancers have no key; they only learn whether the server is serving. The page is the same for all
OPEN = frozenset((method, path) for method in ("GET", "HEAD") for path in ("/health", "/ready", *page.FILES))
_LAST_WORD_S = 1.0  # for the end of a stream that is ended before its time
_log = logging.getLogger(__name__)


class Guard:
    """Wraps the application; see the module."""

    def __init__(
        self, app: ASGIApp, backend: Backend, keys: Keys | None,
        on_refused: Callable[[str, str], None] = lambda peer, path: None,
    ) -> None:  # fmt: skip
        """
        Args:
            keys: those that give access; None: none is needed.
            on_refused: called with peer and path of each request without a valid key.
        """
        self._app = app
        self._backend = backend
        self._keys = keys
        self._on_refused = on_refused
        self._is_local = keys is None and is_loopback(backend.limits.http_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer = _Answer(send, scope["path"])
        try:
            call = self._admit(scope)
            call.attach(scope)
            answer.call = call
            with call.place():
                await self._app(scope, receive, answer.send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            call = answer.call  # type: ignore[assignment]
            if call is None or call.ended is None:
                raise
            _uncancel()
            await answer.fail(call.ended)
        except Exception as error:  # noqa: BLE001 - clients get an error object whatever it is
            await answer.fail(to_api_error(error))

    def _admit(self, scope: Scope) -> HttpCall:
        """Return the call, of who may make it. Raises ApiError."""
        headers = _headers(scope)
        client = scope.get("client") or ("", 0)
        host = f"ipv6:[{client[0]}]" if ":" in client[0] else f"ipv4:{client[0]}"
        peer = f"{host}:{client[1]}"
        if self._is_local:
            _check_origin(headers)
        caller = self._caller(headers, host, peer)
        if caller.tenant is None and (scope["method"], scope["path"]) not in OPEN:
            self._on_refused(peer, scope["path"])
            raise no_key()
        return HttpCall(self._backend, caller)

    def _caller(self, headers: Mapping[str, list[str]], host: str, peer: str) -> Caller:
        if self._keys is None:
            return Caller(host, peer, ANYONE)
        key = _presented_key(headers)
        tenant = self._keys.tenant(key) if key is not None else None
        if key is None or tenant is None:
            return Caller(host, peer)
        return Caller(f"key {tenant.name}", peer, tenant, key_id(key))


def _presented_key(headers: Mapping[str, list[str]]) -> str | None:
    """Return the key of a request, None when it is absent, given twice or of another kind."""
    bearers, plain = headers.get("authorization", []), headers.get("x-api-key", [])
    if len(bearers) > 1 or len(plain) > 1:
        return None
    given = set(plain)
    for value in bearers:
        scheme, _, key = value.partition(" ")
        given |= {key.strip() if scheme.lower() == "bearer" else ""}
    return given.pop() if len(given) == 1 else None


class _Answer:
    """The response of one request, as far as it was sent."""

    def __init__(self, send: Send, path: str) -> None:
        self._path = path
        self.call: HttpCall | None = None
        self._send = send
        self._started = self._ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._is_stream = any(
                v.startswith(b"text/event-stream") for k, v in message["headers"] if k == b"content-type"
            )
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        if self.call is None:
            await self._send(message)
            return
        with self.call.waiting("read"):  # returns at once while the buffers of the connection have room
            await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """End the response with an error, as far as that can still be said."""
        if self._ended:
            return
        shown = error.body_for(self._path)
        body = json.dumps(shown).encode()
        last = named_event(shown) if "type" in shown else event({"type": "error", **shown})
        async with asyncio.timeout(_LAST_WORD_S if self._started else None):
            if not self._started:
                headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
                if error.status in (408, 413):  # more of the body may be on its way
                    headers["Connection"] = "close"
                raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
                await self._send({"type": "http.response.start", "status": error.status, "headers": raw})
                await self._send({"type": "http.response.body", "body": body})
            elif self._is_stream:
                await self._send({"type": "http.response.body", "body": last})


def _headers(scope: Scope) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    for key, value in scope["headers"]:
        headers.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


def _check_origin(headers: Mapping[str, list[str]]) -> None:
    """Refuse what a browser sends for a foreign page: without keys, the loopback address is all the protection."""
    hosts = headers.get("host", [])
    if not all(is_loopback(_host_of(f"//{host}")) for host in hosts):
        problem = f"host: {hosts[0]!r}: must be localhost or a loopback address, or give the head API keys"
        raise ApiError(403, problem, code="foreign_host")
    for origin in headers.get("origin", []):
        if not _host_of(origin) or origin.partition("://")[2] not in hosts:
            problem = f"origin: {origin!r}: pages of other sites are not served without API keys"
            raise ApiError(403, problem, code="foreign_origin")
    site, mode = (headers.get(f"sec-fetch-{name}", [""])[0] for name in ("site", "mode"))
    if site in ("cross-site", "same-site") and mode != "navigate":  # no Origin: images, scripts; links may be followed
        problem = f"sec-fetch-site: {site}: pages of other sites are not served without API keys"
        raise ApiError(403, problem, code="foreign_origin")


def _host_of(url: str) -> str:
    """Return the host of a URL, "" for one that is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
