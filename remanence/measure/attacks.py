"""Membership inference: can it be told from a model's answers that an example was learned?

Every attack gives one score per example, higher for "was learned"; `auc` and `tpr_at_fpr` compare the scores of
members with those of non-members of the same classes and tasks (`match_nonmembers`). An AUC of .5 is chance; below
the references' AUC is a leak too: the model then marks what was removed. Figures speak of a request as a whole, never
of one person. Pure numpy; scikit-learn for the logistic attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.core.errors import BadInput, UnknownName, nearest

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# ----------------------------------------------------------------------------------------------- figures of one example


def loss(logits: Any, labels: Any) -> Floats:
    """Cross-entropy ``-log F_y`` in nats, (N,) from logits (N, C) and columns (N,)."""
    z, y = _check(logits, labels)
    log_p, _ = _logs(z)
    return np.asarray(-log_p[np.arange(len(y)), y])


def confidence(logits: Any, labels: Any) -> Floats:
    """Probability of the right class ``F_y`` in [0, 1], (N,)."""
    return np.exp(-loss(logits, labels))


def entropy(logits: Any, labels: Any = None) -> Floats:
    """``-sum_i F_i log F_i`` in nats, (N,), in [0, log C]. The labels are not used."""
    z, _ = _check(logits, labels)
    log_p, _ = _logs(z)
    p = np.exp(log_p)
    return np.asarray(-(p * np.where(p > 0, log_p, 0.0)).sum(axis=1))


def mentr(logits: Any, labels: Any) -> Floats:
    """Modified entropy ``-(1 - F_y) log F_y - sum_{i != y} F_i log(1 - F_i)`` in nats, (N,), >= 0; 0 for a sure and
    right answer.

    As Song & Mittal define it ("Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security
    2021, arXiv 2003.10595). Evaluation code that circulates with unlearning papers puts F_i for ``1 - F_i`` in the
    logarithm and marks the label's column of every example in every row; that is another quantity. Computed from
    log-probabilities, so finite for any finite logits.
    """
    z, y = _check(logits, labels)
    log_p, log_rest = _logs(z)
    rows = np.arange(len(y))
    p = np.exp(log_p)
    others = p * np.where(p > 0, log_rest, 0.0)
    others[rows, y] = 0.0
    return np.asarray(-np.exp(log_rest[rows, y]) * log_p[rows, y] - others.sum(axis=1))


def log_odds(logits: Any, labels: Any) -> Floats:
    """``log F_y - log(1 - F_y)``, (N,), the logit-scaled confidence: ``z_y - log sum_{i != y} e^{z_i}``, finite also where F_y rounds
    to 1 (Carlini et al. 2022).

    Raises:
        BadInput: there is one column only, in which every answer is sure.
    """
    z, y = _check(logits, labels)
    if z.shape[1] < 2:
        raise BadInput("log-odds need two columns or more")
    log_p, log_rest = _logs(z)
    rows = np.arange(len(y))
    return np.asarray(log_p[rows, y] - log_rest[rows, y])


# ------------------------------------------------------------------------------------ attacks: a score for each example


def loss_threshold(logits: Any, labels: Any) -> Floats:
    """``-loss``: what was learned has a low loss (Yeom et al. 2018, arXiv 1709.01604)."""
    return -loss(logits, labels)


def modified_entropy(logits: Any, labels: Any) -> Floats:
    """``-mentr``: what was learned is answered surely and rightly (Song & Mittal 2021)."""
    return -mentr(logits, labels)


def low_entropy(logits: Any, labels: Any = None) -> Floats:
    """``-entropy``: what was learned is answered surely, rightly or not (Song & Mittal 2021). The labels are not used."""
    return -entropy(logits)


def squared_error(values: Any, targets: Any) -> Floats:
    """``-||f(x) - y||^2``, (N,), from values and targets (N,) or (N, K): the attack on a regression."""
    a, b = _floats(values), _floats(targets)
    if a.ndim == b.ndim + 1 and a.shape[-1] == 1:
        a = a[..., 0]
    if a.shape != b.shape or a.ndim == 0:
        raise BadInput(f"values of shape {a.shape} for targets of shape {b.shape}")
    return np.asarray(-np.square(a - b).reshape(len(a), -1).sum(axis=1))


def logistic(
    member_logits: Any, member_labels: Any, other_logits: Any, other_labels: Any, folds: int = 5, seed: int = 0
) -> tuple[Floats, Floats]:
    """Cross-fitted logistic regression on standardised [loss, confidence, entropy]: log-odds of members (M,) and
    non-members (N,).

    The score of an example never comes from a model, or a scale, that was fitted on it: folds are drawn from `seed`
    within members and within non-members, and the model for a fold is fitted on the others, both sides weighing the
    same. Deterministic.

    Raises:
        BadInput: fewer than two members or non-members, or fewer folds than two.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    inside, outside = features(member_logits, member_labels), features(other_logits, other_labels)
    if min(len(inside), len(outside)) < 2 or folds < 2:
        raise BadInput(
            f"the logistic attack needs 2 folds, 2 members and 2 non-members, "
            f"got {folds}, {len(inside)} and {len(outside)}"
        )
    x = np.concatenate([inside, outside])
    target = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    rng = np.random.default_rng(seed)
    k = min(folds, len(inside), len(outside))
    fold = np.concatenate([rng.permutation(len(inside)) % k, rng.permutation(len(outside)) % k])
    scores = np.empty(len(x))
    for each in range(k):
        fit = fold != each
        scale = StandardScaler().fit(x[fit])
        model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(scale.transform(x[fit]), target[fit])
        scores[~fit] = model.decision_function(scale.transform(x[~fit]))
    return scores[: len(inside)], scores[len(inside) :]


