"""Losses, stopping rules, evaluation, the choice of a backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.kernels import native
from fedkeel.train import ClientData, LocalWork, Scale, Task, Tokens, backends, evaluate, make_trainer
from fedkeel.train.traced import TracedStep

BACKENDS = [b for b in backends if b != "auto" and not (b == "native" and isinstance(native.library(), str))]

CE, MSE = build("loss", "cross_entropy"), build("loss", "mse")


def test_cross_entropy_is_minus_the_log_probability_of_the_class() -> None:
    logits, target = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    expected = -logits.softmax(1)[torch.arange(5), target].log()
    torch.testing.assert_close(CE(logits, target), expected)
    sequence = torch.stack([logits, logits.flip(0)], 1)  # (5, 2, 3)
    pair = torch.stack([target, target.flip(0)], 1)
    torch.testing.assert_close(CE(sequence, pair), (expected + expected.flip(0)) / 2)


def test_mse_averages_over_the_outputs_of_an_example() -> None:
    torch.testing.assert_close(MSE(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2)), torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(MSE(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 1])), torch.tensor([4.0, 0.0]))
    with pytest.raises(RuntimeError):
        MSE(torch.zeros(2, 3), torch.zeros(2))


@given(n=st.integers(1, 50), size=st.integers(1, 20), epochs=st.integers(1, 5))
def test_epochs_counts_every_batch_the_partial_one_too(n: int, size: int, epochs: int) -> None:
    batches = len(torch.zeros(n).split(size))
    assert build("stopping", "epochs", epochs=epochs)(n, size, []) == epochs * batches
    assert build("stopping", "steps", steps=epochs)(n, size, []) == epochs


@given(
    shift=st.sampled_from([0.0, 3.0]), factor=st.sampled_from([1.0, 0.25]), kind=st.sampled_from(["uint8", "float32"])
)
def test_scale_leaves_the_stored_inputs_alone(shift: float, factor: float, kind: str) -> None:
    x = torch.tensor([[0, 7], [255, 128]], dtype=getattr(torch, kind))
    before = x.clone()
    result = Scale(shift, factor)(x)
    assert torch.equal(result, (before.to(torch.float32) - shift) * factor)
    assert torch.equal(x, before)
    assert Tokens()(torch.tensor([3], dtype=torch.uint8)).dtype == torch.int64


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluate_is_the_model_in_evaluation_mode(batch_size: int) -> None:
    module = normed().train()
    module[3].eval()
    x, y = torch.randint(0, 256, (10, 1, 4, 4), dtype=torch.uint8), torch.randint(0, 3, (10,))
    layout = Layout.of(module, ("1.*",))
    vector = layout.flatten(module) + 0.1
    shared = vector[layout.shared]
    found = evaluate(module, layout, vector, x, y, Scale(0, 1 / 255), CE, batch_size)
    modes = [part.training for part in module]
    personal = evaluate(module, layout, shared, x, y, Scale(0, 1 / 255), CE, batch_size)
    assert modes == [True, True, True, False, True, True]
    for values, result in ((shared, personal), (vector, found)):
        other = normed()
        layout.load_(other, layout.flatten(module))
        layout.load_(other, values)
        with torch.no_grad():
            output = other.eval()(x.float() / 255)
        assert result["loss"] == pytest.approx(float(nn.functional.cross_entropy(output, y)), rel=1e-5)
        assert result["accuracy"] == pytest.approx(float((output.argmax(1) == y).float().mean()))
        assert result["examples"] == 10


def test_evaluate_of_numbers_sequences_and_nothing() -> None:
    module = nn.Linear(2, 1)
    layout = Layout.of(module)
    x = torch.randn(6, 2)
    result = evaluate(module, layout, layout.flatten(module), x, torch.zeros(6), Scale(), MSE)
    assert result["accuracy"] is None
    assert result["loss"] == pytest.approx(module(x).square().mean().item(), rel=1e-5)
    text = nn.Embedding(5, 5)
    with torch.no_grad():
        text.weight.copy_(torch.eye(5))
    layout = Layout.of(text)
    y = torch.tensor([[0, 1, 2], [3, 0, 0]])
    same = torch.tensor([[0, 1, 2], [3, 4, 4]], dtype=torch.uint8)
    assert evaluate(text, layout, layout.flatten(text), same, y, Tokens(), CE)["accuracy"] == pytest.approx(4 / 6)
    empty = evaluate(text, layout, layout.flatten(text), same[:0], y[:0], Tokens(), CE)
    assert empty["examples"] == 0
    assert math.isnan(empty["loss"] or 0.0)


def small(module: nn.Module, n: int = 12) -> tuple[nn.Module, Layout, ClientData, LocalWork]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    data = ClientData(x, (x[:, 0] > 0).long(), torch.tensor([0, 5, n]))
    return module, Layout.of(module), data, LocalWork(4, 0.1, build("stopping", "epochs"), CE)


def test_an_unknown_backend_or_number_of_workers_is_refused() -> None:
    given = small(nn.Linear(8, 2))
    with pytest.raises(InputError, match="backend 'trace' is unknown: did you mean 'traced'"):
        make_trainer("trace", *given)
    with pytest.raises(InputError, match="workers = 0 is not valid: write 1 or more"):
        make_trainer("loop", *given, workers=0)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x[0, 0])


def test_a_backend_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="'traced' does not fit this model: its path depends on the data"):
        make_trainer("traced", *small(Noisy(8, 2)))


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 2), lambda: Noisy(8, 2)], ids=["plain", "noisy"])
def test_auto_chooses_a_backend_that_its_name_rebuilds(make: type[nn.Module]) -> None:
    given = small(make())
    chosen = make_trainer("auto", *given, workers=1)
    assert chosen.name in set(backends) - {"auto"}
    again = make_trainer(chosen.name, *given, workers=1)
    theta, tasks = given[1].flatten(given[0]), [Task(i, Key.root(i)) for i in range(2)]
    first = {t.client: t.delta.clone() for t in chosen.train(theta, tasks)}
    assert all(torch.equal(t.delta, first[t.client]) for t in again.train(theta, tasks))


@pytest.mark.skipif(isinstance(native.library(), str), reason="no compiled kernels")
@pytest.mark.parametrize(("batch", "expected"), [(8, "traced"), (64, "native")])
def test_auto_leaves_a_large_convolution_with_a_small_batch_to_pytorch(batch: int, expected: str) -> None:
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 2))
    data = ClientData(torch.randn(70, 32, 4, 4), torch.randint(2, (70,)), torch.tensor([0, 70]))
    work = LocalWork(batch, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    assert make_trainer("auto", module, Layout.of(module), data, work, workers=1).name == expected


def test_a_client_without_examples_fails_alone() -> None:
    module, layout, data, work = small(nn.Linear(8, 2))
    data = ClientData(data.x, data.y, torch.tensor([0, 5, 5, 12]))
    for backend in BACKENDS:
        trainer = make_trainer(backend, module, layout, data, work, workers=1)
        found = {t.client: t for t in trainer.train(layout.flatten(module), [Task(i, Key.root(i)) for i in range(3)])}
        assert found[1].failure == "the client has no examples"
        assert [found[i].failure for i in (0, 2)] == [None, None]


def source(module: nn.Module, x: Tensor, lr: float = 0.1) -> tuple[str, list[str]]:
    """The code of a module's step, and the names of what it calls."""
    data = ClientData(x, torch.zeros(len(x), dtype=torch.int64), torch.tensor([0, len(x)]))
    work = LocalWork(4, lr, build("stopping", "epochs"), CE)
    program = TracedStep(module, Layout.of(module), data, work).program(4)
    return program.source, [getattr(f, "__name__", str(f)) for f in program.bound.values()]


