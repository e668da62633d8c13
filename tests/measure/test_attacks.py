"""Membership attacks against naive loops, scikit-learn and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from remanence.core.errors import BadInput, UnknownName
from remanence.measure import attacks


def answers(n: int, classes: int, seed: int, sharp: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return sharp * rng.standard_normal((n, classes)), rng.integers(classes, size=n)


def softmax(row: np.ndarray) -> list[float]:
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


def naive_mentr(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Song & Mittal 2021, eq. 6, term by term: -(1 - F_y) log F_y - sum_{i != y} F_i log(1 - F_i)."""
    found = []
    for row, y in zip(logits, labels, strict=True):
        f = softmax(row)
        value = -(1 - f[y]) * math.log(f[y])
        for i, p in enumerate(f):
            if i != y:
                value -= p * math.log(1 - p)
        found.append(value)
    return found


@pytest.mark.fidelity(
    "measure/membership",
    check="modified entropy of Song & Mittal (arXiv 2003.10595, eq. 6) term by term on 300 random answers; AUC by scikit-learn",
    measured="largest difference 2e-14; AUC 1e-12",
    paper="-(1 - F_y) log F_y - sum_{i != y} F_i log(1 - F_i)",
    differs="computed from log-probabilities, finite for any logits",
)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_modified_entropy_is_song_and_mittals(classes):
    logits, labels = answers(300, classes, classes)
    expected = naive_mentr(logits, labels)
    np.testing.assert_allclose(attacks.mentr(logits, labels), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(attacks.modified_entropy(logits, labels), -attacks.mentr(logits, labels))


def test_modified_entropy_by_hand_and_at_the_ends():
    """F = (.7, .2, .1): right answer -(.3) ln .7 - .2 ln .8 - .1 ln .9; sure and right 0, sure and wrong unbounded."""
    f = np.log([[0.7, 0.2, 0.1]])
    by_hand = -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)
    assert attacks.mentr(f, [0])[0] == pytest.approx(by_hand, abs=1e-12)
    # the circulating variant (F_i for 1 - F_i) is the ordinary entropy's tail: another number
    assert abs(by_hand - (-0.3 * math.log(0.7) - 0.2 * math.log(0.2) - 0.1 * math.log(0.1))) > 0.1
    assert attacks.mentr([[40.0, 0.0, 0.0]], [0])[0] == pytest.approx(0, abs=1e-15)
    assert attacks.mentr([[0.0, 800.0]], [0])[0] == pytest.approx(1600, rel=1e-9)  # both terms are 800
    assert np.isfinite(attacks.mentr([[1e4, -1e4, 0.0]], [1])).all()
    two = attacks.mentr([[1.3, -0.4]], [0])[0]  # two classes: -2 (1 - F_y) log F_y
    p = 1 / (1 + math.exp(-1.7))
    assert two == pytest.approx(-2 * (1 - p) * math.log(p), rel=1e-12)
    assert np.diff(attacks.mentr([[v, 0.0, 0.0] for v in (-2.0, -1.0, 0.0, 1.0, 2.0)], [0] * 5)).max() < 0


def test_loss_confidence_and_entropy_against_torch():
    logits, labels = answers(200, 7, 0)
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    torch_loss = torch.nn.functional.cross_entropy(z, y, reduction="none")
    np.testing.assert_allclose(attacks.loss(z, y), torch_loss, rtol=1e-10)
    np.testing.assert_allclose(attacks.confidence(z, y), z.softmax(1)[torch.arange(200), y], rtol=1e-10)
    np.testing.assert_allclose(attacks.entropy(z), torch.distributions.Categorical(logits=z).entropy(), rtol=1e-10)
    assert attacks.entropy([[0.0] * 8])[0] == pytest.approx(math.log(8))
    np.testing.assert_array_equal(attacks.features(z, y)[:, 0], attacks.loss(z, y))


def test_barred_columns_weigh_nothing():
    barred = np.array([[1.0, -np.inf, 0.2], [0.3, -np.inf, 2.0]])
    plain = barred[:, [0, 2]]
    for figure in (attacks.loss, attacks.mentr, attacks.entropy):
        np.testing.assert_allclose(figure(barred, [0, 2]), figure(plain, [0, 1]), rtol=1e-12)
    with pytest.raises(BadInput, match="barred"):
        attacks.loss(barred, [1, 2])


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_scikit_learns(ties):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(0.4, 1, 60 + seed), rng.normal(0, 1, 45)
        if ties:
            x, y = x.round(), y.round()
        target = np.r_[np.ones(len(x)), np.zeros(len(y))]
        found = attacks.auc(x, y)
        assert found.value == pytest.approx(roc_auc_score(target, np.r_[x, y]), abs=1e-12)
        pairs = np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y])
        assert found.value == pytest.approx(pairs, abs=1e-12)
        assert 0 <= found.low < found.value < found.high <= 1


