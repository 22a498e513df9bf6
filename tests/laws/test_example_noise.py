"""DP-SGD: backends equal the loop, the loop equals Opacus, and draws and noise are what the theorem says of them."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional
from train_cases import BATCH, CASES, COUNTS, Case, compiled, data_of, mlp, module_of, tasks_of, work_of

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.noise import Noise
from fedkeel.core.registry import build, parse
from fedkeel.core.types import ExampleNoise
from fedkeel.kernels import native
from fedkeel.kernels.normal import normals
from fedkeel.train import ClientData, LocalWork, Task, Trained, make_trainer
from fedkeel.train.backends import fits
from fedkeel.train.client import single_thread, tell
from fedkeel.train.each import NativeGradients
from fedkeel.train.ghost import RecordedGradients
from fedkeel.train.loop import LoopStep
from fedkeel.train.private import Clipped, OneByOne, drawn


class Words(nn.Module):
    """An embedding, layers over places, and parameters that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.twice(self.embed(x)))
        return self.out(self.norm(self.twice(h)) * self.scale)


class Strided(nn.Module):
    """Convolutions with strides, dilation, uneven padding, one in groups, and one of which only the bias is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU(),
            nn.Conv2d(4, 4, 2, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Tanh(), nn.Conv2d(4, 2, 2, bias=False), nn.Flatten(), nn.Linear(36, 4),
        )  # fmt: skip
        self.body[8].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def lenet() -> nn.Module:
    """Convolutions with and without a bias, and more channels than a kernel takes at a time."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 9, 2, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 17), nn.Sigmoid(), nn.Linear(17, 4, bias=False),
    )  # fmt: skip


class Reused(nn.Module):
    """Uses a layer's weights outside it: what the layer is given does not say its whole gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(64, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x.flatten(1)))
        return self.out(h) + functional.linear(x.flatten(1), self.body.weight[:4])


class Root(nn.Module):
    """Its slope is infinite at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1)).abs().sqrt()


