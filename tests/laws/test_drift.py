"""Every method against drift on heterogeneous quadratics with unequal steps: where it ends, in closed form.

Linear regressions of a few clients with full batches: f_i(w) = |X_i w - y_i|^2 / n_i = (w - b_i)' H_i (w - b_i) / 2 +
const. Client i takes K_i steps of w <- w - lr H_i (w - b_i) + ..., so that a round is an affine map of the model, whose
fixed point numpy finds. The federation is the real one: simulator, wire, server.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.core.registry import build, parse, rule
from fedkeel.core.types import ClientMemory, Closed, ServerState
from fedkeel.round import plan as plan_module
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation
from fedkeel.world.pool import Pool

CLIENTS, P, LR = 5, 3, 0.05
COUNTS = (6, 9, 12, 15, 18)
STEPS = (1, 2, 4, 6, 9)
Matrix = NDArray[np.float64]


def tables() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(n, P, generator=generator) for n in COUNTS]
    optima = torch.randn(CLIENTS, P, generator=generator) * 2
    return xs, [x @ w + 0.1 * torch.randn(len(x), generator=generator) for x, w in zip(xs, optima, strict=True)]


@rule("source", name="test_quadratics")
def quadratics(key: fedkeel.Key) -> Pool:
    """Regressions whose clients disagree (tests)."""
    xs, ys = tables()
    x, y = torch.cat(xs), torch.cat(ys)[:, None]
    group = torch.repeat_interleave(torch.arange(CLIENTS), torch.tensor(COUNTS))
    return Pool(x, y, x[:2], y[:2], 0, group=group, group_names=tuple(f"c{i}" for i in range(CLIENTS)))


@rule("model", name="test_linear")
def linear(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """w without a bias, from 0 (tests)."""
    module = nn.Linear(inputs[0], 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


@rule("stopping", name="test_unequal", traits=("static",))
def unequal(num_examples: int, batch_size: int, losses: Sequence[float], *, times: int = 1) -> int:
    """As many steps as the client's place in the table says (tests)."""
    return times * STEPS[COUNTS.index(num_examples)]


class Silent:
    refused = 0

    def round(self, report) -> None:
        self.last = report
        self.refused += len(report.refused)

    def metrics(self, *args) -> None: ...
    def checkpoint(self, *args) -> None: ...


def simulate(rounds: int = 120, **sections) -> tuple[Simulator, ServerState]:
    # At a fixed point honest updates repeat bit for bit: no check 'replayed' here.
    aggregate = {"checks": ("claims", "finite"), "weigh": ("equal",)} | sections.pop("aggregate", {})
    train = {"batch_size": 100, "lr": LR, "stopping": "test_unequal", "backend": "loop", "workers": 1}
    job = fedkeel.Job(
        rounds=rounds,
        data={"source": "test_quadratics", "partition": "natural", "clients": CLIENTS},
        model={"build": "test_linear", "loss": "mse"},
        record={"evaluate_every": rounds, "checkpoint_every": rounds},
        **{**sections, "aggregate": aggregate, "train": train | sections.get("train", {})},
    )
    federation = Federation.of(job)
    simulator = Simulator(federation, federation.trainer(), ServerState(federation.theta()), ClientMemory(), Silent())
    return simulator, simulator.run()


def ends(rounds: int = 120, **sections) -> Matrix:
    return simulate(rounds, **sections)[1].theta.double().numpy()


def corrected(text: str, **sections) -> dict:
    return {"train": {"corrections": (text,)}, **sections}


def bowls() -> tuple[list[Matrix], list[Matrix]]:
    """H_i and b_i."""
    xs, ys = tables()
    H = [2 * (x.T @ x).double().numpy() / len(x) for x in xs]
    b = [np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0] for x, y in zip(xs, ys, strict=True)]
    return H, b


def optimum(shares: Sequence[float] = (1 / CLIENTS,) * CLIENTS) -> Matrix:
    H, b = bowls()
    weighed = [(p * h, p * h @ at) for p, h, at in zip(shares, H, b, strict=True)]
    return np.linalg.solve(sum(h for h, _ in weighed), sum(v for _, v in weighed))


