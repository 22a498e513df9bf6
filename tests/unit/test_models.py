"""The reference networks: their published sizes, what they refuse, how they are initialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build, definition, names
from fedkeel.train.contract import Tokens
from fedkeel.world.models import build_model
from fedkeel.world.pool import Pool

# name, parameters, inputs, classes, published number of parameters
SIZES = [
    ("logistic", {}, (1, 28, 28), 10, 7_850),
    ("mlp", {}, (1, 28, 28), 10, 199_210),
    ("mlp", {"hidden": ()}, (64,), 10, 650),
    ("cnn", {}, (1, 28, 28), 10, 1_663_370),
    ("lenet", {}, (1, 28, 28), 10, 44_426),
    ("lenet", {}, (3, 32, 32), 10, 62_006),
    ("resnet", {}, (3, 32, 32), 10, 269_722),
    ("resnet", {"blocks": 5}, (3, 32, 32), 10, 464_154),
    ("resnet", {"blocks": 9}, (3, 32, 32), 10, 853_018),
    # PyTorch keeps two bias vectors per LSTM layer where the published count has one.
    ("char_lstm", {}, (80,), 90, 820_522 + 2 * 4 * 256),
]
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "logistic": ({}, (1, 8, 8)),
    "mlp": ({"hidden": (7,)}, (1, 8, 8)),
    "cnn": ({}, (1, 8, 8)),
    "lenet": ({}, (1, 16, 16)),
    "resnet": ({"width": 4, "blocks": 1, "groups": 2}, (1, 8, 8)),
    "conv1d": ({"width": 4}, (6, 20)),
    "char_lstm": ({"units": 5}, (6,)),
}


def pool(inputs: tuple[int, ...], symbols: bool) -> Pool:
    generator = Key.root(5).torch()
    if symbols:
        x = torch.randint(0, 4, (6, *inputs), dtype=torch.uint8, generator=generator)
        return Pool.from_arrays(x, torch.arange(6) % 4, x, torch.arange(6) % 4, prepare=Tokens())
    x = torch.randn((6, *inputs), generator=generator)
    return Pool.from_arrays(x, torch.arange(6) % 4, x, torch.arange(6) % 4)


def small(name: str, seed: int = 1) -> tuple[nn.Module, Pool]:
    parameters, inputs = SMALL[name]
    data = pool(inputs, symbols=name == "char_lstm")
    return build_model(build("model", name, **parameters), data, Key.root(seed)), data


@pytest.mark.parametrize(("name", "parameters", "inputs", "classes", "published"), SIZES)
def test_the_published_number_of_parameters(
    name: str, parameters: dict[str, Any], inputs: tuple[int, ...], classes: int, published: int
) -> None:
    module = build("model", name, **parameters)(inputs, classes)
    assert sum(p.numel() for p in module.parameters()) == published


BUILT_IN = [n for n in names("model") if definition("model", n).function.__module__.startswith("fedkeel.")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_weights_are_the_keys_and_the_global_generator_stays(name: str) -> None:
    before = torch.get_rng_state()
    first = small(name)[0].state_dict()
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = small(name)[0].state_dict()
    other = small(name, seed=2)[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_step_is_traceable_and_vmaps(name: str) -> None:
    """The gradient as a flat graph, and over rows of models, equals plain autograd."""
    module, data = small(name)
    x, y = data.prepare(data.x), data.y
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(module, p, (x,)), y)

    nn.functional.cross_entropy(module(x), y).backward()
    traced = make_fx(grad(loss))(parameters, x, y)(parameters, x, y)
    for k, p in module.named_parameters():
        torch.testing.assert_close(traced[k], p.grad)
    if name == "char_lstm":
        return  # no batching rule of the fused CPU kernel: it warns and falls back to a loop
    rows = {k: torch.stack([v, v]) for k, v in parameters.items()}
    both = vmap(grad(loss), in_dims=(0, None, None))(rows, x, y)
    for k, p in module.named_parameters():
        torch.testing.assert_close(both[k][1], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_regression_has_one_output(name: str) -> None:
    if name == "char_lstm":
        with pytest.raises(InputError, match="needs inputs"):
            build("model", name)((6,), 0)
        return
    parameters, inputs = SMALL[name]
    assert build("model", name, **parameters)(inputs, 0)(torch.zeros(3, *inputs)).shape == (3, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "inputs", "sentence"),
    [
        ("lenet", {}, (1, 8, 8), r"'lenet' needs images .* at least 16x16, not .*\(1, 8, 8\): choose cnn or mlp"),
        ("cnn", {}, (1, 3, 8), "'cnn' needs images .* at least 4x4.*choose mlp or logistic"),
        ("resnet", {}, (64,), r"'resnet' needs images .*\(64,\): choose mlp"),
        ("resnet", {"groups": 3}, (3, 32, 32), "groups=3 does not divide width=16"),
        ("conv1d", {}, (64,), r"'conv1d' needs inputs \(channels, time >= 2\)"),
        ("char_lstm", {}, (6, 64), r"'char_lstm' needs inputs \(time,\) of symbols"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    name: str, parameters: dict[str, Any], inputs: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        build("model", name, **parameters)(inputs, 10)


def test_images_down_to_the_least_size_work() -> None:
    for name, side in (("cnn", 4), ("resnet", 4), ("lenet", 16)):
        assert build("model", name)((1, side, side), 10)(torch.zeros(2, 1, side, side)).shape == (2, 10)


def test_a_model_that_does_not_take_the_data_is_refused() -> None:
    with pytest.raises(InputError, match=r"'mlp' does not take inputs of shape \(6,\)"):
        build_model(build("model", "mlp"), pool((6,), symbols=True), Key.root(0))
    with pytest.raises(InputError, match=r"'char_lstm' does not take inputs of shape \(6,\)"):
        build_model(build("model", "char_lstm"), pool((6,), symbols=False), Key.root(0))


def test_a_users_model_is_checked_and_left_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkeel.core import registry

    monkeypatch.setitem(registry._rules, "model", dict(registry._rules["model"]))

    @registry.rule("model")
    def mine(inputs: tuple[int, ...], classes: int, *, outputs: int = 4, module: bool = True) -> object:
        """With a BatchNorm, whose statistics the check must not move."""
        return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, outputs)) if module else "module"

    data = pool((3,), symbols=False)
    built = build_model(build("model", "mine"), data, Key.root(0))
    assert all(m.training for m in built.modules())
    assert built.state_dict()["0.running_mean"].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"'mine' maps 2 examples to shape \(2, 5\).*of 4 columns"):
        build_model(build("model", "mine", outputs=5), data, Key.root(0))
    with pytest.raises(InputError, match=r"'mine' made a str: return a torch.nn.Module"):
        build_model(build("model", "mine", module=False), data, Key.root(0))
