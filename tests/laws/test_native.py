"""The compiled kernels: right in every instruction set that this machine has, and never outside their memory."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from train_cases import compiled, tasks_of

import fedkeel.kernels.native as native_module
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.kernels import distance, native, network, order
from fedkeel.train import ClientData, LocalWork, Scale, Task, make_trainer
from fedkeel.train.backends import fits
from fedkeel.train.lower import Lowered
from fedkeel.train.operations import BASES, LOSSES
from fedkeel.train.record import Recorder

pytestmark = compiled
EPS = 2.0**-24


def path() -> Path:
    (found,) = Path(native.__file__).parent.glob("_native*")
    return found


def there(name: str) -> bool:
    try:
        native.Library(path(), name)
    except OSError:
        return False
    finally:
        native.Library(path(), None)
    return True


SETS = [name for name in native.SETS if not isinstance(native.library(), str) and there(name)]


@pytest.fixture(autouse=True)
def _weights_that_stay() -> None:
    """Where a ReLU or a maximum stands on its edge, two right backends may part: not now and then."""
    torch.manual_seed(0)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[native.Library]:
    yield native.Library(path(), request.param)
    native.Library(path(), None)


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of NaN between two runs of a magic number, and the whole of it."""
    size = math.prod(shape)
    whole = torch.full((size + 64,), 12345.0)
    whole[32 : 32 + size] = math.nan
    return whole[32 : 32 + size].view(*shape), whole


def run(library: native.Library, record: object, inputs: dict[str, Tensor], out: Tensor) -> None:
    """Record a function of the inputs that gives a tensor like `out` (n,), and run it as a program into `out`."""
    given = {name: t.clone() for name, t in inputs.items()}
    with Recorder(given) as recorder:
        result = record(**given)
        value = recorder.value(result)
    lowered = Lowered(recorder.graph, value, inputs, len(out), torch.float32, Scale())
    bases, strides = np.zeros((2, len(BASES)), np.int64)
    bases[LOSSES] = out.data_ptr()
    table = lowered.table
    assert library.run(table.ctypes.data, len(table), bases.ctypes.data, strides.ctypes.data, 1) == 0


sizes = st.integers(1, 70)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("turned", ["nt", "nn", "tn"])
@settings(max_examples=60, deadline=None)
@given(m=sizes, n=sizes, k=sizes, start=st.integers(0, 2), alpha=st.sampled_from([1.0, -0.05]), seed=st.integers(0, 99))
def test_a_product_is_right_and_stays_in_its_memory(
    name: str, turned: str, m: int, n: int, k: int, start: int, alpha: float, seed: int
) -> None:
    library = native.Library(path(), name)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator)
    b = torch.randn(k, n, generator=generator)
    row = torch.randn(n, generator=generator)
    out, whole = guarded(m, n)
    before = torch.randn(m, n, generator=generator)
    out.copy_(before)
    left = a.t().contiguous() if turned == "tn" else a
    right = b.t().contiguous() if turned == "nt" else b
    code = ("nt", "nn", "tn").index(turned)
    places = [(0, t.data_ptr(), t.shape[-1]) for t in (left, right, row, row, out)]
    table = np.array([(code, m, n, k, start, alpha, 1.0, 0.0, 0.0, *places)], native.OPERATION)
    bases = np.zeros(len(BASES), np.int64)
    library.run(table.ctypes.data, 1, bases.ctypes.data, bases.copy().ctypes.data, 1)
    native.Library(path(), None)
    begun = (torch.zeros(m, n), row.expand(m, n), before)[start].double()
    exact = begun + alpha * (a.double() @ b.double())
    bound = (k + 3) * EPS * (begun.abs() + abs(alpha) * (a.double().abs() @ b.double().abs())) + 1e-30
    assert bool(((out.double() - exact).abs() <= bound).all())
    assert bool((whole[:32] == 12345).all())
    assert bool((whole[-32:] == 12345).all())


SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1e-8,
    0.3,
    -0.624,
    0.626,
    5.0,
    -9.0,
    30.0,
    87.9,
    -88.0,
    1e4,
    -1e38,
    math.inf,
    -math.inf,
]