def averaged_fixed_point(lr: float = LR, mu: float = 0.0, *, by_steps: bool = False, times: int = 1) -> Matrix:
    """Where sum_i s_i (w_i(w) - w) = 0, w_i(w) being client i's model after its steps from w; s_i 1, or 1 / K_i."""
    A, v = np.zeros((P, P)), np.zeros(P)
    for h, b, k in zip(*bowls(), STEPS, strict=True):
        held = h + mu * np.eye(P)
        shrink = np.linalg.matrix_power(np.eye(P) - lr * held, times * k)
        inverse = np.linalg.inv(held)
        scale = 1 / k if by_steps else 1.0
        # w_i = s + shrink (w - s), s = inverse (h b + mu w)
        A += scale * ((np.eye(P) - shrink) @ (np.eye(P) - mu * inverse))
        v += scale * ((np.eye(P) - shrink) @ inverse @ h @ b)
    return np.linalg.solve(A, v)


def test_fedavg_is_biased_by_the_known_amount() -> None:
    np.testing.assert_allclose(ends(), averaged_fixed_point(), atol=2e-5)
    assert np.linalg.norm(averaged_fixed_point() - optimum()) > 0.1


def test_fedprox_ends_at_its_fixed_point() -> None:
    for mu in (0.5, 5.0):
        at = ends(120, **corrected(f"fedprox(mu={mu})"))
        np.testing.assert_allclose(at, averaged_fixed_point(mu=mu), atol=5e-5)


@pytest.mark.parametrize(
    "sections",
    [
        corrected("scaffold"),
        corrected("scaffold", select={"cohort": 2}),
        corrected("scaffold", server={"optimiser": "momentum(lr=0.5, beta=0.5)"}),
        {"train": {"corrections": ("scaffold",), "optimiser": "sgd(momentum=0.5)"}},
        {"train": {"corrections": ("fedprox(mu=0.3)", "scaffold")}},
        corrected("feddyn(alpha=0.7)", server={"optimiser": "feddyn(alpha=0.7)"}),
        corrected("feddyn(alpha=0.7)", server={"optimiser": "feddyn(alpha=0.7)"}, select={"cohort": 2}),
    ],
    ids=str,
)
def test_scaffold_and_feddyn_end_at_the_optimum(sections) -> None:
    slow = "feddyn" in str(sections)
    np.testing.assert_allclose(ends(700 if slow else 300, **sections), optimum(), atol=1e-4)


def test_scaffold_under_weights_ends_at_the_weighted_optimum() -> None:
    at = ends(200, **corrected("scaffold", aggregate={"weigh": ("examples",)}))
    np.testing.assert_allclose(at, optimum([n / sum(COUNTS) for n in COUNTS]), atol=1e-4)


def test_fednova_ends_at_its_fixed_point_which_is_consistent_as_the_learning_rate_falls() -> None:
    np.testing.assert_allclose(ends(aggregate={"mix": ("fednova",)}), averaged_fixed_point(by_steps=True), atol=5e-5)
    nova, plain = (
        [float(np.linalg.norm(averaged_fixed_point(lr, by_steps=by_steps) - optimum())) for lr in (0.04, 0.004, 0.0004)]
        for by_steps in (True, False)
    )
    assert nova[1] < 0.15 * nova[0]  # of first order in lr
    assert nova[2] < 0.15 * nova[1]
    assert min(plain) > 0.8 * max(plain) > 4 * max(nova)  # stays


def test_fedcm_ends_at_its_fixed_point() -> None:
    """The model w and the mean step c: sum_i D_i = 0 and c = mean(-D_i / (lr K_i)), D_i = w_i(w, c) - w."""
    alpha, eye = 0.2, np.eye(P)
    A, v = np.zeros((2 * P, 2 * P)), np.zeros(2 * P)
    A[P:, P:] = eye
    for h, b, k in zip(*bowls(), STEPS, strict=True):
        moved = np.linalg.matrix_power(eye - alpha * LR * h, k) - eye  # D_i = moved @ (w - b + to_c @ c)
        to_c = (1 - alpha) / alpha * np.linalg.inv(h)
        for rows, scale in ((slice(0, P), 1.0), (slice(P, 2 * P), 1 / (LR * k * CLIENTS))):
            A[rows, :P] += scale * moved
            A[rows, P:] += scale * moved @ to_c
            v[rows] += scale * moved @ b
    at = np.linalg.solve(A, v)
    _, state = simulate(400, **corrected(f"fedcm(alpha={alpha})"))
    found = np.concatenate([state.theta.double().numpy(), state.control["fedcm"].double().numpy()])
    np.testing.assert_allclose(found, at, atol=1e-4)


