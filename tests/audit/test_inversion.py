"""Gradient inversion: what an update without noise shows, and that noise hides it."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest
import torch
from small import federation, flat_pool

from fedkeel.audit import inversion, inverting, updates
from fedkeel.core.keys import Key
from fedkeel.core.registry import build


def batch_of(fed, size):
    return updates.Batch(fed.names[0], fed.data.x[:size], fed.data.y[:size])


def attacked(fed, size, *, multiplier=0.0, work=None, iterations=120):
    """(attack -> score, guess, labels told): of the first examples of a federation, at its first model."""
    batch, truth = batch_of(fed, size), fed.pool.prepare(fed.data.x[:size])
    work = updates.one_step(fed, size) if work is None else work
    sent = updates.trained(fed, fed.theta(), batch, work, Key.root(1))
    delta = updates.noised(sent.delta, fed.layout.params, multiplier, Key.root(2))
    sight = inversion.Sight(
        fed.module, fed.layout, fed.theta(), sent._replace(delta=delta), size, fed.pool.inputs, 0.0, 1.0
    )
    told = inversion.labels(sight, fed.pool.classes)
    found = inversion.invert(sight, torch.tensor(told), Key.root(3), iterations=iterations)
    scores = {f.attack: inversion.score(inversion.matched(f.x, truth), truth, 1.0).psnr for f in found}
    guess = inversion.baseline(truth, fed.pool.prepare(fed.pool.test_x).mean(0), 0.0, 1.0, Key.root(4)).psnr
    return scores, guess, inversion.overlap(told, batch.y.tolist())


def test_one_digit_is_read_from_one_step_of_the_default_model_by_every_attack():
    scores, guess, told = attacked(federation(), 1)
    assert guess < 15
    assert min(scores.values()) > 40
    assert scores["closed form"] > 90
    assert told == 1.0


def test_noise_hides_it():
    for multiplier in (0.1, 1.0):
        scores, guess, _ = attacked(federation(), 1, multiplier=multiplier)
        assert max(scores.values()) < guess


def test_four_digits_are_read_from_their_mean_gradient():
    scores, guess, told = attacked(federation(), 4)
    assert scores["inverting gradients"] > guess + 15
    assert told == 1.0


def test_many_local_steps_do_not_hide_a_single_example():
    """Every gradient of the first layer is a multiple of the example, and so is their sum."""
    fed = federation("train.stopping=epochs(epochs=12)")
    scores, _, told = attacked(fed, 1, work=fed.work, iterations=5)
    assert scores["closed form"] > 60
    assert told == 1.0


def test_few_local_steps_are_followed_exactly():
    fed = federation("train.stopping=epochs(epochs=3)", "model.build=logistic", "train.lr=1.0")
    batch = batch_of(fed, 2)
    sent = updates.trained(fed, fed.theta(), batch, fed.work, Key.root(1))
    sight = inversion.Sight(fed.module, fed.layout, fed.theta(), sent, 2, fed.pool.inputs, 0.0, 1.0)
    assert sight.unrolled == sent.steps == 3
    followed = torch.cat([t.detach().flatten() for t in sight.predicted(fed.pool.prepare(batch.x), batch.y)])
    assert torch.allclose(followed, sent.delta, atol=1e-6)
    other = replace(fed.work, optimiser=build("optimiser", "adam"))
    assert inversion.Sight(**{**vars(sight), "sent": sent._replace(work=other)}).unrolled == 1


def test_plain_numbers_are_read_as_images_are():
    fed = federation(pool=flat_pool())
    scores, guess, told = attacked(fed, 1)
    assert min(scores.values()) > guess + 20
    assert told == 1.0


def test_labels_of_a_head_without_a_bias_are_told_by_its_weights():
    fed = federation()
    headless = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10, bias=False)
    )
    layout = type(fed.layout).of(headless)
    fed = replace(fed, module=headless, layout=layout, plain_layout=layout)
    for size in (1, 2, 4):
        sent = updates.trained(fed, fed.theta(), batch_of(fed, size), updates.one_step(fed, size), Key.root(1))
        sight = inversion.Sight(headless, layout, fed.theta(), sent, size, fed.pool.inputs, 0.0, 1.0)
        assert inversion.overlap(inversion.labels(sight, 10), fed.data.y[:size].tolist()) == 1.0
    assert inversion.labels(sight, 7) is None


def test_reconstructions_are_matched_before_they_are_judged():
    truth = torch.rand(5, 3, 4, 4, generator=Key.root(0).torch())
    shuffled = truth[torch.tensor([3, 0, 4, 1, 2])]
    assert torch.equal(inversion.matched(shuffled, truth), truth)
    assert inversion.score(truth + 0.1, truth, 1.0).psnr == pytest.approx(20.0, abs=1e-3)
    assert inversion.score(truth, truth, 1.0) == (inversion.CAP, 0.0)
    assert inversion.overlap([1, 1, 2], [1, 2, 2]) == pytest.approx(2 / 3)


def test_a_study_says_what_the_job_itself_does_to_an_update():
    fed = federation("client.transforms=clip(norm=0.01)", "client.codec=float16")
    found = inverting.study(fed, {"first": fed.theta()}, (1, 2), Key.root(0), iterations=8)
    assert [case["size"] for case in found["cases"]] == [1, 2]  # one epoch of a small batch is one step
    names = [t["name"] for t in found["cases"][0]["treatments"]]
    assert names == ["as it is", "as the job sends it", "noise 0.01", "noise 0.1", "noise 1"]
    as_it_is, as_sent = found["cases"][0]["treatments"][:2]
    assert as_it_is["psnr"] > 80
    assert as_sent["psnr"] > found["cases"][0]["baseline"]["psnr"] + 10  # a shorter update shows the same
    assert set(found["pictures"][0]) == {"original", *names}
    assert base64.b64decode(found["pictures"][0]["original"]).startswith(b"\x89PNG")
    again = inverting.study(fed, {"first": fed.theta()}, (1, 2), Key.root(0), iterations=8)
    assert again == found


@pytest.mark.parametrize("shape", [(4,), (3, 5, 5), (1, 6, 6), (2, 9)])
def test_any_input_has_a_picture(shape):
    shown = inverting.picture(torch.rand(3, *shape, generator=Key.root(0).torch()), 0.0, 1.0)
    assert base64.b64decode(shown).startswith(b"\x89PNG")


def test_what_can_not_be_inverted_is_said():
    assert "layers of their own" in inverting.unfit(federation("model.private=head", "data.holdout=0.2"))
    series = flat_pool()
    floats = replace(series, y=series.x[:, 0], test_y=series.test_x[:, 0], classes=0)
    assert "classifiers" in inverting.unfit(federation("model.loss=mse", pool=floats))
    assert inverting.unfit(federation()) is None
