"""Your own model: any function that returns an nn.Module, under one decorator."""

from torch import nn

import fedkeel


@fedkeel.rule("model")
def small_cnn(inputs: tuple[int, ...], classes: int, *, channels: int = 16) -> nn.Module:
    """Two convolutions and a linear head; `inputs` is the shape of one example."""
    depth, height, width = inputs
    return nn.Sequential(
        nn.Conv2d(depth, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * height * width, classes),
    )


if __name__ == "__main__":
    job = fedkeel.Job(
        name="own-model",
        rounds=10,
        data={"source": "digits", "clients": 10, "partition": "shards(classes_per_client=3)"},
        model={"build": "small_cnn(channels=8)"},
    )
    run = fedkeel.run(job)
    print(f"accuracy {run.final()['value']:.3f}, report: {run.path / 'report.html'}")
