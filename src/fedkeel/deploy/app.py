"""The federation as a Flower app, for Flower's own `flower-superexec`. FEDKEEL_FOLDER is the host's folder."""

from __future__ import annotations

import os
from functools import cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import HttpGrid

from fedkeel.core.errors import InputError
from fedkeel.deploy import head
from fedkeel.deploy.folder import NodeFolder, ServerFolder
from fedkeel.deploy.node import Node

client = ClientApp()
server = ServerApp()


def _folder() -> str:
    if not (found := os.environ.get("FEDKEEL_FOLDER")):
        raise InputError("FEDKEEL_FOLDER is not set: name the folder of this host that `fedkeel deploy init` wrote")
    return found


@cache
def _node() -> Node:
    return Node(NodeFolder(_folder()))


@client.train()
def train(message: Message, context: Context) -> Message:
    """One task of the federation."""
    return _node()(message, context)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The federation, from its last checkpoint where there is one."""
    if not isinstance(grid, HttpGrid):
        raise InputError(f"a {type(grid).__name__} does not reach nodes on a network: simulate with `fedkeel run`")
    head.preside(ServerFolder(_folder()), grid)
