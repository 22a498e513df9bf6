"""The page of another machine: its dashboard is asked, once a poll for each question, however many look at it here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from fedkeel.core.errors import InputError
from fedkeel.ship import words

if TYPE_CHECKING:
    import httpx

MOST = 8 << 20  # bytes of an answer, unpacked
_PATIENCE = 5.0  # seconds for an answer; the page waits for 8
_QUESTIONS = 64  # answers that are kept: viewers may search for different clients
_JSON = "application/json"
_PASSED = {  # what each address may answer
    "/api/state": (_JSON, (200,)),
    "/api/clients": (_JSON, (200, 400)),
    "/metrics": ("text/plain", (200,)),
    "/healthz": (_JSON, (200, 503)),
}


@dataclass(frozen=True)
class Answer:
    """What came back, or why nothing did (502)."""

    status: int
    body: bytes
    at: float = 0.0
    tag: str = ""
    date: str = ""
    kind: str = _JSON


class Relay:
    """The answers of the dashboard at `url`. Of what it sends nothing is passed on but these bodies, tag and date."""

    def __init__(self, url: str, poll: float) -> None:
        """Raises `InputError` for what is no address of a dashboard. Nothing is asked yet."""
        self.url = _address(url)
        self._poll = poll
        self._client: httpx.AsyncClient | None = None
        self._held: dict[str, Answer] = {}
        self._under_way: dict[str, asyncio.Task[Answer]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections live as long as the server does."""
        import httpx

        # No proxy, no .netrc, no redirects: that address, or nothing.
        async with httpx.AsyncClient(base_url=self.url, timeout=_PATIENCE, trust_env=False) as self._client:
            yield

    async def ask(self, path: str, **wanted: Any) -> Answer:
        """The answer there, at most a poll old. All who ask meanwhile share a request."""
        target = f"{path}?{urlencode(wanted)}" if wanted else path
        held = self._held.get(target)
        if held is not None and time.monotonic() - held.at < self._poll:
            return held
        task = self._under_way.get(target)
        if task is None:
            task = self._under_way[target] = asyncio.create_task(self._fetch(path, target, held))
            task.add_done_callback(lambda _: self._under_way.pop(target, None))
        return await asyncio.shield(task)

    async def _fetch(self, path: str, target: str, held: Answer | None) -> Answer:
        with _plain(self.url) as problem:
            async with asyncio.timeout(_PATIENCE):
                found = await self._get(path, target, held)
        if problem:
            found = Answer(502, _error(f"{self.url} {problem[0]}"), time.monotonic())
        self._held.pop(target, None)
        self._held[target] = found
        if len(self._held) > _QUESTIONS:
            del self._held[next(iter(self._held))]
        return found

    async def _get(self, path: str, target: str, held: Answer | None) -> Answer:
        assert self._client is not None
        kind, passed = _PASSED[path]
        asked = {"if-none-match": held.tag} if held and held.tag else {}
        async with self._client.stream("GET", target, headers=asked) as answer:
            date, given, tag = (_header(answer, name) for name in ("date", "content-type", "etag"))
            if answer.status_code == 304 and held and held.tag:
                return Answer(held.status, held.body, time.monotonic(), held.tag, date, held.kind)
            if answer.status_code not in passed or not given.startswith(kind):
                raise ValueError(f"answers with status {answer.status_code}, but not as a fedkeel dashboard")
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MOST:
                    raise ValueError(f"answers with more than {words.size(MOST)}")
            return Answer(answer.status_code, bytes(body), time.monotonic(), tag, date, given)


def check(relay: Relay) -> str:
    """Ask it once. Raises `InputError` for what answers and is no dashboard; why, where nothing answers."""

    async def once() -> Answer:
        async with relay.running():
            return await relay.ask("/healthz")

    found = asyncio.run(once())
    try:
        told = json.loads(found.body)
        if found.status == 502 and "does not answer" in told["error"]:
            return str(told["error"])
        if found.status != 502 and {"status", "round", "behind"} <= told.keys():
            return ""
    except (ValueError, AttributeError, TypeError, KeyError):
        pass
    raise InputError(f"'{relay.url}' is no fedkeel dashboard: name the address that `fedkeel dashboard` printed there")


@contextlib.contextmanager
def _plain(url: str) -> Iterator[list[str]]:
    """Gathers in words why there is no answer."""
    import httpx

    problem: list[str] = []
    try:
        yield problem
    except (TimeoutError, httpx.TransportError) as error:
        why = words.short(str(error), 120) or "no answer in time"
        problem.append(f"does not answer ({why})")
    except (ValueError, httpx.HTTPError) as error:
        problem.append(words.short(str(error), 200))


def _header(answer: httpx.Response, name: str) -> str:
    """A header that may be passed on."""
    value = answer.headers.get(name, "")
    return value if value.isascii() and value.isprintable() and len(value) < 200 else ""


def _address(url: str) -> str:
    """Raises `InputError`; shows no password."""
    remedy = "write http://HOST:PORT, as `fedkeel dashboard` printed it there"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises for a port that is none)
    except ValueError as error:
        raise InputError(f"the address is no URL ({error}): {remedy}") from None
    if parts.username is not None or parts.password is not None:
        raise InputError(f"the address of '{parts.hostname}' holds a name or a password: {remedy}")
    if parts.scheme not in ("http", "https"):
        raise InputError(f"'{url}' has the scheme '{parts.scheme}': {remedy}")
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise InputError(f"'{url}' is no address of a dashboard: {remedy}")
    return f"{parts.scheme}://{parts.netloc}"


def _error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()