def test_auc_interval_covers():
    """DeLong's 95 % interval holds the true AUC Phi(d / sqrt 2) in 92 to 98 of 100 draws."""
    true = 0.5 * (1 + math.erf(0.7 / 2))
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        found = attacks.auc(rng.normal(0.7, 1, 50), rng.normal(0, 1, 70))
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_auc_by_hand_at_the_ends_and_swapped():
    assert attacks.auc([3, 1], [2, 0]).value == 0.75
    sure = attacks.auc([2, 3, 4], [0, 1])
    assert sure.value == sure.high == 1 and 0.3 < sure.low < 1
    assert attacks.auc([1, 1], [1, 1, 1]).value == 0.5
    wrong = attacks.auc([0, 1], [2, 3, 4])
    assert wrong.value == wrong.low == 0 and wrong.high == pytest.approx(1 - sure.low)
    x, y = np.random.default_rng(0).normal(size=(2, 30))
    one, two = attacks.auc(x, y), attacks.auc(y, x)
    np.testing.assert_allclose(np.array(one), 1 - np.array([two.value, two.high, two.low]))
    for bad in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(BadInput):
            attacks.auc(*bad)


def test_tpr_only_where_ten_nonmembers_lie_above():
    rng = np.random.default_rng(0)
    x = rng.normal(1, 1, 500)
    for n, fpr, there in ((999, 0.01, False), (1000, 0.01, True), (9999, 0.001, False), (10000, 0.001, True), (99, 0.1, False), (100, 0.1, True)):  # fmt: skip
        assert (attacks.tpr_at_fpr(x, rng.normal(size=n), fpr) is not None) is there
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(BadInput):
            attacks.tpr_at_fpr(x, x, bad)


