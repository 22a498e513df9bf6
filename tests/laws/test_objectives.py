"""What clients' steps descend: closed forms on quadratics, the papers' own formulas by hand, and every backend alike.

Client i holds one example four times over, f_i(w) = (x_i w - y_i)^2, so that halves of a batch are alike however they
are drawn: H_i = 2 x_i' x_i and g_i(w) = H_i w - 2 x_i' y_i.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build, parse, rule
from fedkeel.core.types import ClientMemory, Local, ServerState
from fedkeel.sim.simulator import Simulator
from fedkeel.testing import check
from fedkeel.train import ClientData, LocalWork, Task, make_trainer
from fedkeel.train.backends import fits
from fedkeel.train.objective import parted, personal, try_objective
from fedkeel.world.federation import Federation
from fedkeel.world.pool import Pool

CLIENTS, P, LR, ALPHA, LAM = 6, 3, 0.02, 0.05, 0.7
Matrix = NDArray[np.float64]
NAMES = tuple(f"c{i}" for i in range(CLIENTS))


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(CLIENTS, P, generator=generator), torch.randn(CLIENTS, generator=generator) * 3


def pieces() -> tuple[list[Matrix], list[Matrix]]:
    """H_i, and what is taken off: g_i(w) = H_i w - r_i."""
    x, y = (t.double().numpy() for t in examples())
    return [2 * np.outer(row, row) for row in x], [2 * row * at for row, at in zip(x, y, strict=True)]


@rule("source", name="test_lines")
def lines(key: Key) -> Pool:
    """One example a client, four times (tests)."""
    x, y = (t.repeat_interleave(4, 0) for t in examples())
    group = torch.arange(CLIENTS).repeat_interleave(4)
    return Pool(x, y[:, None], x[:2], y[:2, None], 0, group=group, group_names=NAMES)


@rule("model", name="test_slope")
def slope(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """w without a bias, from 0 (tests)."""
    module = nn.Linear(inputs[0], 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


class Silent:
    def round(self, report: Any) -> None:
        assert not report.refused

    def metrics(self, *args: object) -> None: ...
    def checkpoint(self, *args: object) -> None: ...


def simulate(objective: str, rounds: int, steps: int = 1) -> tuple[Matrix, dict[str, Matrix]]:
    """Where a federation of everyone ends: the shared model, and what each client keeps."""
    job = fedkeel.Job(
        rounds=rounds,
        data={"source": "test_lines", "partition": "natural", "clients": CLIENTS, "holdout": 0.25},
        model={"build": "test_slope", "loss": "mse"},
        train={
            "objective": objective,
            "batch_size": 2,
            "lr": LR,
            "stopping": f"steps(steps={steps})",
            "workers": 1,
            "backend": "loop",
        },
        aggregate={"checks": ("claims", "finite"), "weigh": ("equal",)},
        record={"evaluate_every": rounds, "checkpoint_every": rounds},
    )
    federation, memory = Federation.of(job), ClientMemory()
    start = ServerState(federation.theta())
    state = Simulator(federation, federation.trainer(), start, memory, Silent()).run()
    own = {name: memory.of(name)["private"].double().numpy() for name in NAMES if "private" in memory.of(name)}
    return state.theta.double().numpy(), own


def test_dittos_own_models_end_at_their_fixed_points_and_leave_the_shared_one_alone() -> None:
    plain, _ = simulate("plain", 400, steps=3)
    theta, own = simulate(f"ditto(lam={LAM})", 400, steps=3)
    np.testing.assert_array_equal(theta, plain)
    for name, h, r in zip(NAMES, *pieces(), strict=True):
        expected = np.linalg.solve(h + LAM * np.eye(P), r + LAM * theta)
        np.testing.assert_allclose(own[name], expected, atol=1e-4)
    assert max(np.linalg.norm(v - theta) for v in own.values()) > 0.5


def test_ditto_without_a_pull_is_training_alone() -> None:
    _, own = simulate("ditto(lam=0.0)", 30)
    for name, h, r in zip(NAMES, *pieces(), strict=True):
        v = np.zeros(P)
        for _ in range(30):
            v -= LR * (h @ v - r)
        np.testing.assert_allclose(own[name], v, atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_per_fedavg_ends_where_its_own_gradient_is_zero(exact: bool) -> None:
    """The mean of g_i(w - a g_i(w)), with `exact` each times I - a H_i, is affine in w."""
    A, v = np.zeros((P, P)), np.zeros(P)
    for h, r in zip(*pieces(), strict=True):
        turn = np.eye(P) - ALPHA * h
        before = turn if exact else np.eye(P)
        A += before @ h @ turn
        v += before @ (r - ALPHA * h @ r)
    theta, _ = simulate(f"per_fedavg(alpha={ALPHA}, exact={exact})", 3000)
    np.testing.assert_allclose(theta, np.linalg.solve(A, v), atol=2e-3)
    plain = np.linalg.solve(sum(pieces()[0]), sum(pieces()[1]))
    assert np.linalg.norm(theta - plain) > 0.02


def test_apfl_takes_the_papers_steps() -> None:
    """v along a g(mixture); a's logit along a (1 - a) <v - w, g(mixture)>; w along g(w)."""
    theta, own = simulate("apfl(alpha=0.3)", 1, steps=4)
    moved = np.zeros(P)
    for name, h, r in zip(NAMES, *pieces(), strict=True):
        w, v, logit = np.zeros(P), np.zeros(P), np.log(0.3 / 0.7)
        for _ in range(4):
            a = 1 / (1 + np.exp(-logit))
            g = h @ (a * v + (1 - a) * w) - r
            w, v, logit = w - LR * (h @ w - r), v - LR * a * g, logit - LR * a * (1 - a) * (v - w) @ g
        np.testing.assert_allclose(own[name], [*v, logit], atol=1e-5)
        moved += w / CLIENTS
    np.testing.assert_allclose(theta, moved, atol=1e-5)