def efficacy(
    retain: tuple[Any, Any], test: tuple[Any, Any], forget: tuple[Any, Any], seed: int = 0, limit: int = 1000
) -> float:
    """MIA-efficacy: the share of the forget set that is taken for non-members, in [0, 1]; compare with retraining, which is not at 1.

    A support vector machine (RBF, C = 3, gamma 1 over the number of features, here 1) on the confidence ``F_y`` is fitted on as many
    retained examples (members) as held-out ones (non-members), drawn from `seed`, and asked about the forget set (Jia et al. 2023,
    arXiv 2304.04934; Fan et al. 2024, arXiv 2310.12508). For a whole class, leave it out of the held-out data, too.

    Args:
        retain, test, forget: (logits, labels) each.
        limit: the most examples of a side to fit on; the papers have no limit, and the machine is quadratic in it.

    Raises:
        BadInput: one of the three is empty.
    """
    from sklearn.svm import SVC

    members, others, asked = (confidence(*side) for side in (retain, test, forget))
    size = min(len(members), len(others), limit)
    if not size or not len(asked):
        raise BadInput("MIA-efficacy needs retained, held-out and forgotten examples")
    rng = np.random.default_rng(seed)
    x = np.concatenate([side[rng.permutation(len(side))[:size]] for side in (members, others)])[:, None]
    machine = SVC(C=3.0, gamma="auto", kernel="rbf").fit(x, np.repeat([1, 0], size))
    return float((machine.predict(asked[:, None]) == 0).mean())


def features(logits: Any, labels: Any) -> Floats:
    """[loss, confidence, entropy] (N, 3)."""
    found = loss(logits, labels)
    return np.stack([found, np.exp(-found), entropy(logits)], axis=1)


# ---------------------------------------------------------------------------------------------- members vs. non-members


class Auc(NamedTuple):
    """Area under the ROC curve with its 95 % interval."""

    value: float
    low: float
    high: float


def auc(members: ArrayLike, nonmembers: ArrayLike) -> Auc:
    """Chance that a member scores above a non-member, ties counting half (Mann-Whitney), in [0, 1]; .5 is chance.

    The interval is DeLong's (DeLong et al. 1988), cut to [0, 1]. Where its variance is 0 (perfect separation, one
    example on a side) it would say that nothing is uncertain; there it is the score interval on Hanley & McNeil's
    variance (Newcombe 2006, method 5).

    Raises:
        BadInput: no members or no non-members, or NaN.
    """
    x, y = _scores(members, nonmembers)
    m, n = len(x), len(y)
    ranks = _midranks(np.concatenate([x, y]))
    above = (ranks[:m] - _midranks(x)) / n  # for each member, the share of non-members below it
    below = 1.0 - (ranks[m:] - _midranks(y)) / m
    value = float(above.mean())
    variance = float(above.var(ddof=1)) / m + float(below.var(ddof=1)) / n if min(m, n) > 1 else 0.0
    if variance > 0:
        half = _Z * math.sqrt(variance)
        return Auc(value, max(0.0, value - half), min(1.0, value + half))
    return Auc(value, _score_bound(value, m, n, 0.0), _score_bound(value, m, n, 1.0))


