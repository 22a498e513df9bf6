"""A node's half: orders in, envelopes out. Its data, model and memory are loaded once, and stay on its own disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from torch import Tensor

from fedkeel.core.errors import DecodeError, FedkeelError
from fedkeel.core.types import ClientMemory
from fedkeel.deploy import loaders, messages
from fedkeel.deploy.folder import NodeFolder
from fedkeel.round import secure, wire
from fedkeel.round.controls import first_control
from fedkeel.round.device import LABEL_NOISE
from fedkeel.round.protect import USES
from fedkeel.secagg.client import Client as Session
from fedkeel.secagg.messages import is_terms, read_terms
from fedkeel.ship import tensors
from fedkeel.ship.card import ModelCard
from fedkeel.world.bridge import check
from fedkeel.world.carded import CARD, contract
from fedkeel.world.clients import Base, Clients
from fedkeel.world.evaluation import asked_of_clients, own

_log = logging.getLogger("fedkeel")
_FAILED = "its training failed, and why is for its own log: the reason may tell of its data"
_BASE, _VERSION, _BEFORE = "down/theta", "down/version", "before/"


class Node:
    """What answers to a federation's messages, for one client."""

    def __init__(self, folder: NodeFolder) -> None:
        """Raises `InputError` where the folder's job, data or memory do not fit."""
        self._folder = folder
        self._client = folder.settings.client
        self.federation = loaders.at_node(folder)
        self._agreed = messages.agreement(self.federation)
        self._contract = contract(self.federation, "this client")
        self._session: Session | None = None
        self._heard, self._said = b"", b""
        self._enter(self._agreed[CARD])

    def _enter(self, met: str) -> None:
        """Get ready to train the model of the card `met`, which the federation is of."""
        self._met = met
        self._expected = first_control(self.federation.plan, self.federation.layout).keys()
        self._task, self._before = -1, dict[str, Tensor]()
        self._memory = self._recalled()
        self._tuner = self.federation.tuner()
        self._clients = Clients(self.federation, self.federation.trainer(), self._memory)

    def _meet(self, offered: str) -> None:
        """Go over to the server's model, where it is another version. Raises `InputError` where that can not be."""
        if offered == self._met:
            return
        if offered == self._agreed[CARD]:
            federation = loaders.at_node(self._folder)
        else:
            card = ModelCard.from_json(offered)
            check(self._contract, card)
            federation = loaders.at_node(self._folder, card)
            _log.info("the server's model is %s, this client's %s: adapted", card.version, self._contract.version)
        self.close()
        self.federation = federation
        self._enter(offered)

    def close(self) -> None:
        """Let go of the trainers."""
        if self._tuner is not None:
            self._tuner.close()
        self._clients.close()
        self._clients.trainer.close()

    def __call__(self, message: Message, context: Context) -> Message:
        """Carry out the order in a message; the reply holds an envelope, or says why not."""
        if message.metadata.message_type == MessageType.QUERY and messages.SUM not in message.content:
            return Message(RecordDict(), reply_to=message)  # a sign of life
        try:
            if message.metadata.message_type == MessageType.QUERY:
                return Message(messages.sum_content(self._sum(message.content)), reply_to=message)
            agreed = messages.read_agreement(message.content)
            if (reason := self._door(agreed)) is None:
                order = messages.read_order(message.content, self.federation.layout.columns)
                reason = self._reason(order)
            if reason is not None:
                reply = messages.failure_content(reason)
            elif message.metadata.message_type == MessageType.EVALUATE:
                reply = messages.figures_content(*self._measure(order))
            else:
                reply = messages.update_content(self._train(order))
        except (DecodeError, FedkeelError, ValueError) as error:
            _log.warning("task refused: %s", error)
            reply = messages.failure_content(str(error))
        return Message(reply, reply_to=message)

    def _door(self, agreed: Mapping[str, str]) -> str | None:
        """Why nothing of this server is worked at; None: it and this client mean the same by an update."""
        offered = agreed.get(CARD, "")
        upgrade = messages.version(offered) != self._contract.version
        if found := messages.differing(self._agreed, agreed, upgrade):
            return f"{found}: bring both to the same job and version"
        self._meet(offered)
        return None

    def _reason(self, order: messages.Order) -> str | None:
        """Why this node does not work at an order; None: it does."""
        if order.train.client != self._client:
            return f"it is an order for '{order.train.client[:64]}', this is '{self._client}'"
        expected = self._expected
        if order.control.keys() != expected:
            return f"its work needs {sorted(expected)}, it was sent {sorted(order.control)}"
        return None

    def _base(self, order: messages.Order) -> Base:
        """What the order begins with; kept, where the next order may send but the way from there."""
        theta, train, plan = order.theta, order.train, self.federation.plan
        held = self._memory.of(self._client)
        if theta is None:
            if _BASE not in held or int(held[_VERSION]) != train.have:
                raise ValueError(f"this node has not the model {train.have} that the order begins from")
            assert plan.down is not None  # agreed upon
            _, codec = wire.built(plan.down, self.federation.layout)
            theta, limit = held[_BASE], codec.max_bytes(self.federation.layout.columns)
            for packed in order.steps:
                step = torch.empty_like(theta)
                codec.decode(wire.unpacked(packed, bool(plan.down_zstd), limit), step)
                theta = theta + step
            if not bool(theta.isfinite().all()):
                raise DecodeError("the way to the model leads to values that are no numbers")
        if plan.down is not None:
            self._memory.keep(self._client, {_BASE: theta, _VERSION: torch.tensor(train.version)})
        return Base(theta, order.control)

    def _train(self, order: messages.Order) -> bytes:
        self._begin(order.train.task)
        base = self._base(order)
        made = next(self._clients.train([order.train], base))
        if made.claims is None:
            self._keep()
            privacy = self.federation.plan.privacy
            if privacy is not None and not privacy.central:
                _log.warning("training failed: %s", made.failure)
                raise ValueError(_FAILED)
            raise ValueError(made.failure)
        envelope = self._clients.seal(made, made.claims, base)
        self._keep()
        return envelope

    def _sum(self, content: RecordDict) -> bytes:
        """What goes back for a message of secure aggregation; the same once more, where that was lost on the way."""
        data = messages.read_sum(content)
        if isinstance(data, str):
            raise DecodeError("it holds no message of secure aggregation")
        digest = hashlib.sha256(data).digest()
        if self._heard != digest:
            self._said = self._answered(data)
            self._heard = digest
        return self._said

    def _answered(self, data: memoryview) -> bytes:
        plan, columns = self.federation.plan, self.federation.layout.columns
        if plan.secure is None:
            raise ValueError("its job adds nothing up under masks: bring both to the same job")
        if self._session is not None and not is_terms(data):
            return self._session.answer(data)
        terms = read_terms(data)
        plan.secure.check(terms, columns)
        session = Session(self._client, terms)
        session.hold(secure.take(self._client, self._memory))
        self._keep()  # a row is added up once, whatever a server asks
        self._session = session
        return session.advertise()

    def _begin(self, task: int) -> None:
        """Remember what there was before the task; before it once more, where a server went back to its checkpoint."""
        if task <= self._task:
            held = self._memory.of(self._client)
            left = {name: held[name] for name in (USES, LABEL_NOISE) if name in held}  # what has left has left
            self._memory.forget(self._client, list(held))
            self._memory.keep(self._client, {**self._before, **left})
        self._before, self._task = dict(self._memory.of(self._client)), task

    def _measure(self, order: messages.Order) -> tuple[dict[str, float], int]:
        """Figures of this client's own model, on what it holds back, and how many examples that is."""
        if not asked_of_clients(self.federation):
            raise ValueError("it holds nothing back to test on: data.holdout is 0")
        if order.theta is None:
            raise DecodeError("it was sent no model to measure")
        return own(self.federation, order.theta, self._memory, self._tuner)[self._client]

    def _recalled(self) -> ClientMemory:
        memory = ClientMemory()
        if self._folder.memory.is_file():
            held, info = tensors.read(self._folder.memory)
            if info.get("layout") != self.federation.layout.digest:  # its vectors are of another model
                held = {
                    name: value for name, value in held.items() if name.removeprefix(_BEFORE) in (USES, LABEL_NOISE)
                }
            self._task = int(info.get("task", -1))
            self._before = {n.removeprefix(_BEFORE): v for n, v in held.items() if n.startswith(_BEFORE)}
            memory.keep(self._client, {n: v for n, v in held.items() if not n.startswith(_BEFORE)})
        return memory

    def _keep(self) -> None:
        """Write down what the client remembers, before its answer leaves."""
        held = {name: vector for _, name, vector in self._memory.items()}
        if held or self._folder.memory.exists():
            held |= {_BEFORE + name: vector for name, vector in self._before.items()}
            info = {"client": self._client, "task": self._task, "layout": self.federation.layout.digest}
            tensors.write(self._folder.memory, held, info)


class Reluctant:
    """A node that is made when it is first needed; where it can not be, every order is answered with the reason."""

    def __init__(self, folder: NodeFolder) -> None:
        self._folder = folder
        self._node: Node | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """As `Node`."""
        try:
            if self._node is None:
                self._node = Node(self._folder)
        except FedkeelError as error:
            _log.error("%s can not take part: %s", self._folder.settings.client, error)
            return Message(messages.failure_content(str(error)), reply_to=message)
        return self._node(message, context)

    def prepare(self) -> None:
        """Make the node now, so that its first order need not wait; what is wrong is told with that."""
        with suppress(FedkeelError):
            self._node = Node(self._folder)
