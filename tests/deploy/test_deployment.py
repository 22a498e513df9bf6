"""A federation over real processes on loopback: as simulated, through kills, among hostile nodes."""

from __future__ import annotations

import os
import random
import resource
import signal
import ssl
import time
import urllib.error
import urllib.request
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from deployed import Deployed, claims, deployed
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

import fedkeel
from fedkeel.deploy import control, keys, process

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn


def job(clients: int, rounds: int, *, holdout: float = 0.0, **sections: object) -> fedkeel.Job:
    data, train = {"clients": clients, "holdout": holdout}, {"stopping": "steps(steps=5)"}
    return fedkeel.Job(name="net", rounds=rounds, data=data, train=train, **sections)


def status(url: str, authority: Path, headers: dict[str, str] | None = None) -> int:
    """What a stranger is answered."""
    context = ssl.create_default_context(cafile=str(authority))
    request = urllib.request.Request(
        url, data=b"", method="POST", headers={"Content-Type": "application/protobuf", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_deployment_is_the_simulation_through_kills_and_a_full_disk(tmp_path: Path) -> None:
    # What clients keep between rounds is at stake: layers of their own, and what the codec lost.
    wanted = fedkeel.Job(
        name="net",
        rounds=11,
        data={"clients": 3, "holdout": 0.2},
        model={"build": "mlp(hidden=[512])", "private": ["head"]},  # large enough for files of its own
        train={"stopping": "steps(steps=5)"},
        client={"codec": "int4", "error_feedback": True},
    )
    with deployed(tmp_path / "d", wanted) as net:
        serving = net.server()
        net.node("client-0")
        net.node("client-1", "client-2")
        net.wait(lambda: net.round >= 2)
        _doors_are_shut(net.folder, net.port)
        _clocks_may_differ(net.folder, net.port)
        net.kill("head")
        net.wait(lambda: net.round >= 5)
        # What SQLite and checkpoints write from now on fails, as on a full disk.
        resource.prlimit(net.pid("head"), resource.RLIMIT_FSIZE, (1, 1))
        net.wait(lambda: net.round >= 7)
        link = net.pid("superlink")
        resource.prlimit(link, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        time.sleep(4)  # until somebody makes room
        resource.prlimit(link, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        net.wait(lambda: net.round >= 9)
        net.kill("superlink")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    simulated = fedkeel.run(net.local.server.job, tmp_path / "simulated", with_report=False)
    assert torch.equal(done.state.theta, simulated.state.theta)
    assert done.final() == simulated.final()
    used = claims(done.updates)
    assert len(used) == len(set(used)) == 11 * 3
    assert [row["skipped"] for row in done.rounds] == [None] * 11
    assert done.dir.report.is_file()
    assert [row["bytes_up"] for row in done.rounds] == [row["bytes_up"] for row in simulated.rounds]


def _doors_are_shut(folder: Path, port: int) -> None:
    """Registering nodes and starting runs need the secret; from outside there is nothing but the Fleet API."""
    authority = folder / "server" / "ca.crt"
    for path in ("control/start-run", "control/register-node", "control/list-runs", "runtime/acquire-task"):
        assert status(f"https://127.0.0.1:{port}/v1/{path}", authority) == 404
        assert status(f"https://127.0.0.1:{port}/v1/fleet/../{path}", authority) == 404
        assert status(f"https://127.0.0.1:{port}/v1/fleet/%2e%2e/{path}", authority) == 404
    assert status(f"https://127.0.0.1:{port}/docs", authority) == 404
    url = f"https://127.0.0.1:{port}/v1/fleet/pull-messages"
    assert status(url, authority, {"Content-Length": str(2**40)}) == 413  # before a byte of it is read
    inner = f"https://127.0.0.1:{port + 1}/v1"
    assert status(f"{inner}/control/list-runs", authority) == 401
    assert status(f"{inner}/runtime/acquire-task", authority) in (401, 403, 415)
    stranger = control.Control(f"127.0.0.1:{port + 1}", keys.secret(), authority)
    with pytest.raises(Exception, match="401"):
        stranger.start("mine")
    with pytest.raises(Exception, match="401"):
        stranger.register({"me": keys.node_key()[1]})
    stranger.close()


def _clocks_may_differ(folder: Path, port: int) -> None:
    """By minutes; a signature that is older, or of another key, is refused."""

    def answer(minutes: float, signed_by: Path) -> int:
        mine = serialization.load_ssh_private_key((folder / "nodes" / "client-0" / "node.key").read_bytes(), None)
        key = serialization.load_ssh_private_key(signed_by.read_bytes(), None)
        pem = mine.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        at = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
        headers = {
            "Content-Type": "application/protobuf",
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(pem).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(key.sign(at.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
            TIMESTAMP_HEADER: at,
        }
        body = ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0).SerializeToString()
        request = urllib.request.Request(
            f"https://127.0.0.1:{port}/v1/fleet/activate-node", data=body, method="POST", headers=headers
        )
        context = ssl.create_default_context(cafile=str(folder / "server" / "ca.crt"))
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as found:
                return int(found.status)
        except urllib.error.HTTPError as error:
            return error.code

    own, other = (folder / "nodes" / client / "node.key" for client in ("client-0", "client-1"))
    # It is active already, which is another error than that of a signature.
    assert 401 not in {answer(minutes, own) for minutes in (-4, 0, 4)}
    assert [answer(6, own), answer(-11, own), answer(0, other)] == [401, 401, 401]


def test_hostile_nodes_are_refused_with_a_reason_and_the_run_goes_on(tmp_path: Path) -> None:
    kinds = ("garbage", "bomb", "flood", "layout", "version", "identity", "nan", "records", "replay", "crash", "late")
    names = [f"client-{number:02d}" for number in range(2 + len(kinds))]
    schedule = {"rule": "semi_sync(deadline=10.0)"}
    with deployed(tmp_path / "d", job(len(names), 4, schedule=schedule)) as net:
        serving = net.server()
        net.node(*names[:2])
        net.wait(net.local.run.exists)  # a SuperNode that nobody starts anew must find its key known
        lying = dict(zip(names[2:], kinds, strict=True))
        slow = lying.popitem()
        net.hostile(lying)
        net.hostile(dict([slow]))
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    rows = done.updates
    reasons = {
        kind: {(row["stage"], row["reason"]) for row in rows if row["client"] == client}
        for client, kind in zip(names[2:], kinds, strict=True)
    }
    expected = {
        "garbage": ("decode", "magic"),
        "bomb": ("decode", "declares"),
        "flood": ("decode", "limit"),
        "layout": ("check", "layout"),
        "version": ("check", "version"),
        "identity": ("check", "claims to be from 'client-0'"),
        "nan": ("check", "finite"),
        "records": ("decode", "not a fedkeel update"),
        "replay": ("late", "is closed"),
        "crash": ("train", "no such luck"),
        "late": ("late", ""),
    }
    for kind, (stage, words) in expected.items():
        told = [reason for found, reason in reasons[kind] if found == stage]
        assert any(words in (reason or "") for reason in told), (kind, reasons[kind])
    for kind in set(kinds) - {"replay", "late"}:
        assert all(stage is not None for stage, _ in reasons[kind]), (kind, reasons[kind])
    assert {row["client"] for row in rows if row["stage"] is None and row["round"] == 1} >= set(names[:2])
    assert {row["client"] for row in rows if row["stage"] is None and row["round"] == 4} >= set(names[:2])
    assert len(claims(rows)) == len(set(claims(rows)))
    assert torch.isfinite(done.state.theta).all()


def test_a_third_of_all_answers_lost_costs_time_and_nothing_else(tmp_path: Path) -> None:
    with deployed(tmp_path / "d", job(3, 3, holdout=0.2)) as net:
        settings = net.folder / "server" / "server.toml"
        settings.write_text(settings.read_text().replace("probe = 20.0", "probe = 1.5"))
        serving = net.server()
        net.wait(net.local.run.exists)
        net.lossy(0.3, "client-0", "client-1", "client-2")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    used = claims(done.updates)
    assert len(used) == len(set(used))
    lost = [row for row in done.updates if row["stage"] is not None]
    assert len(used) + len(lost) == 9
    assert lost
    assert all("lost on the way" in row["reason"] for row in lost), {row["reason"] for row in lost}
    figures = [row["value"] for row in done.metrics if row["name"] == "accuracy" and row["scope"].startswith("client/")]
    # Asked for again where they were lost, but who owes those of two rounds is not asked for more: of 12.
    assert len(figures) >= 6, figures


def test_a_node_without_a_registered_key_never_gets_in(tmp_path: Path) -> None:
    with deployed(tmp_path / "d", job(2, 3)) as net:
        private, _ = keys.node_key()
        keys.write_private(net.folder / "nodes" / "client-1" / "node.key", private)
        settings = net.folder / "server" / "server.toml"
        settings.write_text(settings.read_text().replace("gather = 60.0", "gather = 12.0"))
        serving = net.server()
        net.node("client-0")
        stranger = net.start(*process.own("supernode", net.folder / "nodes" / "client-1"))
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
        assert stranger.poll() not in (None, 0)
    assert {row["client"] for row in fedkeel.Run(net.local.run).updates} == {"client-0"}


def test_asynchronous_rounds_use_late_answers_and_go_on_after_a_kill(tmp_path: Path) -> None:
    sections = {"schedule": {"rule": "fedbuff(buffer=1)"}, "aggregate": {"weigh": ("examples", "staleness")}}
    with deployed(tmp_path / "d", job(3, 40, **sections)) as net:
        serving = net.server()
        net.node("client-0")
        net.node("client-1")
        net.wait(net.local.run.exists)
        net.hostile({"client-2": "slow"})
        net.wait(lambda: net.round >= 4)
        net.kill("worker", "client-1")  # at work: it is started anew, and takes part again
        net.wait(lambda: net.round >= 14)
        net.kill("head")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    assert [row["round"] for row in done.rounds] == list(range(1, 41))
    used = [row for row in done.updates if row["stage"] is None]
    assert len(used) == 40  # one a round: none counts twice
    assert any(row["client"] == "client-1" and row["round"] > 6 for row in used)
    slow = [row for row in used if row["client"] == "client-2"]
    assert any(row["staleness"] >= 1 for row in slow), slow
    assert all(row["weight"] > 0 for row in slow)
    quick = [row for row in used if row["client"] != "client-2"]
    assert len(quick) > len(slow)  # nobody waits for the slow one
    assert any("started anew" in (row["reason"] or "") for row in done.updates)  # what was under way at the kill
    accuracies = [row["value"] for row in done.metrics if row["name"] == "accuracy"]
    assert accuracies[-1] > accuracies[0] + 0.1


def test_nobody_waits_for_a_node_that_is_paused_and_it_comes_back(tmp_path: Path) -> None:
    paused = float(os.environ.get("FEDKEEL_PAUSE", "12"))  # seconds; after a minute Flower takes the node for gone
    with deployed(tmp_path / "d", job(3, 1000, schedule={"rule": "semi_sync(deadline=3.0)"})) as net:

        def used(client: str) -> list[int]:
            rows = fedkeel.Run(net.local.run).updates
            return [row["round"] for row in rows if row["client"] == client and row["stage"] is None]

        net.server()
        net.node("client-0", "client-1")
        net.node("client-2")
        net.wait(lambda: net.round >= 2)
        for role in ("supernode", "worker"):
            net.kill(role, "client-2", signal.SIGSTOP)
        began, until = net.round, time.monotonic() + paused
        net.wait(lambda: time.monotonic() > until, 2 * paused)
        ended = net.round
        for role in ("supernode", "worker"):
            net.kill(role, "client-2", signal.SIGCONT)
        net.wait(lambda: max(used("client-2")) > ended)
        assert ended - began >= paused / 3 - 2
        assert set(range(began + 2, ended)).isdisjoint(used("client-2"))
        assert 2 * len(set(range(began, ended)) & set(used("client-0"))) > ended - began


def test_a_thousand_bad_messages_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    with deployed(tmp_path / "d", job(3, 20)) as net:
        settings = net.folder / "server" / "server.toml"
        settings.write_text(settings.read_text().replace("gather = 60.0", "gather = 1.0"))
        serving = net.server()
        net.node("client-0", "client-1")
        net.wait(lambda: net.round >= 1)
        link = psutil.Process(net.pid("superlink"))
        before = link.memory_info().rss
        sent, refused = _spammed(net, 1000)
        assert refused == 1000
        assert link.memory_info().rss - before < sent / 2
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
        left = sum(path.stat().st_size for path in (net.folder / "server").rglob("superlink*") if path.is_file())
        assert left < 5_000_000, left
    rows = fedkeel.Run(net.local.run).updates
    assert {row["client"] for row in rows if row["stage"] is None} == {"client-0", "client-1"}
    rounds = [row["round"] for row in rows if row["client"] == "client-0" and row["stage"] is None]
    assert rounds == list(range(rounds[0], 21))


def _spammed(net: Deployed, count: int) -> tuple[int, int]:
    """Answers to questions that nobody asked, each with 200 kB, signed by a registered node: bytes, and refusals."""
    folder = net.folder / "nodes" / "client-2"
    key = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    address, authority = f"127.0.0.1:{net.port}", (folder / "ca.crt").read_bytes()
    draw, sent, refused = random.Random(0), 0, 0
    with FleetHttpClient.from_server_address(address, False, authority, interceptors=interceptors) as client:
        public = public_key_to_bytes(key.public_key())
        node = Node(node_id=client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id)
        client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=30))
        while not (asked := client.PullMessages(PullMessagesRequest(node=node)).messages_list):
            time.sleep(0.2)
        run = asked[0].metadata.run_id
        for number in range(count):
            content = b"ArrayChunk  200000\0" + draw.randbytes(200_000)
            tree = ObjectTree(object_id=get_object_id(content))
            about = Metadata(
                run_id=run,
                message_id=tree.object_id,
                src_node_id=node.node_id,
                dst_node_id=1,
                reply_to_message_id=f"{number:064x}",
                ttl=1e6,
                message_type="train",
                created_at=time.time(),
            )
            request = PushMessagesRequest(
                node=node,
                messages_list=[ProtoMessage(metadata=about, content=ProtoRecordDict())],
                message_object_trees=[tree],
            )
            said = client.PushMessages(request)
            pushed = PushObjectRequest(
                node=node,
                run_id=run,
                session_id=said.session_id,
                object_id=tree.object_id,
                object_content=content,
            )
            refused += not client.PushObject(pushed).stored
            sent += request.ByteSize() + len(content)
        client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    return sent, refused
