"""GPM's basis: the identities of its SVD, and that a projected update leaves old answers alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput, NotFinite
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.nn.subspace import Subspace, compress, layer_inputs

torch.set_num_threads(1)


def low_rank(n, d, r, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, r, generator=g).double() @ torch.randn(r, d, generator=g).double()


def noisy(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=g).double()
        * (0.7 ** torch.arange(d))
        @ torch.linalg.qr(torch.randn(d, d, generator=g).double()).Q
    )


def reference(r, m, threshold):
    """The release's loop, on (d, n) as it writes it."""
    total = float((torch.linalg.svdvals(r) ** 2).sum())
    hat = r - m @ m.T @ r
    u, s, _ = torch.linalg.svd(hat, full_matrices=False)
    accumulated, k = (total - float((s**2).sum())) / total, 0
    for ratio in (s**2 / total).tolist():
        if accumulated >= threshold:
            break
        accumulated, k = accumulated + ratio, k + 1
    return torch.cat([m, u[:, :k]], dim=1)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.97, 0.999])
def test_three_tasks_equal_the_release(threshold):
    store, m = Subspace(torch.float64), torch.zeros(20, 0).double()
    for task, n in enumerate((50, 200, 12)):
        r = noisy(n, 20, task)
        m = reference(r.T, m, threshold)
        store.extend({"l": r}, threshold)
        basis = store.bases["l"]
        assert basis.shape == m.shape
        assert torch.allclose(basis @ basis.T, m @ m.T, atol=1e-9)
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)


def test_the_criterion_is_met_with_the_fewest_directions():
    r1, r2, store = noisy(60, 15, 0), noisy(60, 15, 1), Subspace(torch.float64)
    store.extend({"l": r1}, 0.9)
    old = store.bases["l"].clone()
    added = store.extend({"l": r2}, 0.95)["l"]
    basis = store.bases["l"]

    def share(m):
        return float((r2 @ m).square().sum() / r2.square().sum())

    assert torch.equal(basis[:, : old.shape[1]], old)  # what was there stays
    assert share(basis) >= 0.95 > share(basis[:, :-1]) and added == basis.shape[1] - old.shape[1]
    assert store.extend({"l": r2}, 0.95)["l"] == 0  # explained already


def test_full_energy_stops_at_the_rank():
    store = Subspace()
    assert store.extend({"l": low_rank(100, 30, 4, 0)}, 1.0) == {"l": 4}
    assert store.extend({"l": torch.zeros(5, 30)}, 1.0) == {"l": 0}
    assert store.extend({"l": torch.randn(100, 30, generator=torch.Generator().manual_seed(0))}, 1.0) == {"l": 26}
    assert store.extend({"l": low_rank(3, 30, 3, 9)}, 1.0) == {"l": 0}
    dw, db = store.project_out("l", torch.ones(4, 30), torch.ones(4))
    assert not dw.any() and not db.any()


def test_projected_update_has_no_effect_on_old_inputs():
    old, new = low_rank(80, 24, 6, 0).float(), torch.randn(80, 24, generator=torch.Generator().manual_seed(1))
    store = Subspace()
    store.extend({"l": old}, 1.0)
    dw = torch.randn(10, 24, generator=torch.Generator().manual_seed(2))
    kept, bias = store.project_out("l", dw)
    assert bias is None
    scale = float((old @ dw.T).abs().max())
    assert float((old @ kept.T).abs().max()) <= 1e-6 * scale
    assert float((new @ kept.T).norm() / (new @ dw.T).norm()) > 0.5
    assert torch.allclose(store.project_out("l", kept)[0], kept, atol=1e-6)  # a projection
    assert store.project_out("other", dw)[0] is dw


def test_bias_is_projected_along_or_stopped():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)), low_rank(50, 12, 4, 0).float()
    dw, db = torch.randn(7, 12), torch.randn(7)

    def call(batch):
        model(batch["x"])

    joint, apart = Subspace(), Subspace()
    joint.extend(layer_inputs(model, call, [{"x": x}], ["0"], bias=True), 1.0)
    apart.extend(layer_inputs(model, call, [{"x": x}], ["0"]), 1.0)
    assert joint.bases["0"].shape == (13, 5) and apart.bases["0"].shape == (12, 4)
    scale = float((x @ dw.T + db).abs().max())
    w, b = joint.project_out("0", dw, db)
    assert float((x @ w.T + b).abs().max()) <= 1e-6 * scale and b.any()
    w, b = apart.project_out("0", dw, db)
    assert float((x @ w.T).abs().max()) <= 1e-6 * scale and not b.any()
    with pytest.raises(BadInput):
        joint.project_out("0", dw)
    with pytest.raises(BadInput):
        apart.project_out("0", dw[:, :5])


