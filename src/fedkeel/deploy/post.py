"""What was sent to whom, so that every reply is laid to the right account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedkeel.core.types import Stage
from fedkeel.deploy.messages import in_words


class Sent(NamedTuple):
    """A message that was sent: for which client, and which of its tasks; evaluations have no task."""

    client: str
    task: int
    message: Message


class Post:
    """The messages of the round that is open, and of the one before it."""

    def __init__(self) -> None:
        self.open: list[Sent] = []
        self._numbers: dict[str, Sent] = {}
        self._before: dict[str, Sent] = {}

    def send(self, sent: Sequence[Sent]) -> list[Message]:
        """Remember the messages of a new round."""
        self._before = self._by_number()
        self.open, self._numbers = list(sent), {}
        return [each.message for each in sent]

    def asked(self, reply: Message, *, before: bool = True) -> Sent | None:
        """What a reply answers, in this round or the one `before`; None: neither. Error replies bear no node's name."""
        number = reply.metadata.reply_to_message_id
        return self._by_number().get(number) or (self._before.get(number) if before else None)

    def _by_number(self) -> dict[str, Sent]:
        """Flower numbers messages when it takes them, so that is asked once there are replies."""
        if not self._numbers:
            self._numbers = {each.message.metadata.message_id: each for each in self.open}
        return self._numbers


def stranger(reply: Message, sent: Sent) -> str | None:
    """In words, if another node answered than was asked."""
    source, asked = reply.metadata.src_node_id, sent.message.metadata.dst_node_id
    return None if source == asked else f"node {source} answered in the place of node {asked}"


def failure(reply: Message) -> tuple[Stage, str]:
    """What an error reply says: where the answer was lost, and why."""
    code = reply.error.code
    by_app = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.MOD_FAILED_PRECONDITION, ErrorCode.CLIENT_APP_CRASHED)
    stage: Stage = "train" if code in by_app else "decode" if code == ErrorCode.UNKNOWN else "transport"
    return stage, in_words(reply.error.reason)
