"""Models: small reference networks. Contract: (inputs, classes) -> nn.Module from (B, *inputs) to (B, classes).

For a regression (`classes` 0) the output is (B, 1). All are plain modules without data-dependent control flow.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import Rule, rule
from fedkeel.world.pool import Pool

Size = Annotated[int, Field(ge=1)]


def build_model(model: Rule, pool: Pool, key: Key) -> nn.Module:
    """The model for this data, its initial weights drawn from `key` alone; torch's generator stays as it was.

    Two examples are passed through it: a model that does not take them, or whose output is not (B, classes),
    raises `InputError`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key.torch().initial_seed())
        module = model(pool.inputs, pool.classes)
        if not isinstance(module, nn.Module):
            raise InputError(f"model '{model.name}' made a {type(module).__name__}: return a torch.nn.Module")
        training = module.training
        try:
            with torch.no_grad():
                output = module.eval()(pool.prepare(pool.x[:1]).repeat_interleave(2, 0))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"model '{model.name}' does not take inputs of shape {pool.inputs} ({str(error).splitlines()[0]}): "
                "choose a model that fits the data"
            ) from error
        module.train(training)
    shape = tuple(output.shape)
    if len(shape) < 2 or shape[0] != 2 or (pool.classes and shape[1] != pool.classes):
        raise InputError(
            f"model '{model.name}' maps 2 examples to shape {shape}: return one row per example, "
            f"of {pool.classes or 'the targets'} columns"
        )
    return module


@rule("model")
def logistic(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the flattened input (7,850 parameters for MNIST)."""
    return _named(flatten=nn.Flatten(), head=nn.Linear(math.prod(inputs), _outputs(classes)))


@rule("model")
def mlp(inputs: tuple[int, ...], classes: int, *, hidden: tuple[Size, ...] = (200, 200)) -> nn.Module:
    """Fully connected layers with ReLU; (200, 200) is the 2NN of McMahan et al. 2017 (199,210 parameters for MNIST)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(inputs)
    for i, units in enumerate(hidden, 1):
        layers[f"fc{i}"] = nn.Linear(width, units)
        layers[f"relu{i}"] = nn.ReLU()
        width = units
    layers["head"] = nn.Linear(width, _outputs(classes))
    return nn.Sequential(layers)


@rule("model")
def cnn(inputs: tuple[int, ...], classes: int, *, padding: Annotated[int, Field(ge=0, le=2)] = 2) -> nn.Module:
    """The CNN of McMahan et al. 2017: padded 5x5 convolutions of 32 and 64, pools, 512 units (1,663,370 for MNIST).

    With `padding` 0, as PFLlib has it, 582,026.
    """
    channels, height, width = _image("cnn", inputs, least=16 if padding < 2 else 4)
    rows, columns = (((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in (height, width))
    return _named(
        conv1=nn.Conv2d(channels, 32, 5, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 5, padding=padding),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * rows * columns, 512),
        relu3=nn.ReLU(),
        head=nn.Linear(512, _outputs(classes)),
    )


@rule("model")
def lenet(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """The LeNet of NIID-Bench (Li et al. 2022): 5x5 convolutions of 6 and 16, pools, 120, 84 (44,426 for MNIST)."""
    channels, height, width = _image("lenet", inputs, least=16)
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
    return _named(
        conv1=nn.Conv2d(channels, 6, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * rows * columns, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        head=nn.Linear(84, _outputs(classes)),
    )


@rule("model")
def resnet(inputs: tuple[int, ...], classes: int, *, width: Size = 16, blocks: Size = 3, groups: Size = 8) -> nn.Module:
    """The CIFAR ResNet of He et al. 2016 (depth 6 * blocks + 2) with GroupNorm (269,722 for ResNet-20 on CIFAR-10).

    GroupNorm (Wu & He 2018) in the place of BatchNorm, whose statistics suffer under non-IID clients (Hsieh et al.
    2020). Shortcuts are parameter-free (option A). `width` channels in the first of three stages.
    """
    channels, _, _ = _image("resnet", inputs, least=4)
    if width % groups:
        raise InputError(f"model 'resnet': groups={groups} does not divide width={width}: choose a divisor")
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, width, 3, padding=1, bias=False), norm=nn.GroupNorm(groups, width), relu=nn.ReLU()
    )
    inside = width
    for stage in range(3):
        for block in range(blocks):
            outside = width << stage
            layers[f"stage{stage + 1}_{block + 1}"] = _Residual(inside, outside, groups)
            inside = outside
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(inside, _outputs(classes))
    return nn.Sequential(layers)


@rule("model")
def conv1d(inputs: tuple[int, ...], classes: int, *, width: Size = 32) -> nn.Module:
    """For series of shape (channels, time): two convolutions of 5 steps (width, 2 * width), the mean over time."""
    if len(inputs) != 2 or inputs[1] < 2:
        raise InputError(f"model 'conv1d' needs inputs (channels, time >= 2), not {inputs}: choose mlp")
    return _named(
        conv1=nn.Conv1d(inputs[0], width, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool1d(2),
        conv2=nn.Conv1d(width, 2 * width, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.AdaptiveAvgPool1d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(2 * width, _outputs(classes)),
    )


@rule("model")
def char_lstm(
    inputs: tuple[int, ...], classes: int, *, embedding: Size = 8, units: Size = 256, layers: Size = 2
) -> nn.Module:
    """The next-character LSTM of McMahan et al. 2017: embedding of 8, two layers of 256 units, one character out.

    Inputs (T,) int64 symbols in 0..classes-1; 820,522 parameters for 90 characters, and PyTorch's second bias.
    """
    if len(inputs) != 1 or classes < 2:
        raise InputError(f"model 'char_lstm' needs inputs (time,) of symbols, not {inputs}: choose mlp")
    return _CharLSTM(classes, embedding, units, layers)


class _Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm and a shortcut that strides and pads with zero channels."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.stride = outside // inside
        self.extra = outside - inside
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outside)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.extra:
            shortcut = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + shortcut)


class _CharLSTM(nn.Module):
    def __init__(self, symbols: int, embedding: int, units: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, units, layers, batch_first=True)
        self.head = nn.Linear(units, symbols)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


def _named(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def _outputs(classes: int) -> int:
    return classes or 1


def _image(name: str, inputs: tuple[int, ...], least: int) -> tuple[int, int, int]:
    if len(inputs) != 3 or min(inputs[1:]) < least:
        better = "cnn or mlp" if len(inputs) == 3 and min(inputs[1:]) >= 4 else "mlp or logistic"
        raise InputError(
            f"model '{name}' needs images (channels, height, width) of at least {least}x{least}, not inputs of shape "
            f"{inputs}: choose {better}"
        )
    return inputs[0], inputs[1], inputs[2]