def small(objective: str, corrections: tuple[str, ...] = (), optimiser: str = "sgd", **work: Any) -> tuple[Any, ...]:
    """(module, layout, data, work) of a small classification."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    data = ClientData(
        torch.randn(37, 6, generator=generator),
        torch.randint(3, (37,), generator=generator),
        torch.tensor([0, 12, 20, 37]),
    )
    rules = tuple(parse("correction", text) for text in corrections)
    task = LocalWork(
        5, 0.2, build("stopping", "epochs", epochs=2), build("loss", "cross_entropy"), rules,
        parse("optimiser", optimiser), parse("objective", objective), **work,
    )  # fmt: skip
    return module, Layout.of(module, (), personal(module, task.objective)), data, task


def outcomes(backend: str, given: tuple[Any, ...], workers: int = 1) -> dict[int, tuple[Tensor, ...]]:
    """Two rounds of every client from the same model: what it sends, what it keeps, its losses."""
    layout = given[1]
    theta = layout.flatten(given[0])[layout.shared]
    trainer = make_trainer(backend, *given, workers=workers)
    kept: dict[int, Tensor | None] = dict.fromkeys(range(3))
    found: dict[int, tuple[Tensor, ...]] = {}
    for number in range(2):
        for done in trainer.train(theta, [Task(i, Key.root(9 * number + i), kept[i]) for i in range(3)]):
            assert done.failure is None
            kept[done.client] = None if done.private is None else done.private.clone()
            own = torch.zeros(0) if done.private is None else done.private.clone()
            losses = torch.tensor([done.loss, done.first_loss, done.last_loss])
            found[done.client] = done.delta.clone(), own, losses
    trainer.close()
    return found


OBJECTIVES = ("plain", "ditto(lam=0.3)", "apfl", "per_fedavg(alpha=0.1)", "per_fedavg(alpha=0.1, exact=True)", "moon")
BESIDE = (((), "sgd"), (("l2(coef=0.01)", "fedprox(mu=0.3)"), "sgd(momentum=0.9)"), (("scaffold",), "adam"))


@pytest.mark.parametrize(
    ("objective", "corrections", "optimiser"),
    # APFL's copy starts at the model, so that its share's first gradient is rounding, and Adam makes lr of that.
    [(o, *b) for o in OBJECTIVES for b in BESIDE if (o, b[1]) != ("apfl", "adam")],
    ids=str,
)
def test_every_backend_takes_the_plain_loops_steps(
    objective: str, corrections: tuple[str, ...], optimiser: str
) -> None:
    given = small(objective, corrections, optimiser)
    expected = outcomes("loop", given)
    tried = [backend for backend in ("traced", "rows", "native") if fits(backend, *given) is None]
    assert "traced" in tried
    for backend in tried:
        for client, found in outcomes(backend, given, workers=2).items():
            for a, b in zip(found, expected[client], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_corrections_leave_what_is_the_clients_own_alone() -> None:
    """A proximal term on the shared model moves neither Ditto's copy nor APFL's share."""
    for backend in ("loop", "traced", "rows"):
        plain, held = (outcomes(backend, small("ditto(lam=0.3)", rules)) for rules in ((), ("fedprox(mu=5.0)",)))
        for client in plain:
            torch.testing.assert_close(held[client][1], plain[client][1], rtol=1e-4, atol=1e-5)
            assert float((held[client][0] - plain[client][0]).norm()) > 0.01
        free, decayed = (outcomes(backend, small("apfl(alpha=0.9)", rules)) for rules in ((), ("l2(coef=0.5)",)))
        shares = [torch.sigmoid(found[0][1][-1]) for found in (free, decayed)]
        assert float((shares[0] - shares[1]).abs()) < 0.05


class Stateful(nn.Module):
    """Every second step is another (tests)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.n = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += self.training
        return self.layer(x) * (self.n % 2)