class Mixing(nn.Module):
    """Subtracts the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        return h - h.mean(0)


NATIVE = pytest.param("native", marks=compiled)
BACKENDS = ("loop", "traced", NATIVE)
COMPILED = ("mlp", "frozen", "private", "lenet")
TRAINED = {name: CASES[name] for name in ("mlp", "cnn", "frozen", "group_norm", "attention", "text", "private")}
TRAINED |= {
    "low_rank": replace(CASES["low_rank"], private=("a",)),
    "lenet": Case(lenet, "image"),
    "words": Case(Words, "text"),
    "strided": Case(Strided),
}


def noised(work: LocalWork, norm: float = 0.5, noise: float = 0.7, *, reproducible: bool = True) -> LocalWork:
    return replace(work, example_noise=ExampleNoise(norm, noise, reproducible))


def outcomes(
    backend: str, case: Case, work: LocalWork, data: ClientData | None = None, workers: int = 1
) -> dict[int, Trained]:
    module, data = module_of(case), data or data_of(case)
    layout = Layout.of(module, case.private)
    theta = layout.flatten(module)[layout.shared] + 0.01
    trainer = make_trainer(backend, module, layout, data, work, workers=workers)
    found = {
        t.client: replace(t, delta=t.delta.clone(), private=None if t.private is None else t.private.clone())
        for t in trainer.train(theta, tasks_of(data, layout))
    }
    trainer.close()
    return found


def same(found: dict[int, Trained], expected: dict[int, Trained]) -> None:
    assert found.keys() == expected.keys()
    for client, want in expected.items():
        got = found[client]
        assert (got.steps, got.num_examples, got.failure) == (want.steps, want.num_examples, want.failure)
        assert got.loss == pytest.approx(want.loss, rel=1e-5, nan_ok=True)
        torch.testing.assert_close(got.delta, want.delta, rtol=1e-4, atol=3e-6)
        if want.private is not None:
            torch.testing.assert_close(got.private, want.private, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize(  # empty draws most of the time, now and then, and everybody in every draw
    ("name", "size"), [(n, size) for n in TRAINED for size in (1, BATCH, 100) if size == BATCH or n in COMPILED]
)
def test_all_at_once_equals_one_by_one(name: str, size: int) -> None:
    case = TRAINED[name]
    work = noised(work_of(case, build("correction", "fedprox", mu=0.3), stopping=build("stopping", "steps", steps=4)))
    work = replace(work, batch_size=size)
    expected = outcomes("loop", case, work)
    same(outcomes("traced", case, work), expected)
    if name in COMPILED and not isinstance(native.library(), str):
        same(outcomes("native", case, work), expected)


@compiled
@pytest.mark.parametrize("name", sorted(TRAINED.keys() - set(COMPILED)))
def test_the_compiled_kernels_say_what_they_can_not_take_apart(name: str) -> None:
    case = TRAINED[name]
    module = module_of(case)
    assert fits("native", module, Layout.of(module, case.private), data_of(case), noised(work_of(case)))


@pytest.mark.parametrize("rule", ["sgd(momentum=0.9)", "adam"])
def test_the_optimiser_is_given_what_the_noise_left(rule: str) -> None:
    work = replace(noised(work_of(CASES["mlp"])), optimiser=parse("optimiser", rule), lr=0.01)
    expected = outcomes("loop", CASES["mlp"], work)
    same(outcomes("traced", CASES["mlp"], work), expected)
    same(outcomes("auto", CASES["mlp"], work), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reproducible_noise_gives_the_same_bits_whatever_the_workers(backend: str) -> None:
    work = noised(work_of(CASES["mlp"]))
    expected = outcomes(backend, CASES["mlp"], work)
    for workers in (1, 3):
        again = outcomes(backend, CASES["mlp"], work, workers=workers)
        assert all(torch.equal(again[client].delta, want.delta) for client, want in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_noise_for_privacy_is_never_drawn_twice(backend: str, workers: int) -> None:
    """Neither by a later run nor by two workers that were forked from one process: the same client many times over."""
    module, one = mlp(), data_of(CASES["mlp"], (8,))
    layout = Layout.of(module)
    data = replace(one, x=one.x.repeat(4, 1, 1, 1), y=one.y.repeat(4), offsets=torch.arange(0, 33, 8))
    work = noised(work_of(CASES["mlp"], stopping=build("stopping", "steps", steps=1)), reproducible=False)
    found: list[Tensor] = []
    for _ in range(2):
        trainer = make_trainer(backend, module, layout, data, work, workers=workers)
        tasks = [Task(client, Key(1)) for client in range(4)]
        found += [t.delta.clone() for t in trainer.train(layout.flatten(module), tasks)]
        trainer.close()
    for at, delta in enumerate(found):
        assert all(float((delta != other).float().mean()) > 0.9 for other in found[:at])


def test_a_fork_does_not_repeat_its_parents_noise() -> None:
    noise = Noise()
    noise.normals(3)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(write, noise.words(8).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = torch.frombuffer(bytearray(os.read(read, 64)), dtype=torch.int64)
    assert not set(theirs.tolist()) & set(noise.words(8).tolist())
    os.close(read)
    os.close(write)


def gradients(name: str, norm: float) -> tuple[nn.Module, ClientData, Layout, list[Clipped]]:
    """A case's sums of clipped gradients, one by one and all at once."""
    case = TRAINED[name]
    module, data, work = module_of(case), data_of(case), work_of(case)
    layout = Layout.of(module)
    loop = LoopStep(module, layout, data, work)
    loop.vector.copy_(layout.flatten(module))
    loop.begin(tell((), {}, {}, layout))
    given = module, layout, data, work, loop.vector, norm
    found: list[Clipped] = [OneByOne(loop, norm), RecordedGradients(*given)]
    if not isinstance(native.library(), str) and name in COMPILED:
        found.append(NativeGradients(*given))
    return module, data, layout, found


