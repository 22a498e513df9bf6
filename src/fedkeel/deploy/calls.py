"""Calls to Flower's services that outlast outages, and end nobody's process.

Flower's own retry rule sends the caller SIGINT when a token is refused: right for a process per message, not for ours.
"""

from __future__ import annotations

import httpx
from flwr.supercore.retry import RetryInvoker, exponential

MOST = 5
"""Seconds between two tries, at most."""
_PASSING = frozenset({httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT})


def patient(tries: int | None = None) -> RetryInvoker:
    """Try again while nobody answers; so many times, or for ever. What is refused is raised (`httpx.HTTPError`)."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(base_delay=0.2, multiplier=1.5, max_delay=MOST),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=tries,
        max_time=None,
        should_giveup=_is_final,
    )


def _is_final(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code not in _PASSING
    return any(word in str(error).lower() for word in ("certificate", "ssl", "tls"))