def test_tpr_is_the_roc_curves():
    """The largest TPR of scikit-learn's ROC curve among the points whose FPR is at most the given one; ties too."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(1, 1, 300), rng.normal(0, 1, 400)
        if seed % 2:
            x, y = x.round(1), y.round(1)
        fpr, tpr, _ = roc_curve(np.r_[np.ones(300), np.zeros(400)], np.r_[x, y], drop_intermediate=False)
        for level in (0.025, 0.05, 0.2):
            found = attacks.tpr_at_fpr(x, y, level)
            assert found == pytest.approx(tpr[fpr <= level + 1e-12].max())


def test_matched_nonmembers_keep_the_proportions_and_count_what_is_missing():
    rng = np.random.default_rng(0)
    labels, tasks = np.array([3] * 30 + [5] * 10 + [7] * 4), np.array([1] * 30 + [2] * 10 + [3] * 4)
    pool, at = np.repeat([3, 5, 5, 9], [20, 40, 10, 50]), np.repeat([1, 2, 1, 4], [20, 40, 10, 50])
    match = attacks.match_nonmembers(labels, pool, rng, tasks, at)
    assert match.uncovered == 4 and match.members.tolist() == list(range(40))
    chosen = match.nonmembers
    assert set(zip(pool[chosen], at[chosen], strict=True)) == {(3, 1), (5, 2)}
    assert (pool[chosen] == 3).sum() == 20 and abs((pool[chosen] == 5).sum() - 20 / 3) <= 1  # 3 : 1
    assert (np.diff(chosen) > 0).all()
    again = attacks.match_nonmembers(labels, pool, np.random.default_rng(0), tasks, at)
    other = attacks.match_nonmembers(labels, pool, np.random.default_rng(1), tasks, at)
    np.testing.assert_array_equal(again.nonmembers, chosen)
    assert not np.array_equal(other.nonmembers, chosen)
    by_torch = attacks.match_nonmembers(labels, pool, torch.Generator().manual_seed(0))
    assert by_torch.uncovered == 4
    with pytest.raises(BadInput, match="cannot be measured"):
        attacks.match_nonmembers([1, 1], [2, 2], rng)
    with pytest.raises(BadInput, match="neither"):
        attacks.match_nonmembers([1], [1], rng, tasks=[0])


def test_logistic_attack_is_cross_fitted():
    """Members and non-members of one distribution give about .5 (scored on the data it was fitted on, the model gives .6 and more)."""
    values, fitted = [], []
    for seed in range(20):
        (a, y), (b, z) = answers(25, 5, seed), answers(25, 5, 100 + seed)
        values.append(attacks.auc(*attacks.logistic(a, y, b, z)).value)
        x, target = np.r_[attacks.features(a, y), attacks.features(b, z)], np.r_[np.ones(25), np.zeros(25)]
        scores = LogisticRegression(max_iter=1000).fit(x, target).decision_function(x)
        fitted.append(roc_auc_score(target, scores))
    assert 0.4 < np.mean(values) < 0.54 and np.mean(fitted) > 0.58
    (a, y), (b, z) = answers(80, 5, 0), answers(80, 5, 1)
    a[np.arange(80), y] += 4
    one = attacks.logistic(a, y, b, z)
    assert attacks.auc(*one).value > 0.7 and [len(side) for side in one] == [80, 80]
    np.testing.assert_array_equal(one[0], attacks.logistic(a, y, b, z)[0])
    with pytest.raises(BadInput):
        attacks.logistic(a[:1], y[:1], b, z)


def test_audit_runs_the_attacks_named():
    (a, y), (b, z) = answers(90, 4, 0), answers(1000, 4, 1)
    found = attacks.audit(a, y, b, z)
    assert set(found) == {"loss-threshold", "modified-entropy", "logistic"}
    assert all("tpr@0.01" in row and "tpr@0.001" not in row for row in found.values())
    assert found["loss-threshold"]["auc"] == attacks.auc(-attacks.loss(a, y), -attacks.loss(b, z)).value
    with pytest.raises(UnknownName, match="modified-entropy"):
        attacks.audit(a, y, b, z, ["modified-entropi"])


def test_squared_error_and_bad_answers():
    assert attacks.squared_error([[1.0], [2.0]], [0.0, 4.0]).tolist() == [-1.0, -4.0]
    assert attacks.squared_error([[1.0, 2.0]], [[0.0, 0.0]]).tolist() == [-5.0]
    with pytest.raises(BadInput):
        attacks.squared_error([1.0], [1.0, 2.0])
    with pytest.raises(BadInput, match="NaN"):
        attacks.loss([[math.nan, 0.0]], [0])
    with pytest.raises(BadInput, match="head columns"):
        attacks.loss([[1.0, 0.0]], [2])


def test_purpose_an_overfitted_network_gives_its_members_away():
    """60 digits learned by heart: every attack tells them from held-out ones, and not before they were learned."""
    from remanence.models import mlp
    from tests.forget.helpers import split, taught

    train, test = split()
    members, others = train.select(torch.arange(60)), test.select(torch.arange(300))
    model = mlp(64, [64], 10)
    for learned in (False, True):
        with torch.no_grad():
            inside, outside = model(members["x"]), model(others["x"])
        for name, row in attacks.audit(inside, members["y"], outside, others["y"]).items():
            assert row["low"] > 0.6 if learned else row["low"] < 0.5 < row["high"], name
        if not learned:
            taught(model, members, epochs=60, batch_size=30, lr=5e-3)


def test_log_odds_are_the_logit_of_the_confidence():
    logits, labels = answers(200, 6, 3)
    p = attacks.confidence(logits, labels)
    np.testing.assert_allclose(attacks.log_odds(logits, labels), np.log(p) - np.log1p(-p), rtol=1e-9, atol=1e-9)
    assert attacks.log_odds([[900.0, 0.0, 0.0]], [0])[0] == pytest.approx(900 - math.log(2), rel=1e-12)  # p rounds to 1
    assert attacks.log_odds([[0.0, 0.0]], [1])[0] == 0
    with pytest.raises(BadInput, match="two columns"):
        attacks.log_odds([[1.0]], [0])


def test_confidence_ranks_as_the_loss_and_entropy_asks_for_no_label():
    (a, y), (b, z) = answers(150, 5, 0, 1.0), answers(150, 5, 1, 1.0)
    a[np.arange(150), y] += 2
    found = attacks.audit(a, y, b, z, ["loss-threshold", "confidence", "entropy"])
    assert found["confidence"]["auc"] == pytest.approx(found["loss-threshold"]["auc"], abs=1e-12)
    assert found["entropy"]["auc"] == attacks.auc(-attacks.entropy(a), -attacks.entropy(b)).value
    np.testing.assert_array_equal(attacks.low_entropy(a, y), attacks.low_entropy(a, (y + 1) % 5))


def test_efficacy_is_the_support_vector_machines_share_of_non_members():
    """Against scikit-learn by hand where the sides are equal; 0 for sure members, 1 for strangers, whatever their number."""
    from sklearn.svm import SVC

    def side(n: int, seed: int, lift: float) -> tuple[np.ndarray, np.ndarray]:
        z, y = answers(n, 4, seed, 1.0)
        z[np.arange(n), y] += lift
        return z, y

    retain, test, forget = side(80, 0, 3.0), side(80, 1, 0.0), side(40, 2, 1.5)
    x = np.concatenate([attacks.confidence(*retain), attacks.confidence(*test)])[:, None]
    machine = SVC(C=3.0, gamma="auto").fit(x, np.repeat([1, 0], 80))
    by_hand = float((machine.predict(attacks.confidence(*forget)[:, None]) == 0).mean())
    assert attacks.efficacy(retain, test, forget) == by_hand and 0.1 < by_hand < 0.9
    strong, weak = side(300, 3, 30.0), side(70, 4, -30.0)
    assert (
        attacks.efficacy(strong, weak, side(50, 5, 30.0)) == 0
        and attacks.efficacy(strong, weak, side(50, 5, -30.0)) == 1
    )
    drawn = [attacks.efficacy(side(3000, 6, 1.0), side(500, 7, 0.0), forget, seed=s, limit=50) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    with pytest.raises(BadInput):
        attacks.efficacy(retain, test, (forget[0][:0], forget[1][:0]))
