"""Local training: one contract, several backends, evaluation. Used by simulation and deployment alike."""

from fedkeel.train.backends import backends, make_trainer
from fedkeel.train.contract import ClientData, LocalWork, Prepare, Scale, Task, Tokens, Trained, Trainer
from fedkeel.train.evaluate import evaluate, outputs
from fedkeel.train.referee import ServerExamples

__all__ = [
    "ClientData",
    "LocalWork",
    "Prepare",
    "Scale",
    "ServerExamples",
    "Task",
    "Tokens",
    "Trained",
    "Trainer",
    "backends",
    "evaluate",
    "make_trainer",
    "outputs",
]