@pytest.mark.parametrize("optimiser", ["sgd(momentum=0.9)", "sgd(momentum=0.7, nesterov=True)", "sgd"])
@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_what_steps_are_worth_is_what_they_move_the_model_by(optimiser: str, mu: float) -> None:
    """Against the paper's formulas, and against the coefficients of each step's gradient, one by one."""
    rules = (build("correction", "fedprox", mu=mu),) if mu else ()
    ce, stop = build("loss", "mse"), build("stopping", "epochs")
    work = fedkeel.train.LocalWork(1, 0.1, stop, ce, rules, parse("optimiser", optimiser))
    steps = torch.tensor([1.0, 2.0, 7.0, 40.0])
    coefficients = []
    for k in steps.long().tolist():
        total = 0.0
        for at in range(k):  # a gradient of 1 in one step alone
            theta, clock = torch.zeros(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            slots = [torch.zeros(1, dtype=torch.float64) for _ in work.slots]
            for step in range(k):
                g = torch.full((1,), float(step == at), dtype=torch.float64) + mu * theta
                work.optimiser(theta, g, slots, clock, 0.1)
            total += -float(theta) / 0.1
        coefficients.append(total)
    torch.testing.assert_close(work.worth(steps), torch.tensor(coefficients, dtype=torch.float64), rtol=1e-10, atol=0)
    if optimiser == "sgd(momentum=0.9)" and not mu:
        rho, tau = 0.9, steps.double()
        torch.testing.assert_close(work.worth(steps), (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))
    if optimiser == "sgd" and mu:
        torch.testing.assert_close(work.worth(steps), (1 - (1 - 0.1 * mu) ** steps.double()) / (0.1 * mu))
    far = work.worth(torch.tensor([30_000.0, 60_000.0]))  # beyond what is measured
    assert torch.isfinite(far).all()
    assert far[1] >= far[0] > work.worth(torch.tensor([19_000.0]))[0] - 1e-9


def mean_kept(simulator: Simulator, state: ServerState) -> Tensor:
    """The mean of the clients' c_i, settled."""
    total = torch.zeros(P)
    for client in simulator.federation.names:
        fedkeel.round.device.recall(client, state.trust["used"].get(client), simulator.memory)
        total += simulator.memory.of(client).get("correction/scaffold", torch.zeros(P))
    return total / CLIENTS


@pytest.mark.parametrize("codec", ["float32", "int4", "top_k(share=0.67)"])
def test_the_servers_control_is_the_mean_of_the_clients_where_updates_are_refused_and_clients_sampled(codec) -> None:
    """The invariant that SCAFFOLD's fixed point rests on: c = mean(c_i), whatever is lost on the way, bits included."""
    simulator, state = simulate(
        37,
        **corrected("scaffold"),
        select={"cohort": 3},
        client={"codec": codec},
        aggregate={"checks": ("claims", "finite", "norm_bound(limit=1.2)")},
    )
    assert simulator.recorder.refused > 5
    assert len(state.trust["used"]) > 1
    torch.testing.assert_close(state.control["scaffold"], mean_kept(simulator, state), atol=1e-5, rtol=1e-5)


def test_the_shift_of_scaffold_has_its_sign() -> None:
    """The step is g - c_i + c; reversed, as it once was in a well-known project, the federations above diverge."""
    shift = build("correction", "scaffold").hook("shift")
    assert shift is not None
    c_i, c = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 5.0])
    assert torch.equal(shift(c_i, c), torch.tensor([-0.5, 3.0]))