@pytest.mark.parametrize(
    "args", [{"padding": 1}, {"padding": "same", "padding_mode": "reflect"}, {"stride": 2}, {"dilation": 2}]
)
def test_convolution_patches_and_projection(args):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3, **args), torch.randn(4, 3, 7, 7)
    flat = []
    rows = layer_inputs(nn.Sequential(conv), lambda b: flat.append(conv(b["x"])), [{"x": x}], ["0"])["0"]
    # Rows have the Gram matrix of the patches: so have the outputs.
    out = flat[0].detach() - conv.bias.detach()[:, None, None]
    w = conv.weight.detach().flatten(1).double()
    gram = torch.einsum("bohw,bphw->op", out.double(), out.double())
    assert torch.allclose(w @ (rows.T @ rows) @ w.T, gram, rtol=1e-4, atol=1e-3)
    # An update projected off the patches of x leaves the answers to x alone.
    store, dw = Subspace(), torch.randn_like(conv.weight)
    store.extend({"0": rows[:9]}, 1.0)
    kept, _ = store.project_out("0", dw)
    assert kept.shape == dw.shape and float((rows[:9].float() @ kept.flatten(1).T).abs().max()) < 1e-4
    one = nn.Conv2d(3, 5, 3, bias=False)  # and through the convolution itself: a single patch
    patch = torch.randn(1, 3, 3, 3)
    single = Subspace()
    single.extend(layer_inputs(nn.Sequential(one), lambda b: one(b["x"]), [{"x": patch}], ["0"]), 1.0)
    effect = F.conv2d(patch, single.project_out("0", dw)[0])
    assert single.rank("0") == 1 and float(effect.abs().max()) < 1e-5 * float(F.conv2d(patch, dw).abs().max())


def test_compression_keeps_the_gram_matrix():
    rows = noisy(500, 12, 0)
    small = compress(rows)
    assert small.shape == (12, 12) and torch.allclose(small.T @ small, rows.T @ rows, rtol=1e-10, atol=1e-10)
    model = nn.Sequential(nn.Linear(12, 2).double())
    data = [{"x": part} for part in rows.split(64)]
    found = layer_inputs(model, lambda b: model(b["x"]), data, ["0"])["0"]
    assert len(found) <= 24 and torch.allclose(found.T @ found, rows.T @ rows, rtol=1e-10, atol=1e-10)
    assert len(layer_inputs(model, lambda b: model(b["x"]), data[:1], ["0"], max_rows=10)["0"]) == 10


def test_inputs_are_taken_in_eval_mode_without_a_trace():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3))
    rng, x = torch.get_rng_state(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = layer_inputs(model, lambda b: model(b["x"]), [{"x": x}], ["1"])
    assert torch.equal(found["1"], x.double()) and model.training and model[0].training
    assert not model[1]._forward_pre_hooks and int(model[2].num_batches_tracked) == 0
    assert torch.equal(rng, torch.get_rng_state())


def test_holder():
    store = Subspace()
    a, b, c = (low_rank(30, 16, 3, seed) for seed in range(3))
    store.extend({"l": a}, 1.0, Ids.range(0, 10))
    first = store.bases["l"].clone()
    store.extend({"l": b, "m": b}, 1.0, Ids.range(10, 20))
    store.extend({"l": c}, 1.0, Ids.range(20, 30))
    assert isinstance(store, Holder) and store.rank("l") == 9 and store.bytes() == (9 + 3) * 16 * 4
    assert store.holds(Ids([5, 25, 99])) == Ids([5, 25])
    copy = Subspace()
    copy.load_state_dict(store.state_dict())
    assert copy.ids == store.ids and all(torch.equal(copy.bases[n], m) for n, m in store.bases.items())
    store.purge(Ids([99]))
    assert store.rank("l") == 9
    store.purge(Ids([12]))  # the third segment was made on top of the second
    assert torch.equal(store.bases["l"], first) and store.rank("m") == 0 and not store.holds(Ids([12, 25]))
    assert store.bases["l"].untyped_storage().nbytes() == 3 * 16 * 4
    copy.purge(Ids([0]))
    assert copy.bases == {} and not copy.ids


def test_wrong_input_changes_nothing():
    store = Subspace()
    store.extend({"l": low_rank(9, 6, 2, 0)}, 1.0)
    for inputs, threshold, error in (
        ({"l": torch.ones(3, 5)}, 0.9, BadInput),
        ({"m": torch.ones(3, 5), "l": torch.ones(3)}, 0.9, BadInput),
        ({"l": torch.ones(3, 6)}, 0.0, BadInput),
        ({"l": torch.full((3, 6), float("nan"))}, 0.9, NotFinite),
    ):
        with pytest.raises(error):
            store.extend(inputs, threshold)
    assert store.rank("l") == 2 and "m" not in store.bases
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4), nn.Tanh())
    for name in ("0", "2"):
        with pytest.raises(BadInput):
            layer_inputs(model, lambda b: None, [{}], [name])
    with pytest.raises(BadInput):
        layer_inputs(model, lambda b: None, [{}], ["1"])