@pytest.mark.parametrize(("name", "norm"), [("mlp", 0.4), ("mlp", 100.0), ("lenet", 1.2), ("group_norm", 1.2)])
def test_norms_and_clipped_sums_are_those_of_opacus(name: str, norm: float) -> None:
    module, data, layout, both = gradients(name, norm)
    rows = torch.tensor([0, 3, 4, 17, 30, 41, 48])
    with warnings.catch_warnings(), single_thread():
        warnings.simplefilter("ignore")  # its hooks, on inputs that need no gradient
        module = copy.deepcopy(module)
        for part in module.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = False  # its hooks forbid that
        wrapped = GradSampleModule(module, loss_reduction="sum")
        inner = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        theirs = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=norm, expected_batch_size=1)
        functional.cross_entropy(wrapped(data.prepare(data.x[rows])), data.y[rows], reduction="sum").backward()
        each = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], 1)
        theirs.clip_and_accumulate()
    expected = {n.removeprefix("_module."): p.summed_grad for n, p in wrapped.named_parameters()}
    for clipped in both:
        with clipped.mode():
            total, norms, losses = clipped(rows)
        torch.testing.assert_close(norms, each.norm(dim=1), rtol=1e-5, atol=1e-6)
        for parameter, g in expected.items():
            torch.testing.assert_close(total[layout.offsets[parameter]].view_as(g), g, rtol=1e-5, atol=1e-5)
        assert len(losses) == len(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_without_noise_and_clipping_a_step_on_all_examples_is_that_of_gradient_descent(name: str, backend: str) -> None:
    case = TRAINED[name]
    plain = replace(work_of(case, stopping=build("stopping", "steps", steps=1)), batch_size=max(COUNTS))
    expected = outcomes("loop", case, plain)
    found = outcomes(backend, case, noised(plain, norm=1e6, noise=0.0, reproducible=False))
    for client, want in expected.items():
        assert found[client].loss == pytest.approx(want.loss, rel=1e-5)
        torch.testing.assert_close(found[client].delta, want.delta, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_of_a_step_has_the_deviation_that_it_says(backend: str) -> None:
    """Of a loss that passes over all labels: all that moves the model is noise, also where nobody is drawn."""
    module, data = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 4)),
        data_of(CASES["mlp"], (40,)),
    )
    data.y.fill_(-100)
    work = noised(work_of(CASES["mlp"], stopping=build("stopping", "steps", steps=1)), norm=3.0, noise=0.5)
    for size in (1, 8, 64):
        layout = Layout.of(module)
        trainer = make_trainer(backend, module, layout, data, replace(work, batch_size=size), workers=1)
        (done,) = trainer.train(layout.flatten(module), [Task(0, Key(size))])
        expected = work.lr * 0.5 * 3.0 / min(size, 40)
        columns = done.delta.numel()
        assert float(done.delta.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * columns))
        assert abs(float(done.delta.mean())) < 5 * expected / math.sqrt(columns)


