"""`python hostile.py KIND=FOLDER...`: nodes that answer what no honest one would, over the real network."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedkeel.core.types import Claims
from fedkeel.deploy import messages, worker
from fedkeel.deploy.folder import NodeFolder
from fedkeel.deploy.node import Node
from fedkeel.round import wire

earlier: list[RecordDict] = []


def claims(node: Node, order: messages.Order) -> Claims:
    digest = node.federation.layout.digest
    return Claims(order.train.client, order.train.task, order.train.version, digest, 10, 10, {}, ())


def sealed(node: Node, order: messages.Order, **changed: object) -> bytes:
    """An envelope of zeros, with lies."""
    payload = np.zeros(node.federation.layout.columns, np.float32).tobytes()
    return wire.seal(replace(claims(node, order), **changed), "float32", payload)


def lie(kind: str, node: Node, message: Message, context: Context) -> RecordDict:
    order = messages.read_order(message.content, node.federation.layout.columns)
    if kind == "garbage":
        return messages.update_content(np.random.default_rng(0).bytes(1000))
    if kind == "bomb":
        # Few bytes that say of themselves that they are a hundred million.
        return messages.update_content(wire.seal(claims(node, order), "float32", bytes(100_000_000), zstd=3))
    if kind == "flood":
        return messages.update_content(bytes(20_000_000))
    if kind == "layout":
        return messages.update_content(sealed(node, order, layout_digest="another model"))
    if kind == "version":
        return messages.update_content(sealed(node, order, base_version=order.train.version + 7))
    if kind == "identity":
        return messages.update_content(sealed(node, order, client="client-0"))
    if kind == "nan":
        payload = np.full(node.federation.layout.columns, np.nan, np.float32).tobytes()
        return messages.update_content(wire.seal(claims(node, order), "float32", payload))
    if kind == "records":
        array = Array("float32", (1,), "numpy.ndarray", b"\x80\x04pickled?")
        return RecordDict({"parameters": ArrayRecord({"x": array}), "config": ConfigRecord({"num-examples": 10**9})})
    if kind == "replay":
        earlier.append(node(message, context).content)
        return earlier[0]
    if kind == "slow":
        time.sleep(4)
        return node(message, context).content
    if kind == "crash":
        raise ZeroDivisionError("no such luck")
    assert kind == "late"
    time.sleep(12)
    return node(message, context).content


def made(kind: str, folder: NodeFolder) -> tuple[worker.Runtime, worker.App]:
    node = Node(folder)
    runtime = worker.Runtime(f"127.0.0.1:{folder.settings.port}", folder.secret.read_bytes(), None)
    return runtime, lambda message, context: Message(lie(kind, node, message, context), reply_to=message)


worker.serve([made(kind, NodeFolder(place)) for kind, place in (text.split("=", 1) for text in sys.argv[1:])])