@pytest.mark.parametrize("function", ["relu", "tanh", "sigmoid"])
def test_an_activation_is_torchs_to_a_few_units_whatever_the_input(
    instruction_set: native.Library, function: str
) -> None:
    x = torch.cat([torch.tensor([*SPECIAL, math.nan]), torch.linspace(-20, 20, 4001)])
    out, _ = guarded(len(x))
    run(instruction_set, lambda x_: getattr(torch, function)(x_), {"x_": x}, out)
    torch.testing.assert_close(out, getattr(torch, function)(x), rtol=6e-7, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("width", [1, 2, 10, 33])
def test_log_softmax_is_torchs_whatever_the_logits(instruction_set: native.Library, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=generator) * 30
    x[0], x[1, 0], x[2], x[3, -1], x[4] = 0, math.inf, -1e38, math.nan, 1e38
    x[5, 0] = -math.inf
    out, _ = guarded(x.numel())
    run(instruction_set, lambda x_: torch.log_softmax(x_, 1).view(-1), {"x_": x}, out)
    torch.testing.assert_close(out.view(64, width), torch.log_softmax(x, 1), rtol=1e-5, atol=2e-6, equal_nan=True)


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def data_for(width: int, classes: int, dtype: torch.dtype, counts: tuple[int, ...] = (41, 7, 20)) -> ClientData:
    generator = torch.Generator().manual_seed(width)
    n = sum(counts)
    x = torch.randn(n, width, generator=generator)
    x = (x * 40 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    scale = Scale(128.0, 1 / 40) if dtype == torch.uint8 else Scale()
    y = torch.randint(0, classes, (n,), generator=generator)
    return ClientData(x, y, torch.tensor([0, *counts]).cumsum(0), scale)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize(
    ("widths", "batch", "dtype", "bias"),
    [
        ((64, 48, 32, 10), 20, torch.uint8, True),
        ((17, 5, 3), 7, torch.float32, True),
        ((50, 1, 2), 1, torch.float32, True),  # products of one row, one column
        ((33, 100, 10), 64, torch.float64, False),  # prepared, not gathered
        ((5, 3), 41, torch.uint8, True),
    ],
)
def test_a_perceptron_trains_as_by_the_loop(
    instruction_set: native.Library,
    widths: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    bias: bool,
    act: type[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_module, "library", lambda: instruction_set)
    module, data = mlp(*widths, act=act, bias=bias), data_for(widths[0], widths[-1], dtype)
    layout = Layout.of(module)
    epochs, loss = build("stopping", "epochs", epochs=2), build("loss", "cross_entropy")
    theta, tasks = layout.flatten(module), tasks_of(data, layout)
    for corrections in ((), (build("correction", "l2", coef=0.3),)):
        work = LocalWork(batch, 0.1, epochs, loss, corrections)
        expected = {
            t.client: (t.delta.clone(), t.loss)
            for t in make_trainer("loop", module, layout, data, work, workers=1).train(theta, tasks)
        }
        for one in make_trainer("native", module, layout, data, work, workers=1).train(theta, tasks):
            delta, value = expected[one.client]
            torch.testing.assert_close(one.delta, delta, rtol=1e-4, atol=3e-6)
            assert one.loss == pytest.approx(value, rel=1e-5)


def test_an_ignored_label_counts_for_nothing_and_an_unknown_one_ends_the_client() -> None:
    module = mlp(6, 4, 3)
    data = data_for(6, 3, torch.float32, (12, 12))
    layout, loss = Layout.of(module), build("loss", "cross_entropy")
    data.y[20] = -100
    data.y[8] = 3  # not among the few that make_trainer tries
    work = LocalWork(4, 0.1, build("stopping", "epochs"), loss)
    theta, tasks = layout.flatten(module), tasks_of(data, layout)
    found = {}
    for backend in ("loop", "native"):
        trainer = make_trainer(backend, module, layout, data, work, workers=1)
        found[backend] = {t.client: (t.failure, t.delta.clone()) for t in trainer.train(theta, tasks)}
    assert found["native"][1][0] is None
    torch.testing.assert_close(found["native"][1][1], found["loop"][1][1], rtol=1e-4, atol=1e-6)
    assert str(found["native"][0][0]).startswith("the training step raised IndexError: a label of batch")
    assert str(found["loop"][0][0]).startswith("the training step raised IndexError")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.GELU()),
            "the compiled kernels have no gelu, gelu_backward",
        ),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 6), nn.Flatten()), "convolution"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), "dropout|bernoulli"),
    ],
    ids=["gelu", "convolution", "dropout"],
)
def test_what_has_no_kernel_is_refused_by_name(make: object, reason: str) -> None:
    module = make()
    data = data_for(6, 3, torch.float32)
    work = LocalWork(4, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    found = fits("native", module, Layout.of(module), data, work)
    assert found is not None
    assert any(part in found for part in reason.split("|")), found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=200))