def tpr_at_fpr(members: ArrayLike, nonmembers: ArrayLike, fpr: float) -> float | None:
    """Share of members found when at most a share `fpr` of non-members is taken for members (Carlini et al. 2022,
    arXiv 2112.03570).

    None where ``fpr x non-members < 10``: there the figure rests on fewer than ten examples and says nothing.
    """
    x, y = _scores(members, nonmembers)
    if not 0 < fpr < 1:
        raise BadInput(f"fpr must lie between 0 and 1, got {fpr}")
    allowed = math.floor(fpr * len(y) + 1e-9)
    if allowed < 10:
        return None
    threshold = np.sort(y)[len(y) - 1 - allowed]
    return float((x > threshold).mean())


@dataclass(frozen=True)
class Match:
    """Rows of members and of the pool of non-members that can be compared, and how many members have no counterpart
    there."""

    members: Rows
    nonmembers: Rows
    uncovered: int


def match_nonmembers(
    labels: ArrayLike,
    pool_labels: ArrayLike,
    rng: Any,
    tasks: ArrayLike | None = None,
    pool_tasks: ArrayLike | None = None,
) -> Match:
    """Draw as many non-members as there are in the members' proportions of class and task.

    Without this an attack tells classes apart, not members: a forgotten class is all loss whoever learned it.

    Args:
        labels, tasks: (M,) of the members; `tasks` may be left out, with `pool_tasks`.
        pool_labels, pool_tasks: (P,) of held-out examples.
        rng: a numpy or torch generator; the draw depends on it alone.

    Returns:
        Sorted row numbers. The proportions are kept to one example per class and task. Members of a class and task
        that the pool lacks are left
        out and counted: their membership cannot be measured.

    Raises:
        BadInput: lengths differ, tasks on one side only, or the pool has none of the members' classes.
    """
    group, pool = _groups(labels, tasks, pool_labels, pool_tasks)
    wanted = np.bincount(group, minlength=pool.max(initial=0) + 1)
    have = np.bincount(pool, minlength=group.max(initial=0) + 1)
    both = (wanted > 0) & (have > 0)
    if not both.any():
        raise BadInput("no held-out example has the class and task of any of these; membership cannot be measured")
    share = np.where(both, wanted, 0) / wanted[both].sum()
    total = min(have[both] / share[both])  # the most that keeps the proportions
    take = np.where(both, np.clip(np.round(total * share), 1, have), 0).astype(np.int64)
    order = _permutation(len(pool), rng)
    chosen = [order[pool[order] == g][: take[g]] for g in np.flatnonzero(take)]
    inside = both[group]
    return Match(np.flatnonzero(inside), np.sort(np.concatenate(chosen)), int((~inside).sum()))