def test_the_step_of_a_perceptron_holds_no_gradient_no_transpose_of_weights_and_no_copy() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    code, called = source(module, torch.randn(8, 4, 4))
    assert {"addmm_", "addmv_", "relu_"} <= set(called)
    assert not {"add_", "sum", "clone.default", "detach.default"} & set(called)
    assert code.count(" = ") + code.count("_(") <= 22


def test_an_embedding_is_updated_only_in_the_rows_that_a_batch_has() -> None:
    module = nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Linear(8, 3))
    data = torch.randint(0, 1000, (8, 2))
    work = LocalWork(4, 0.1, build("stopping", "epochs"), CE)
    given = ClientData(data, torch.zeros(8, dtype=torch.int64), torch.tensor([0, 8]), Tokens())
    program = TracedStep(module, Layout.of(module), given, work).program(4)
    called = {getattr(f, "__name__", str(f)) for f in program.bound.values()}
    assert "index_add_" in called
    assert "embedding_dense_backward.default" not in called


def test_a_batch_larger_than_any_client_is_one_batch():
    """And costs no more: the rows backend pads to the batch size."""
    data = ClientData(
        torch.randn(30, 4), torch.randint(0, 3, (30,), generator=Key(1).torch()), torch.tensor([0, 12, 30])
    )
    module = torch.nn.Linear(4, 3)
    layout = Layout.of(module)
    tasks = [Task(client, Key.root(client)) for client in range(2)]
    found = {}
    for backend in BACKENDS:
        for size in (18, 10**9):
            work = LocalWork(size, 0.1, build("stopping", "epochs", epochs=2), build("loss", "cross_entropy"))
            trainer = make_trainer(backend, module, layout, data, work, workers=1)
            theta = layout.flatten(module)
            found[backend, size] = {t.client: (t.steps, t.delta.clone()) for t in trainer.train(theta, tasks)}
            trainer.close()
    for backend in BACKENDS:
        for client in range(2):
            steps, delta = found[backend, 10**9][client]
            assert steps == 2
            assert torch.equal(delta, found[backend, 18][client][1])
