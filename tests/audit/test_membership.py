"""Membership inference: chance where nothing was learned, well above where labels were learned by heart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import federation, final, with_random_labels

from fedkeel.audit import membership
from fedkeel.core.keys import Key

SMALL = ("data.source=digits(test_fraction=0.85)", "model.build=mlp(hidden=(64,))", "rounds=8", "train.lr=0.3")


@pytest.fixture(scope="module")
def overfitted():
    fed = with_random_labels(federation(*SMALL, "train.stopping=epochs(epochs=30)"))
    return fed, final(fed).theta, membership.candidates(fed, 250, Key.root(0))


def by_shadows(fed, theta, among, count):
    models = [membership.shadow(fed, among, Key.root(9).fold(i)) for i in range(count)]
    seen = np.stack([membership.by_loss(fed, model, among) for model, _ in models])
    without = ~np.stack([held for _, held in models])
    return membership.lira(membership.by_loss(fed, theta, among), seen, without)


def test_an_untrained_model_tells_nobody(overfitted):
    fed, _, among = overfitted
    found = membership.judged(membership.by_loss(fed, fed.theta(), among), among.member.numpy())
    assert found.low < 0.5 < found.high
    assert found.rates[0].low < 0.01 < found.rates[0].high


def test_labels_that_were_learned_by_heart_tell_who_was_there(overfitted):
    fed, theta, among = overfitted
    member = among.member.numpy()
    found = membership.judged(membership.by_loss(fed, theta, among), member)
    assert found.auc > 0.6
    assert found.low > 0.5
    shadowed = membership.judged(by_shadows(fed, theta, among, 4), member)
    assert shadowed.auc > 0.6
    assert membership.judged(by_shadows(fed, fed.theta(), among, 2), member).auc < 0.6


def test_members_are_the_federations_and_hostile_clients_are_left_out():
    fed = federation(*SMALL, "attack.rule=label_flip", "attack.clients=1")
    among = membership.candidates(fed, 10_000, Key.root(0))
    assert int(among.member.sum()) * 2 == len(among.member)
    held = len(fed.data.y)
    hostile = fed.names.index(next(iter(fed.adversary.clients)))
    mine = among.asked[among.member]
    assert bool((mine < held).all())
    assert len(mine.unique()) == len(mine) == held - fed.data.count(hostile)
    assert bool((among.client[mine] != hostile).all())
    assert bool((among.asked[~among.member] >= held).all())
    few = membership.candidates(fed, 20, Key.root(0))
    assert len(few.asked) == 40


def test_a_shadow_has_half_of_everything_and_is_the_keys(overfitted):
    fed, _, among = overfitted
    model, held = membership.shadow(fed, among, Key.root(1))
    assert 0.4 < held.mean() < 0.6
    again, same = membership.shadow(fed, among, Key.root(1))
    assert torch.equal(model, again)
    assert (held == same).all()
    assert (membership.shadow(fed, among, Key.root(2))[1] != held).any()


def test_lira_is_the_distance_from_models_without_the_example():
    shadows = np.array([[1.0, 5.0], [3.0, 5.0], [100.0, 5.0]])
    without = np.array([[True, False], [True, False], [False, False]])
    found = membership.lira(np.array([4.0, 9.0]), shadows, without)
    assert found == pytest.approx([2.0 / np.sqrt(2.0), 0.0])  # mean 2, deviation sqrt(2); nobody lacks the second


def test_judging_is_what_the_definitions_say():
    member = np.arange(2000) < 1000
    perfect = membership.judged(member.astype(float), member)
    assert (perfect.auc, perfect.rates[0].tpr, perfect.rates[1].high) == (1.0, 1.0, 1.0)
    tied = membership.judged(np.zeros(2000), member)
    assert (tied.auc, tied.rates[0].tpr) == (0.5, 0.0)
    draws = Key.root(0).numpy()
    scores = np.concatenate([draws.normal(1, 1, 1000), draws.normal(0, 1, 1000)])
    found = membership.judged(scores, member)
    assert found.auc == pytest.approx(0.760, abs=0.02)  # Phi(1 / sqrt 2)
    assert found.low < 0.760 < found.high
    limit = np.sort(scores[~member])[-10]
    assert found.rates[0].tpr == pytest.approx((scores[member] >= limit).mean())
    assert found.rates[0].low < found.rates[0].tpr < found.rates[0].high
    fpr, tpr = zip(*found.curve, strict=True)
    assert list(fpr) == sorted(fpr)
    assert list(tpr) == sorted(tpr)
    assert (fpr[-1], tpr[-1]) == (1.0, 1.0)