def test_adaptive_fedprox_raises_mu_when_the_loss_rises_and_lowers_it_after_patience() -> None:
    rule = build("correction", "adaptive_fedprox", mu=0.2, step=0.1, patience=3)
    hook, c, seen = rule.hook("control"), rule.init(), []
    assert hook is not None
    for loss in (5.0, 6.0, 5.0, 4.0, 3.0, 2.9, 2.9, 2.8, float("nan"), 1.0):
        c = hook(c, Closed(torch.zeros(1), 1.0, loss, lambda: torch.zeros(1)))
        seen.append(round(float(c[0]), 6))
    assert seen == [0.2, 0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
    g, theta, theta0 = torch.ones(2), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(rule(g, theta, theta0, None, torch.tensor([0.5, 9.0, 9.0])), torch.tensor([1.5, 2.0]))


def test_adaptive_fedprox_moves_in_a_federation() -> None:
    _, state = simulate(30, **corrected("adaptive_fedprox(mu=1.0, patience=2)"))
    assert float(state.control["adaptive_fedprox"][0]) not in (0.0, 1.0)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (corrected("feddyn(alpha=0.1)"), r"half of a method: name 'feddyn\(alpha=0.1\)' under server.optimiser"),
        ({"server": {"optimiser": "feddyn(alpha=0.1)"}}, "under train.corrections as well"),
        (corrected("feddyn(alpha=0.1)", server={"optimiser": "feddyn(alpha=0.2)"}), "half of a method"),
        ({"aggregate": {"mix": ("bucketing(size=2)", "fednova")}}, "name it first in aggregate.mix"),
        ({"train": {"corrections": ("scaffold", "scaffold")}}, "written twice"),
    ],
    ids=str,
)
def test_what_can_not_be_meant_is_refused_before_training(sections, words) -> None:
    with pytest.raises(InputError, match=words):
        simulate(1, **sections)


def test_the_bytes_sent_down_count_what_corrections_take() -> None:
    for text, vectors in (("none", 1), ("scaffold", 2), ("fedcm", 2), ("fedprox(mu=1.0)", 1)):
        simulator, _ = simulate(1, **corrected(text))
        assert simulator.recorder.last.bytes_down == 4 * P * vectors * CLIENTS


@pytest.mark.parametrize("sections", [corrected("scaffold", select={"cohort": 3}), corrected("fedcm")], ids=str)
def test_a_streamed_mean_moves_the_control_as_the_matrix_does(sections, monkeypatch) -> None:
    kept = simulate(9, **sections)[1]
    monkeypatch.setattr(plan_module, "STREAM_ABOVE", 0)
    streamed = simulate(9, **sections)[1]
    torch.testing.assert_close(streamed.theta, kept.theta)
    for name, vector in kept.control.items():
        torch.testing.assert_close(streamed.control[name], vector)


def test_adam_with_decay_and_scaffold_keeps_c_the_mean_of_the_c_i() -> None:
    """Under an optimiser that is not linear a step is worth a step, whatever is added to the gradient."""
    train = {"optimiser": "adam", "lr": 0.01, "corrections": ("l2(coef=0.0001)", "scaffold")}
    simulator, state = simulate(60, train=train)
    torch.testing.assert_close(state.control["scaffold"], mean_kept(simulator, state), atol=1e-4, rtol=1e-4)
    assert float((state.theta - torch.from_numpy(optimum()).float()).norm()) < 1.5


def test_a_cap_on_the_rows_meets_updates_and_not_gradients_when_the_control_moves() -> None:
    far = {"aggregate": {"mix": ("norm_cap(norm=1000.0)",)}}
    free, capped = (simulate(12, **corrected("scaffold"), **mix)[1] for mix in ({}, far))
    torch.testing.assert_close(capped.control["scaffold"], free.control["scaffold"])
    near = {"aggregate": {"mix": ("norm_cap(norm=0.2)",)}}
    one = simulate(1, **corrected("scaffold"), **near)[1].control["scaffold"]
    mean = torch.tensor(STEPS).double().mean()
    assert float(one.norm()) == pytest.approx(0.2 / (float(mean) * LR), rel=0.5)  # rows of 0.2, in mean steps


