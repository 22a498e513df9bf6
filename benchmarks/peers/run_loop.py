#!/usr/bin/env python3
"""The baseline: federated averaging as a careful person would write it in plain PyTorch, without a framework."""

import torch
from common import BATCH_SIZE, LEARNING_RATE, Rounds, load, parse_job, torch_accuracy, torch_images, torch_model
from torch.nn.functional import cross_entropy

THREADS = {"threads-1": 1, "threads-2": 2}


def main() -> None:
    job = parse_job("loop", list(THREADS))
    rounds = Rounds()
    torch.set_num_threads(THREADS[job.mode])
    data = load(job)
    x, y = torch_images(data.x), torch.from_numpy(data.y)
    model = torch_model(job.model, job.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)  # without momentum it holds no state to reset
    generator = torch.Generator().manual_seed(job.seed)

    rounds.tick()
    for cohort in data.cohorts[: job.total_rounds]:
        server = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in server]
        examples = sum(int(data.offsets[c + 1] - data.offsets[c]) for c in cohort)
        for client in cohort:
            own = data.of(client)
            size = own.stop - own.start
            with torch.no_grad():
                for p, s in zip(parameters, server, strict=True):
                    p.copy_(s)
            for batch in (own.start + torch.randperm(size, generator=generator)).split(BATCH_SIZE):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                for t, p in zip(total, parameters, strict=True):
                    t.add_(p, alpha=size / examples)
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p.copy_(t)
        rounds.tick()
    rounds.stop()
    settings = {"torch_threads": torch.get_num_threads(), "shuffled": True, "fixed_cohorts": True}
    rounds.report(job, "loop", "torch", torch_accuracy(model, data), settings)


if __name__ == "__main__":
    main()
