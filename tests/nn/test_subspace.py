"""GPM's basis: the identities of its SVD, and that a projected update leaves old answers alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.core.errors import BadInput, NotFinite
from remanence.core.holder import Holder
from remanence.core.ids import Ids
from remanence.nn.subspace import Subspace, compress, fewest_columns, layer_inputs, projected_layers, step_outside

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


@pytest.mark.parametrize("bias", [True, False])
def test_coordinates_and_back(bias):
    """What lies inside and what is projected out add up to the whole, as a basis of d_in and of d_in + 1."""
    store, rng = Subspace(torch.float64), torch.Generator().manual_seed(0)
    store.extend({"a": low_rank(30, 3 * 2 * 2 + bias, 4, 1)}, 1.0)
    weight = torch.randn(5, 3, 2, 2, generator=rng).double()
    b = torch.randn(5, generator=rng).double() if bias else None
    inner = store.coordinates("a", weight, b)
    assert inner.shape == (5, 4)
    inside, outside = store.inside("a", inner, weight), store.project_out("a", weight, b)
    torch.testing.assert_close(inside[0] + outside[0], weight)
    assert (inside[1] is None) is not bias
    if b is not None:
        torch.testing.assert_close(inside[1] + outside[1], b)
    torch.testing.assert_close(store.coordinates("a", *inside), inner)
    assert store.coordinates("other", weight, b).shape == (5, 0)


def test_only_the_chosen_columns_are_taken_out():
    store = Subspace(torch.float64)
    store.extend({"a": noisy(40, 9, 0)}, 0.999)
    m, weight = store.bases["a"], noisy(5, 9, 1)
    columns = (torch.arange(m.shape[1]) % 2).double()
    kept, _ = store.project_out("a", weight, columns=columns)
    assert float((kept @ m[:, 1::2]).abs().max()) < 1e-12
    torch.testing.assert_close(kept @ m[:, ::2], weight @ m[:, ::2])
    both = [store.project_out("a", weight, columns=c)[0] for c in (torch.ones(m.shape[1]).double(), None)]
    torch.testing.assert_close(both[0], both[1])
    assert torch.equal(store.project_out("a", weight, columns=torch.zeros(m.shape[1]).double())[0], weight)


def test_the_fewest_columns_are_as_few_as_any_choice():
    """Against all subsets that have the last two columns."""
    energy = torch.tensor([3.0, 0.5, 2.0, 1.0, 0.1, 0.7], dtype=torch.float64)
    for needed in (0.5, 0.9, 2.0, 3.85, 5.9, 7.0, 7.3):
        enough = [n for n in range(16) if float(energy[:4][[bool(n >> i & 1) for i in range(4)]].sum()) + 0.8 >= needed]
        uses = fewest_columns(energy, 2, needed)
        assert uses[4:].all() and float(energy[uses].sum()) >= needed
        assert int(uses.sum()) == 2 + min(n.bit_count() for n in enough)


def test_a_step_is_taken_outside_and_the_rest_goes_back():
    net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))
    layers = projected_layers(net, "who")
    assert layers["0"] == {"weight": "0.weight", "bias": "0.bias"} and layers["2"] == {"weight": "2.weight"}
    store, x = Subspace(), low_rank(20, 6, 2, 3).float()
    store.extend({"0": torch.cat([x, torch.ones(20, 1)], 1), "2": low_rank(20, 4, 1, 4)}, 1.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    answers = net[0](x).detach()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    params = dict(net.named_parameters())
    step_outside(store, layers, params, before)
    torch.testing.assert_close(net[0](x), answers, rtol=1e-4, atol=1e-4)
    assert float((net[0].weight.detach() - before["0.weight"]).norm()) > 0.5
    assert torch.equal(net[1].weight, before["1.weight"]) and torch.equal(net[1].bias, before["1.bias"])
    with torch.no_grad():
        net[0].weight.add_(1.0)
    step_outside(store, layers, {"0.weight": net[0].weight}, before)  # its bias is frozen, so neither may move
    assert torch.equal(net[0].weight, before["0.weight"])
    with pytest.raises(BadInput, match=r"who: 0 is a Conv1d.*leave who out"):
        projected_layers(nn.Sequential(nn.Conv1d(2, 2, 1)), "who")


def test_all_layers_are_found_and_rows_can_stay_whole():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.LayerNorm(2), nn.Linear(2, 2)), torch.rand(50, 3)
    whole = layer_inputs(net, lambda b: net(b["x"]), [{"x": x}], whole=True)
    assert set(whole) == {"0", "3"} and torch.equal(whole["0"], x.double()) and len(whole["3"]) == 50
    short = layer_inputs(net, lambda b: net(b["x"]), [{"x": x}], ["0"])
    assert short["0"].shape == (3, 3)
    torch.testing.assert_close(short["0"].T @ short["0"], x.double().T @ x.double())