def test_draws_are_poisson_samples() -> None:
    """Counts have their mean and variance, every example its share, and each pair of them the product of two."""
    count, expected, times = 50, 8, 4000
    noise, q = Noise(Key(4)), 8 / 50
    chosen = torch.zeros(times, count)
    for row in chosen:
        row[drawn(noise, count, expected)] = 1
    counts = chosen.sum(1)
    assert abs(float(counts.mean()) - expected) < 5 * math.sqrt(count * q * (1 - q) / times)
    assert float(counts.var()) == pytest.approx(count * q * (1 - q), rel=5 * math.sqrt(2 / times))
    shares = chosen.mean(0)
    assert float((shares - q).abs().max()) < 5 * math.sqrt(q * (1 - q) / times)
    centred = (chosen - q) / math.sqrt(q * (1 - q))
    products = (centred.T @ centred / times).fill_diagonal_(0)
    assert float(products.abs().max()) < 5.5 / math.sqrt(times)
    assert drawn(noise, 5, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_counts_as_zero_and_nobody_hears_of_it(backend: str) -> None:
    """Of client 2 a loss is NaN; of client 3 one is finite, and its slope is not (no kernel has one)."""
    data = data_of(CASES["mlp"])
    x = data.x.float()
    x[data.offsets[2] + 1] = math.nan
    if backend != "native":
        x[data.offsets[3] + 1] = 127.5
    work = noised(work_of(CASES["mlp"], stopping=build("stopping", "epochs", epochs=4)))
    found = outcomes(backend, Case(mlp if backend == "native" else Root), work, replace(data, x=x))
    oracle = outcomes("loop", Case(mlp if backend == "native" else Root), work, replace(data, x=x))
    for client, one in found.items():
        assert one.failure is None
        assert math.isfinite(one.loss)
        assert torch.allclose(one.delta, oracle[client].delta, rtol=1e-3, atol=1e-5)


class Differing(nn.Module):
    """A linear layer over two places whose outputs are subtracted: what the places add to its gradient cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1).view(len(x), 2, 32))
        return self.out(h[:, 0] - h[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_cancels_is_scaled_down_all_the_same(backend: str) -> None:
    """Two places alike but for little: Gram matrices would lose the norm in what they take away from each other."""
    case = Case(Differing)
    data = data_of(case)
    x = data.x.float().flatten(1)
    x = 1e4 * torch.cat([x[:, :32], x[:, :32] * (1 + 1e-4)], 1)
    data = replace(data, x=x.view(data.x.shape))
    module, work = module_of(case), noised(work_of(case), norm=0.5)
    layout = Layout.of(module)
    if backend == "native" and (why := fits(backend, module, layout, data, work)):
        pytest.skip(why)
    loop = LoopStep(module, layout, data, work)
    loop.vector.copy_(layout.flatten(module))
    loop.begin(tell((), {}, {}, layout))
    kind = {"loop": OneByOne, "traced": RecordedGradients, "native": NativeGradients}[backend]
    clipped = kind(loop, 0.5) if backend == "loop" else kind(module, layout, data, work, loop.vector, 0.5)
    with clipped.mode():
        for row in range(8):
            total, _, _ = clipped(torch.tensor([row]))
            assert float(total.norm()) <= 0.5 * (1 + 2.0**-16)


def test_auto_is_the_fastest_that_fits() -> None:
    fastest = "traced" if isinstance(native.library(), str) else "native"
    for name, chosen in (
        ("mlp", fastest),
        ("lenet", fastest),
        ("attention", "traced"),
        ("dropout", "loop"),
        ("reused", "loop"),
    ):
        case = {**CASES, **TRAINED, "reused": Case(Reused)}[name]
        module = module_of(case)
        trainer = make_trainer("auto", module, Layout.of(module), data_of(case), noised(work_of(case)))
        assert trainer.name == chosen


def test_clients_side_by_side_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"backend 'rows' does not fit this model: .* Poisson's sampling; write 'auto'"
    ):
        outcomes("rows", CASES["mlp"], noised(work_of(CASES["mlp"])))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (CASES["batch_norm"].make, "layer 'norm1': BatchNorm mixes examples.*: use GroupNorm"),
        (CASES["counter"].make, "buffer '(steps|average)' changes with the examples"),
        (lambda: Mixing(), "output for an example depends on the others"),
    ],
)
def test_models_that_mix_or_remember_examples_are_refused(
    make: Callable[[], nn.Module], said: str, backend: str
) -> None:
    with pytest.raises(InputError, match=said):
        outcomes(backend, Case(make), noised(work_of(CASES["mlp"])))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stopping": "plateau(epsilon=0.1)"}, "train.stopping = .* looks at losses"),
        ({"stopping": "early"}, "train.stopping = .* looks at losses"),
        ({"objective": "ditto(lam=1.0)"}, "train.objective = .*: write 'plain'"),
        ({"private_first": "epochs"}, "train.private_first = .*: leave it out"),
    ],
)
def test_work_that_would_tell_of_examples_is_refused(changes: dict[str, str], said: str) -> None:
    rules = {name: parse("stopping" if name == "private_first" else name, text) for name, text in changes.items()}
    with pytest.raises(InputError, match=said):
        noised(replace(work_of(CASES["mlp"]), **rules))


@pytest.mark.parametrize(("norm", "noise"), [(0.0, 1.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, -0.1), (1.0, math.nan)])
def test_noise_that_means_nothing_is_refused(norm: float, noise: float) -> None:
    with pytest.raises(InputError, match="is not valid: write a norm above 0"):
        noised(work_of(CASES["mlp"]), norm, noise)


@compiled
def test_compiled_normals_equal_the_others_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Noise(Key(2)).words(20_000)
    edges = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63), 2**62, -(2**62), 2**61, 3 * 2**61, -3 * 2**61])
    words[: len(edges)], words[10_000 : 10_000 + len(edges)] = edges, edges.flip(0)
    found = normals(words)
    monkeypatch.setattr(native, "library", lambda: "as if they were not built")
    torch.testing.assert_close(found, normals(words), rtol=1e-13, atol=1e-14)
    assert float(found.view(2, -1).norm(dim=0).max()) == pytest.approx(math.sqrt(128 * math.log(2)))


def test_normals_are_normal() -> None:
    found = Noise(Key(9)).normals(200_001)
    assert found.shape == (200_001,)
    below = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    shares = torch.stack([(found < x).double().mean() for x in torch.special.ndtri(below)])
    assert bool(((shares - below).abs() < 5 * (below * (1 - below) / len(found)).sqrt()).all())
    halves = found[:200_000].view(2, -1)
    assert abs(float((halves[0] * halves[1]).mean())) < 5 / math.sqrt(100_000)
