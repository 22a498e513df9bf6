"""Carries out a node's, or the server's, tasks in one warm process: imports and data are loaded once, not per message.

It takes the place of Flower's `flower-superexec`, which starts a new Python for every message. The code of the app that
a run brings along is never unpacked: what runs here is what its owner installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedkeel.core.errors import DecodeError, RunError
from fedkeel.deploy.calls import patient
from fedkeel.deploy.parts import Parts

App = Callable[[Message, Context], Message]
"""What answers a node's messages."""
_log = logging.getLogger("fedkeel")
POLL = 0.1
"""Seconds between two looks for a task."""
STALLED = 180.0
"""Seconds without a part of a message after which it will never be whole: Flower gives an upload as long."""
BACKOFF = 0.05
"""Seconds until a part of a message that is not there yet is asked for again; doubled each time, up to one."""
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


class Runtime(NamedTuple):
    """A SuperNode's or SuperLink's Runtime API: where tasks are taken up."""

    address: str
    secret: bytes
    authority: Path | None
    """Whose certificate it shows; None: no TLS, on loopback alone."""

    def client(self, token: str | None = None) -> RuntimeHttpClient:
        """A connection: to take up tasks, or with a task's token to carry it out, over whatever outages there are."""
        access = (
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=_ACQUIRE)
            if token is None
            else RuntimeTokenHttpInterceptor(token)
        )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.authority is None,
            root_certificates=None if self.authority is None else self.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedkeel"), access],
            retry_invoker=patient(1 if token is None else None),
        )


def acquire(client: RuntimeHttpClient, kind: TaskType) -> str | None:
    """A task's token; None where there is none, or nobody to ask."""
    try:
        found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    except httpx.HTTPError:
        return None
    token: str = found.token
    return token if found.HasField("task") and token else None


def serve(nodes: Sequence[tuple[Runtime, App]]) -> None:
    """Carry out the nodes' tasks, one after another, for ever."""
    clients = [runtime.client() for runtime, _ in nodes]
    while True:
        idle = True
        for client, (runtime, app) in zip(clients, nodes, strict=True):
            token = acquire(client, TaskType.CLIENT_APP)
            while token:
                token = answer(runtime, token, app, client)
                idle = False
        if idle:
            time.sleep(POLL)


def answer(runtime: Runtime, token: str, app: App, tasks: RuntimeHttpClient) -> str | None:
    """One message of a node: give it to the app, and its reply, or why there is none, to the node.

    A message that never becomes whole (its run ended while the node loaded it) is let go of when the node has another:
    that one's token is returned.
    """
    client = runtime.client(token)
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beat.start()
    context, status, details = None, SubStatus.COMPLETED, ""
    try:
        _, context = _begun(client)
        message, newer = _message(client, context, tasks)
        if message is None:
            status, details = SubStatus.FAILED, "the message never became whole"
            return newer
        try:
            reply = app(message, context)
        except Exception as error:  # the node must hear of it, whatever it is
            _log.exception("the app raised")
            status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=details), reply_to=message)
        push_message(client, reply, context)
    except (httpx.HTTPError, LookupError, RuntimeError) as error:  # the run ended, or the node was started anew
        _log.warning("a task was lost: %s", error)
        status, details = SubStatus.FAILED, str(error)
    finally:
        push_task_output(client, context, status, details)
        beat.stop()
        client.close()
    return None


def _begun(client: RuntimeHttpClient) -> tuple[Run, Context]:
    """What a task belongs to; Flower's messages that are made from now on are of it."""
    found = client.PullTaskInput(PullTaskInputRequest())
    context = context_from_proto(found.context)
    TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, found.run.run_id
    TaskIdentity.node_id = context.node_id
    return run_from_proto(found.run), context


def _message(
    client: RuntimeHttpClient, context: Context, tasks: RuntimeHttpClient
) -> tuple[Message | None, str | None]:
    """The message of a task; or the token of a newer task, which the node has when it gave this one up."""
    pulled = client.PullMessages(PullAppMessagesRequest())
    if not pulled.message_object_trees:
        raise LookupError("the node has no message to its task")
    tree, node = pulled.message_object_trees[0], Node(node_id=context.node_id)
    held = Parts()
    rest, since = BACKOFF, time.monotonic()
    for part in iterate_object_tree(tree):
        while part.object_id not in held:
            request = PullObjectRequest(node=node, run_id=context.run_id, object_id=part.object_id)
            got = client.PullObject(request)
            if not got.object_found:
                raise LookupError("a part of the message is gone")
            if got.object_available:
                held.add(part.object_id, got.object_content)
                rest, since = BACKOFF, time.monotonic()
                continue
            time.sleep(rest)
            rest = min(2 * rest, 1.0)
            if newer := acquire(tasks, TaskType.CLIENT_APP):
                return None, newer
            if time.monotonic() - since > STALLED:  # others of this process wait: begin anew, SuperNodes and all
                raise SystemExit(f"a message came to a halt for {STALLED:g} s")
    identity = tree.object_id
    confirm = ConfirmMessageReceivedRequest(node=node, run_id=context.run_id, message_object_id=identity)
    client.ConfirmMessageReceived(confirm)
    try:
        message = held.joined(identity)
    except DecodeError as error:
        raise LookupError(f"the node's message: {error}") from None
    message.metadata.__dict__["_message_id"] = identity  # as Flower's own processes set it
    return message, None


def preside(runtime: Runtime, token: str, main: Callable[[HttpGrid, Context], None]) -> None:
    """One run of a server: give it the grid that reaches the nodes."""
    authority = None if runtime.authority is None else runtime.authority.read_bytes()
    grid = HttpGrid(runtime.address, authority is None, authority, token=token)
    grid._retry_invoker = patient()
    client = runtime.client(token)
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beat.start()
    context, status, details = None, SubStatus.COMPLETED, ""
    try:
        run, context = _begun(client)
        grid.set_run(run)
        main(grid, context)
    except ObjectPushError as error:
        status, details = SubStatus.FAILED, str(error)
        raise RunError("the SuperLink lost a message; the federation goes on from its last checkpoint") from error
    except Exception as error:
        status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
        raise
    finally:
        push_task_output(client, context, status, details)
        beat.stop()
        client.close()
        grid.close()
