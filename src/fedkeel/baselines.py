"""What a federation is measured against: plain FedAvg, every client by itself, and all examples in one place."""

from __future__ import annotations

import math
from typing import Any

from fedkeel.config import Job

FEDAVG, LOCAL, CENTRALISED = "FedAvg", "local-only", "centralised"


def baselines(job: Job) -> dict[str, Job]:
    """The baselines of a job, by name: the same data, model, local optimiser, local epochs and rounds.

    FedAvg has no corrections but weight decay, no private layers, no noise, and the plain mean by examples, under the
    same attack. Alone and centralised training have nobody hostile among them; there everyone takes part in every
    round. Where clients do a number of steps and not of epochs, centralised training does as many as all of a cohort
    together. FedAvg waits for all, on the job's devices; alone and centralised nobody waits, and all work as often as a
    job's client does on the mean, or in the job's time as often as a device of time 1 could.
    """
    sections: dict[str, Any] = job.model_dump(mode="json", exclude_none=True)
    decay = [text for text in job.train.corrections if text.startswith("l2(")]
    train = {**sections["train"], "corrections": decay, "objective": "plain"}
    train.pop("private_first", None)
    model = {**sections["model"], "private": []}
    record = {key: value for key, value in sections["record"].items() if key not in ("fine_tune", "contribution")}
    left_out = ("aggregate", "quarantine", "client", "privacy", "secagg")
    plain = {key: value for key, value in sections.items() if key not in left_out}
    plain |= {"train": train, "model": model, "record": record}
    plain["data"] = {**sections["data"], "pooled": False}
    plain["server"] = {"examples": job.server.examples}
    together = ("attack", "select", "schedule", "devices")
    apart = {key: value for key, value in plain.items() if key not in together} | {"rounds": _rounds_alone(job)}
    plain["schedule"] = {key: value for key, value in sections["schedule"].items() if key == "seconds"}
    return {
        FEDAVG: Job(**plain),
        LOCAL: Job(**apart | {"model": model | {"private": ["*"]}}),
        CENTRALISED: Job(
            **apart | {"data": {**sections["data"], "pooled": True}, "train": train | {"stopping": _by_all(job)}}
        ),
    }


def _rounds_alone(job: Job) -> int:
    rows = job.rule("schedule.rule", "scheduler").hook("rows")
    rounds = job.rounds if rows is None else math.ceil(job.rounds * rows(job.cohort) / job.data.clients)
    if job.schedule.seconds is not None and job.devices.round_seconds:
        rounds = min(rounds, math.ceil(job.schedule.seconds / job.devices.round_seconds))
    return rounds


def _by_all(job: Job) -> str:
    """How long one trains who trains for all."""
    rule = job.rule("train.stopping", "stopping")
    if rule.name in ("steps", "budget"):
        return f"steps(steps={rule.parameters['steps'] * job.cohort})"
    return job.train.stopping