def test_a_backend_is_tried_on_private_columns_too() -> None:
    module, _, data, work = small("plain")
    module = Stateful()
    for private in ((), ("*",)):
        assert "differs from the plain loop's" in str(fits("traced", module, Layout.of(module, private), data, work))


def test_every_objective_is_under_these_laws() -> None:
    tested = {parse("objective", text).name for text in OBJECTIVES}
    assert {name for name in fedkeel.names("objective") if not name.startswith("test_")} == tested


def test_a_pool_of_workers_keeps_what_one_process_keeps() -> None:
    given = small("ditto(lam=0.3)")
    one, two = outcomes("traced", given), outcomes("traced", given, workers=2)
    assert all(torch.equal(a, b) for client in one for a, b in zip(one[client], two[client], strict=True))


def test_moon_is_the_papers_loss_and_keeps_the_last_local_model() -> None:
    module, layout, data, work = small("moon(mu=2.0, temperature=0.4)")
    rows = slice(*data.range(2))
    work = LocalWork(17, 0.1, build("stopping", "steps", steps=2), work.loss, objective=work.objective)
    theta = layout.flatten(module)[layout.shared]
    last = theta + 0.3 * torch.randn(len(theta), generator=torch.Generator().manual_seed(4))
    trainer = make_trainer("loop", module, layout, data, work, workers=1)
    (done,) = trainer.train(theta, [Task(2, Key.root(0), last)])
    x, y = data.x[rows], data.y[rows]

    def passed(vector: Tensor) -> tuple[Tensor, Tensor]:
        w1, b1, w2, b2 = (vector[a:b] for a, b in ((0, 30), (30, 35), (35, 50), (50, 53)))
        z = torch.tanh(x @ w1.view(5, 6).T + b1)
        return z @ w2.view(3, 5).T + b2, z

    vector = theta.clone().requires_grad_()
    for _ in range(2):
        output, z = passed(vector)
        near, far = (functional.cosine_similarity(z, passed(at)[1].detach()) / 0.4 for at in (theta, last))
        contrast = -torch.log(near.exp() / (near.exp() + far.exp()))
        loss = (functional.cross_entropy(output, y, reduction="none") + 2.0 * contrast).mean()
        (g,) = torch.autograd.grad(loss, vector)
        vector = (vector - 0.1 * g).detach().requires_grad_()
    torch.testing.assert_close(done.delta, vector.detach() - theta, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(done.private, vector.detach(), rtol=1e-5, atol=1e-6)


class Normed(nn.Module):
    """A batch-normed network that counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bn, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.body(x))))


def test_per_fedavg_trains_a_batch_norm_and_reports_the_models_own_losses() -> None:
    _, _, data, work = small("plain")
    module, data = Normed(), ClientData(data.x, data.y, torch.tensor([0, 8, 16, 32]))
    losses = []
    for objective in ("plain", "per_fedavg(alpha=0.1)", "per_fedavg(alpha=0.1, exact=True)"):
        given = LocalWork(
            8, 0.05, build("stopping", "steps", steps=2), work.loss, objective=parse("objective", objective)
        )
        for backend in ("loop", "traced"):
            (done,) = make_trainer(backend, module, Layout.of(module), data, given, workers=1).train(
                Layout.of(module).flatten(module), [Task(2, Key.root(1))]
            )
            assert done.failure is None
            losses.append(done.first_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2:] == pytest.approx([losses[2]] * 4, rel=1e-5)


@pytest.mark.parametrize("objective", ["ditto(lam=0.3)", "apfl", "moon"])
def test_batch_norm_keeps_the_statistics_of_each_model_apart(objective: str) -> None:
    """The shared model's are the plain objective's, whatever passes the client's own takes (MOON moves weights)."""
    _, _, data, work = small("plain")
    module = Normed()
    data = ClientData(data.x, data.y, torch.tensor([0, 10, 20, 35]))  # no batch of one
    plain, mine = ((parse("objective", text), Layout.of(module)) for text in ("plain", objective))
    mine = mine[0], Layout.of(module, (), personal(module, mine[0]))
    theta = plain[1].flatten(module)
    found = []
    for rules, layout in (plain, mine):
        for backend in ("loop", "traced"):
            given = LocalWork(5, 0.05, build("stopping", "steps", steps=1), work.loss, objective=rules)
            trainer = make_trainer(backend, module, layout, data, given, workers=1)
            (done,) = trainer.train(theta, [Task(1, Key.root(1))])
            assert done.failure is None
            found.append(done.delta.clone())
    statistics = slice(plain[1].params.stop, None)
    for delta in found[1:]:
        torch.testing.assert_close(delta[statistics], found[0][statistics], rtol=1e-4, atol=1e-6)
    if objective != "moon":
        torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_fedbn_keeps_every_norm_by_its_type() -> None:
    layout = Layout.of(Normed(), ["type:BatchNorm*"])
    kept = {entry.name for entry in layout.entries if entry.kind == "private"}
    assert kept == {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    with pytest.raises(InputError, match="matches no tensor"):
        Layout.of(Normed(), ["type:LayerNorm"])


PHASES = {"private_first": build("stopping", "epochs", epochs=1)}


def test_fedrep_trains_the_head_alone_and_then_the_body_alone() -> None:
    """Collins et al. 2021, algorithm 1: by hand, with plain autograd."""
    module, _, data, work = small("plain")
    layout = Layout.of(module, ["2"])
    work = LocalWork(12, 0.2, build("stopping", "steps", steps=2), work.loss, **PHASES)
    theta = layout.flatten(module)[layout.shared]
    (done,) = make_trainer("loop", module, layout, data, work, workers=1).train(theta, [Task(0, Key.root(0))])
    x, y = data.x[:12], data.y[:12]
    body, head = (nn.Linear(6, 5), nn.Linear(5, 3))
    body.load_state_dict(module[0].state_dict())
    head.load_state_dict(module[2].state_dict())
    for part in (head, body, body):
        loss = functional.cross_entropy(head(torch.tanh(body(x))), y)
        gradients = torch.autograd.grad(loss, list(part.parameters()))
        with torch.no_grad():
            for p, g in zip(part.parameters(), gradients, strict=True):
                p.sub_(g, alpha=0.2)
    sent, kept = (torch.cat([p.detach().view(-1) for p in part.parameters()]) for part in (body, head))
    torch.testing.assert_close(done.delta, sent - theta, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(done.private, kept, rtol=1e-4, atol=1e-6)
    assert done.steps == 2


@pytest.mark.parametrize(("corrections", "optimiser"), BESIDE, ids=str)
def test_fedreps_phases_are_the_same_in_every_backend(corrections: tuple[str, ...], optimiser: str) -> None:
    module, _, data, work = small("plain", corrections, optimiser, **PHASES)
    given = module, Layout.of(module, ["2"]), data, work
    assert "side by side" in str(fits("rows", *given))
    expected = outcomes("loop", given)
    for backend in ("traced", "native"):
        if fits(backend, *given) is None:
            for client, found in outcomes(backend, given, workers=2).items():
                for a, b in zip(found, expected[client], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_own_models_are_what_is_evaluated() -> None:
    _, layout, _, work = small("apfl(alpha=0.25)")
    vector = torch.arange(layout.width, dtype=torch.float32)
    model, own, extra = parted(layout.views(vector))
    names = [e.name for e in layout.entries if e.trainable and e.name in model]
    hook = work.objective.hook("own")
    assert hook is not None
    mixed, share = hook(model, own, extra, names), torch.sigmoid(extra["share"])
    for name in names:
        torch.testing.assert_close(mixed[name], share * own[name] + (1 - share) * model[name])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"objective": "ditto(lam=0.1)"}}, "set data.holdout"),
        (
            {"train": {"objective": "moon"}, "model": {"private": ("head",)}, "data": {"holdout": 0.2}},
            "leave out model.private",
        ),
        ({"record": {"fine_tune": "epochs"}}, "set data.holdout"),
        (
            {"record": {"fine_tune": "epochs"}, "train": {"objective": "apfl"}, "data": {"holdout": 0.2}},
            "leave out one of the two",
        ),
        ({"record": {"fine_tune": "early"}, "data": {"holdout": 0.2}}, "write epochs or steps"),
        ({"train": {"private_first": "epochs"}}, "name some, not all, in model.private"),
        ({"train": {"stopping": "early"}}, "train.stopping = 'early.*set train.validation"),
        ({"data": {"pooled": True}, "attack": {"rule": "sign_flip", "clients": 1}}, "leaves no clients to be hostile"),
        (
            {"data": {"pooled": True, "holdout": 0.2}, "record": {"fine_tune": "epochs"}},
            "data.pooled leaves none",
        ),
        ({"train": {"validation": 0.1, "backend": "rows"}}, "validates none"),
        ({"train": {"objective": "dito(lam=0.1)"}}, "did you mean 'ditto'"),
    ],
)
def test_what_can_not_be_meant_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Federation.of(fedkeel.Job(**sections)).trainer()