def test_what_a_dial_says_does_not_change_what_steps_are_worth() -> None:
    work = Federation.of(fedkeel.Job(train={"corrections": ("adaptive_fedprox(mu=5.0)",)})).work
    assert work.worth(torch.tensor([3.0, -2.0, 2.0**63])).tolist() == pytest.approx([3, 0, 1e12])


@pytest.mark.parametrize(
    ("corrections", "words"),
    [
        (("adaptive_fedprox(mu=1.0)", "adaptive_fedprox(mu=0.5)"), "written twice"),
        (("fedprox(mu=40.0)",), "local steps would swing back"),
        (("test_bad_after",), "hook after raised RuntimeError: boom"),
        (("test_bad_control",), r"hook control gave shape \(1,\), not \(3,\)"),
        (("test_bad_trait",), "has the hook after: give it the trait memory"),
    ],
    ids=str,
)
def test_corrections_that_can_not_work_are_refused_before_training(corrections, words) -> None:
    with pytest.raises(InputError, match=words):
        simulate(1, train={"corrections": corrections})


def test_fedcm_is_refused_with_private_layers() -> None:
    with pytest.raises(InputError, match=r"train.corrections: 'fedcm.*' can not correct private layers"):
        Federation.of(
            fedkeel.Job(
                data={"holdout": 0.2},
                model={"build": "mlp(hidden=(8,))", "private": ("head.*",)},
                train={"corrections": ("fedcm",)},
            )
        )


def boom(*args: object) -> Tensor:
    raise RuntimeError("boom")


for name, traits, hooks in (
    ("test_bad_after", ("memory",), {"after": boom}),
    ("test_bad_control", ("control",), {"control": lambda c, closed: c[:1]}),
    ("test_bad_trait", (), {"after": boom}),
):

    @rule("correction", name=name, traits=traits, hooks=hooks)
    def bad(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
        """Does nothing, with a hook that is wrong (tests)."""
        return g


@rule("correction", name="test_whole")
def whole(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
    """Knows its three columns (tests)."""
    return g * torch.tensor([1.0, 0.5, 1.0])


def test_a_correction_that_looks_at_all_columns_is_no_part_of_what_steps_are_worth() -> None:
    simulator, state = simulate(40, train={"corrections": ("test_whole", "scaffold")})
    assert simulator.federation.work.worth(torch.tensor([4])).tolist() == pytest.approx([4])
    torch.testing.assert_close(state.control["scaffold"], mean_kept(simulator, state), atol=1e-5, rtol=1e-5)


def test_a_rate_that_falls_is_seen_by_clients_and_server_alike() -> None:
    """SCAFFOLD ends at the optimum only if tau * lr is of the round's own lr on both sides; FedAvg nears it."""
    falling = {"lr_schedule": "exponential(factor=0.5, every=20)"}
    at = ends(240, train={"corrections": ("scaffold",), "lr_schedule": "exponential(factor=0.8, every=40)"})
    np.testing.assert_allclose(at, optimum(), atol=2e-3)
    stepped = ends(40, train=falling)
    halves = averaged_after(averaged_after(np.zeros(P), LR, 20), LR / 2, 20)
    np.testing.assert_allclose(stepped, halves, atol=2e-5)


def averaged_after(w: Matrix, lr: float, rounds: int) -> Matrix:
    """FedAvg's model after so many rounds from w."""
    for _ in range(rounds):
        ends_at = [
            b + np.linalg.matrix_power(np.eye(P) - lr * h, k) @ (w - b) for h, b, k in zip(*bowls(), STEPS, strict=True)
        ]
        w = np.mean(ends_at, axis=0)
    return w


@pytest.mark.parametrize(
    ("rate", "factors"),
    [
        ("constant", (1.0, 1.0, 1.0)),
        ("exponential(factor=0.5, every=2)", (1.0, 1.0, 0.5)),
        ("cosine(least=0.2)", (1.0, 0.6, 0.2)),
    ],
)
def test_rates_are_what_they_say(rate: str, factors: tuple[float, ...]) -> None:
    assert [parse("rate", rate)(r, 3) for r in (1, 2, 3)] == pytest.approx(factors)
