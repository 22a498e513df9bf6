"""`python lossy.py SHARE FOLDER`: a SuperNode whose connection loses a share of what the server answers it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import httpx

from fedkeel.deploy import process

share, drawn = float(sys.argv[1]), random.Random(sys.argv[2])
answered = httpx.HTTPTransport.handle_request


def lose(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
    """The server has done what it was asked for; who asked does not hear of it, and asks again."""
    response = answered(self, request)
    if request.url.path in ("/v1/fleet/pull-messages", "/v1/fleet/push-messages") and drawn.random() < share:
        response.read()
        response.close()
        raise httpx.ReadError("lost on the way", request=request)
    return response


httpx.HTTPTransport.handle_request = lose
sys.exit(process.main("supernode", str(Path(sys.argv[2]))))