def one_loss(local: Local) -> tuple[Tensor, Tensor]:
    losses = local.loss(local.run(local.model, local.x), local.y)
    return losses, losses.mean()


def stuck(local: Local) -> tuple[Tensor, Tensor]:
    losses = local.loss(local.run({**local.model, "2.bias": local.model["2.bias"].detach()}, local.x), local.y)
    return losses, losses


def scales_the_batch(local: Local) -> tuple[Tensor, Tensor]:
    losses = local.loss(local.run(local.model, local.x.mul_(0.5)), local.y)
    return losses, losses


def reads_a_figure(local: Local) -> tuple[Tensor, Tensor]:
    losses = local.loss(local.run(local.model, local.x), local.y)
    return losses * (2.0 if float(losses.detach().mean()) > 1.1 else 1.0), losses


@pytest.mark.parametrize(
    ("function", "traits", "words"),
    [
        (one_loss, (), "reports losses of shape"),
        (stuck, (), "nothing moves '2.bias'"),
        (scales_the_batch, (), "changed the batch"),
        (reads_a_figure, (), "can not be recorded"),
        (build("objective", "plain").definition.function, ("copy",), "nothing moves 'personal/"),
    ],
)
def test_a_broken_objective_is_found(function: Any, traits: tuple[str, ...], words: str) -> None:
    real = build("objective", "plain").definition
    broken = Rule(dataclasses.replace(real, name="broken", function=function, traits=frozenset(traits)))
    with pytest.raises(AssertionError, match=words):
        check("objective", broken)