def audit(
    member_answers: Any,
    member_targets: Any,
    other_answers: Any,
    other_targets: Any,
    attacks: Iterable[str] = ("loss-threshold", "modified-entropy", "logistic"),
    fprs: Iterable[float] = (0.01, 0.001),
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run several attacks: ``{attack: {"auc", "low", "high", "tpr@0.01", ...}}``; a TPR with too few non-members is
    left out.

    Raises:
        UnknownName: there is no such attack.
    """
    found: dict[str, dict[str, float]] = {}
    for name in attacks:
        if name == "logistic":
            inside, outside = logistic(member_answers, member_targets, other_answers, other_targets, seed=seed)
        elif name in SCORES:
            inside, outside = SCORES[name](member_answers, member_targets), SCORES[name](other_answers, other_targets)
        else:
            raise UnknownName(f"no attack is called {name!r}{nearest(name, ATTACKS)}")
        found[name] = dict(zip(("auc", "low", "high"), auc(inside, outside), strict=True))
        for fpr in fprs:
            tpr = tpr_at_fpr(inside, outside, fpr)
            if tpr is not None:
                found[name][f"tpr@{fpr:g}"] = tpr
    return found


SCORES: dict[str, Callable[[Any, Any], Floats]] = {
    "loss-threshold": loss_threshold,
    "modified-entropy": modified_entropy,
    "confidence": confidence,
    "entropy": low_entropy,
    "squared-error": squared_error,
}
ATTACKS = (*SCORES, "logistic")

# -------------------------------------------------------------------------------------------------------------- helpers

_Z = 1.959963984540054  # the .975 quantile of the normal distribution


def _floats(values: Any) -> Floats:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _check(logits: Any, labels: Any) -> tuple[Floats, Rows]:
    """Logits (N, C) in float64, finite or -inf (a barred column), and columns (N,), none of them barred."""
    z = _floats(logits)
    if z.ndim != 2 or not z.shape[1]:
        raise BadInput(f"logits must be (N, C), got shape {z.shape}")
    if bool((np.isnan(z) | (z == np.inf)).any()):
        raise BadInput("NaN or infinite values among the model's answers")
    if labels is None:
        return z, np.zeros(len(z), dtype=np.int64)
    y = _floats(labels).astype(np.int64)
    if y.shape != (len(z),) or bool(((y < 0) | (y >= z.shape[1])).any()):
        raise BadInput(f"labels must be {len(z)} head columns in [0, {z.shape[1]}), one for each row")
    if bool((z[np.arange(len(y)), y] == -np.inf).any()):
        raise BadInput("a right answer lies in a barred column (logit -inf); measure it among the classes that compete")
    return z, y


def _logs(z: Floats) -> tuple[Floats, Floats]:
    """``log F_i`` and ``log(1 - F_i)``, both (N, C).

    Below one half, ``log1p(-F_i)`` is exact. The largest column may be so near 1 that ``1 - F`` rounds to 0, so its
    rest is summed from the others.
    """
    rows = np.arange(len(z))
    top = z.argmax(axis=1) if len(z) else np.zeros(0, dtype=np.int64)
    shifted = z - z[rows, top][:, None]
    weight = np.exp(shifted)
    log_p = shifted - np.log(weight.sum(axis=1, keepdims=True))
    log_rest = np.log1p(-np.minimum(np.exp(log_p), 0.75))  # the bound is only met by the column replaced next
    others = shifted.copy()
    others[rows, top] = -np.inf
    if z.shape[1] == 1:
        log_rest[:] = -np.inf
        return log_p, log_rest
    second = others.max(axis=1)
    safe = np.where(np.isfinite(second), second, 0.0)
    with np.errstate(divide="ignore"):
        rest = safe + np.log(np.exp(others - safe[:, None]).sum(axis=1))
    log_rest[rows, top] = rest - np.log(weight.sum(axis=1))
    return log_p, log_rest


def _scores(members: ArrayLike, nonmembers: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _floats(members).reshape(-1), _floats(nonmembers).reshape(-1)
    if not len(x) or not len(y):
        raise BadInput(f"an attack needs members and non-members, got {len(x)} and {len(y)}")
    if bool(np.isnan(x).any() or np.isnan(y).any()):
        raise BadInput("NaN among the scores")
    return x, y


def _midranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[where.reshape(-1)], dtype=np.float64)


def _score_bound(value: float, m: int, n: int, end: float) -> float:
    """The AUC t toward `end` whose own standard error, by Hanley & McNeil, puts `value` just 1.96 of them away."""
    if value == end:
        return end
    near, far = value, end
    for _ in range(60):
        t = (near + far) / 2
        size = (m + n) / 2 - 1
        variance = t * (1 - t) * (1 + size * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        near, far = (t, far) if abs(t - value) < _Z * math.sqrt(variance) else (near, t)
    return (near + far) / 2


def _groups(
    labels: ArrayLike, tasks: ArrayLike | None, pool_labels: ArrayLike, pool_tasks: ArrayLike | None
) -> tuple[Rows, Rows]:
    """Members' and pool's number of class and task, from one numbering."""
    if (tasks is None) != (pool_tasks is None):
        raise BadInput("give the tasks of members and pool, or of neither")
    sides = []
    for label, task in ((labels, tasks), (pool_labels, pool_tasks)):
        y = _floats(label).astype(np.int64)
        t = np.zeros_like(y) if task is None else _floats(task).astype(np.int64)
        if y.ndim != 1 or y.shape != t.shape:
            raise BadInput(f"labels and tasks must be of one length, got {y.shape} and {t.shape}")
        sides.append(np.stack([y, t], axis=1))
    _, number = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
    flat = number.reshape(-1)
    return flat[: len(sides[0])], flat[len(sides[0]) :]


def _permutation(n: int, rng: Any) -> Rows:
    if hasattr(rng, "permutation"):
        return np.asarray(rng.permutation(n), dtype=np.int64)
    import torch  # only here: attacks on arrays need no torch

    return np.asarray(torch.randperm(n, generator=rng, device=rng.device).cpu().numpy(), dtype=np.int64)