def test_a_squared_norm_is_the_same_in_every_instruction_set_and_right(values: list[float]) -> None:
    x = np.array(values, np.float32)
    found = {native.Library(path(), name).sq_norm(x.ctypes.data, len(x)) for name in SETS}
    native.Library(path(), None)
    assert len(found) == 1
    assert found.pop() == pytest.approx(math.fsum(float(v) ** 2 for v in x), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_squared_norm_shows_what_is_not_finite(instruction_set: native.Library, bad: float) -> None:
    for at in (0, 40, 99):
        x = np.ones(100, np.float32)
        x[at] = bad
        assert not math.isfinite(instruction_set.sq_norm(x.ctypes.data, 100))


def test_without_the_kernels_the_same_norm_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    compiled_norm = distance.sq_norm(row)
    for wanted, why in (("off", "FEDKEEL_NATIVE=off turns"), ("sse9", "names no instruction set: write off, avx512")):
        native.library.cache_clear()
        monkeypatch.setenv("FEDKEEL_NATIVE", wanted)
        assert why in str(native.library())
        assert distance.sq_norm(row) == pytest.approx(compiled_norm, rel=1e-6)
        module, data = nn.Linear(6, 3), data_for(6, 3, torch.float32)
        work = LocalWork(4, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
        assert why in str(fits("native", module, Layout.of(module), data, work))
    monkeypatch.undo()
    native.library.cache_clear()


def test_a_library_from_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "ABI", native.ABI + 1)
    native.library.cache_clear()
    assert "other sources" in str(native.library())
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 21, 64, 128])
def test_a_selection_gives_the_same_bits_as_without_the_kernel(
    instruction_set: native.Library, n: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(n)
    U = torch.randn(n, columns, generator=generator)
    U[:, ::3] = U[:, ::3].round()  # ties
    U[generator.initial_seed() % n, columns // 2] = math.nan
    U[0, columns // 3], U[-1, columns // 4] = math.inf, -1e-40
    for trim in sorted({0, 1, n // 5, (n - 1) // 2}):
        if 2 * trim >= n:
            continue
        found = []
        for library in (instruction_set, "none"):
            monkeypatch.setattr(native_module, "library", lambda library=library: library)
            found.append(order.trimmed_mean(U, trim))
        assert torch.equal(found[0].nan_to_num(7.5), found[1].nan_to_num(7.5))
        assert torch.equal(found[0].isnan(), found[1].isnan())


def test_a_selection_writes_its_own_columns_only(instruction_set: native.Library) -> None:
    U, (out, whole) = torch.randn(5, 300), guarded(300)
    rows = [U[i].data_ptr() for i in range(5)]
    order._compiled(instruction_set, rows, network.plan(5, 2), 0, out)
    torch.testing.assert_close(out, U.median(0).values, rtol=0, atol=0)
    assert bool((whole[:32] == 12345).all())
    assert bool((whole[-32:] == 12345).all())


@pytest.mark.parametrize("origin", [None, 2])
@pytest.mark.parametrize(("n", "columns"), [(3, 1), (4, 1023), (5, 1025), (23, 5000)])
def test_inner_products_are_right(instruction_set: native.Library, n: int, columns: int, origin: int | None) -> None:
    U = torch.randn(n, columns, generator=torch.Generator().manual_seed(n)) + 3
    centred = U.double() - (U.double().mean(0) if origin is None else U[origin].double())
    found = distance._compiled_gram(instruction_set, U, range(n), origin)
    exact = centred @ centred.T
    assert torch.equal(found, found.T)
    scale = exact.diagonal().max()
    torch.testing.assert_close(found / scale, exact / scale, rtol=0, atol=1e-6)  # the offset costs two bits


def test_the_mean_around_the_median_has_the_same_bits_for_the_smallest_numbers(
    instruction_set: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e-45, 1e-38, math.inf])
    U = values[torch.randint(0, 7, (8, 4000), generator=generator)]
    found = []
    for library in (instruction_set, "none"):
        monkeypatch.setattr(native_module, "library", lambda library=library: library)
        found.append(order.mean_around_median(U, 5))
    assert torch.equal(found[0], found[1])


def test_a_layer_of_no_width_trains_or_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: there is nothing to initialise
        module = nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 3))
    data = data_for(6, 3, torch.float32)
    layout, work = Layout.of(module), LocalWork(4, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    trainer = make_trainer("auto", module, layout, data, work, workers=1)
    assert all(t.failure is None for t in trainer.train(layout.flatten(module), tasks_of(data, layout)))


def test_one_label_that_the_model_does_not_have_does_not_stop_the_others() -> None:
    module, data = mlp(6, 4, 3), data_for(6, 3, torch.float32, (30, 30))
    data.y[2] = -5  # among the rows that a step is recorded on
    layout, work = Layout.of(module), LocalWork(20, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    for backend in ("loop", "auto"):
        trainer = make_trainer(backend, module, layout, data, work, workers=1)
        found = {t.client: t.failure for t in trainer.train(layout.flatten(module), tasks_of(data, layout))}
        assert "IndexError" in str(found[0])
        assert found[1] is None


def convolutional(channels: int, widths: tuple[int, int], kernel: tuple[int, int], pad: int, pool: int) -> nn.Module:
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(channels, first, kernel, padding=pad), nn.ReLU(), nn.MaxPool2d(pool),
        nn.Conv2d(first, second, kernel[::-1], padding=pad, bias=False), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 15, 17, 40])
@pytest.mark.parametrize(
    ("channels", "widths", "kernel", "pad", "pool"),
    [
        (1, (6, 16), (5, 5), 0, 2),
        (3, (9, 7), (3, 3), 1, 2),
        (2, (1, 2), (1, 2), 0, 1),
        (1, (8, 3), (4, 2), 1, 3),
        (1, (13, 4), (2, 6), 1, 2),
    ],
)
def test_convolutions_train_as_by_the_loop_and_stay_in_their_memory(
    instruction_set: native.Library,
    channels: int,
    widths: tuple[int, int],
    kernel: tuple[int, int],
    pad: int,
    pool: int,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rooms: list[tuple[np.ndarray, int]] = []

    def room(self: Lowered, size: int) -> int:
        kept = np.full(size + 256, 0xA5, np.uint8)
        start = -(-(kept.ctypes.data + 64) // 64) * 64 - kept.ctypes.data
        rooms.append((kept, start + size))
        kept[start : start + size] = 0xFF  # NaN: what is read before it is written shows
        return kept.ctypes.data + start

    monkeypatch.setattr(Lowered, "_room", room)
    module = convolutional(channels, widths, kernel, pad, pool)
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(41 + 7, channels, 17, 15, generator=generator)
    module(x[:1])
    y = torch.randint(0, 4, (len(x),), generator=generator)
    data = ClientData(x, y, torch.tensor([0, 41, 48]), Scale(0.5, 2.0))
    layout, work = Layout.of(module), LocalWork(batch, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    theta = layout.flatten(module)
    tasks = [Task(client, Key.root(client)) for client in range(2)]
    found, expected = (
        {t.client: t.delta.clone() for t in make_trainer(b, module, layout, data, work, workers=1).train(theta, tasks)}
        for b in ("native", "loop")
    )
    for client in expected:
        torch.testing.assert_close(found[client], expected[client], rtol=1e-3, atol=2e-5)
    assert rooms
    for kept, end in rooms:
        start = -(-(kept.ctypes.data + 64) // 64) * 64 - kept.ctypes.data
        assert (kept[:start] == 0xA5).all()
        assert (kept[end:] == 0xA5).all()


def test_a_pooling_takes_the_first_of_equals_as_torch_does(instruction_set: native.Library) -> None:
    x = torch.randint(0, 3, (5, 2, 4, 6), generator=torch.Generator().manual_seed(1)).float()
    module = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    data = ClientData(x, torch.arange(5) % 3, torch.tensor([0, 5]))
    layout, work = Layout.of(module), LocalWork(5, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    deltas = [
        next(iter(make_trainer(b, module, layout, data, work).train(layout.flatten(module), [Task(0, Key.root(0))])))
        for b in ("native", "loop")
    ]
    torch.testing.assert_close(deltas[0].delta, deltas[1].delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(1, 3, 3, stride=2),
        lambda: nn.Conv2d(1, 3, 3, dilation=2),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, stride=2)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, ceil_mode=True)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2)),
    ],
)
def test_a_convolution_that_has_no_kernel_is_refused(make: Callable[[], nn.Module]) -> None:
    module = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(4))
    x = torch.rand(12, 1, 9, 9)
    module(x)
    data = ClientData(x, torch.arange(12) % 4, torch.tensor([0, 12]))
    work = LocalWork(4, 0.1, build("stopping", "epochs"), build("loss", "cross_entropy"))
    assert "compiled kernel" in (fits("native", module, Layout.of(module), data, work) or "")