def returns_one(local: Local) -> Tensor:
    return local.loss(local.run(local.model, local.x), local.y)


def twice(local: Local) -> tuple[Tensor, Tensor]:
    return returns_one(local), returns_one(local)


def scalar(local: Local) -> tuple[Tensor, Tensor]:
    losses = returns_one(local)
    return losses.mean(), losses


@pytest.mark.parametrize(
    ("function", "traits", "init", "words"),
    [
        (scalar, (), None, r"descends losses of shape \(\)"),
        (one_loss, (), None, r"reports losses of shape \(\)"),
        (twice, ("copy",), None, "give it the hook 'own'"),
        (twice, ("copy", "last"), None, "choose one"),
        (twice, (), lambda: 0.5, "init gave 0.5: give names with tensors"),
    ],
)
def test_an_objective_that_does_not_give_what_it_must_is_refused_before_training(
    function: Any, traits: tuple[str, ...], init: Any, words: str
) -> None:
    module, _, data, work = small("plain")
    real = build("objective", "plain").definition
    rule = Rule(dataclasses.replace(real, name="mine", function=function, traits=frozenset(traits), init=init))

    def tried() -> None:
        layout = Layout.of(module, (), personal(module, rule))
        try_objective(module, layout, dataclasses.replace(work, objective=rule), data.x[:4], data.y[:4])

    with pytest.raises(InputError, match=words):
        tried()


def test_a_last_batch_of_one_before_a_batch_norm_is_refused_in_words() -> None:
    _, _, data, work = small("plain")
    data = ClientData(data.x, data.y, torch.tensor([0, 16, 37]))  # batches of 5: one is left over
    with pytest.raises(InputError, match=r"train.batch_size = 5: a client's last batch can not|does not fit"):
        make_trainer("traced", Normed(), Layout.of(Normed()), data, work, workers=1)
