"""The keyed pool: which key is picked, that use evens out, and what prompts do to a transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from remanence.core.errors import BadInput
from remanence.core.rng import generator
from remanence.models import mlp, vit
from remanence.nn.anatomy import features, head, head_name, reinitialised
from remanence.nn.heads import grow_head
from remanence.nn.pool import KeyedPool, Prompted, Prompts, appended, token_blocks

SMALL = {"patch": 4, "width": 16, "depth": 3, "heads": 2, "ratio": 2}
LIKE = torch.zeros(1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool(size=5, width=8, seed=0):
    return KeyedPool(size, width, generator(seed, "pool"), LIKE)


def prompted(model=None, size=4, shared=((0,), 2), own=((1, 2), 3), seed=0):
    return Prompted(vit(64, outputs=3, **SMALL) if model is None else model, size, shared, own, seed)


def test_keys_are_picked_by_the_cosine_whatever_the_lengths():
    made, q = pool(), draw(20, 8)
    naive = torch.tensor([[1 - float(torch.cosine_similarity(a, b, dim=0)) for b in made.keys.detach()] for a in q])
    torch.testing.assert_close(made.distances(q).detach(), naive, atol=1e-6, rtol=0)
    assert torch.equal(made.select(q, 3), naive.argsort(dim=1)[:, :3])
    with torch.no_grad():
        made.keys *= torch.tensor([0.1, 1, 10, 100, 1000])[:, None]
    assert torch.equal(made.select(7 * q, 3), naive.argsort(dim=1)[:, :3])
    among = made.distances(made.keys).detach()
    assert float(among.diagonal().max()) < 1e-6 and float(among.min()) >= 0


def test_use_counts_where_it_is_asked_for_and_nowhere_else():
    made, q = pool(), draw(20, 8)
    first = made.select(q)
    made.count(first)
    assert made.counts.tolist() == first.flatten().bincount(minlength=5).tolist() and made.counts.sum() == 20
    assert torch.equal(made.select(q), first)
    by_hand = (made.distances(q) * (made.counts + 1)).argmin(1, keepdim=True)
    assert torch.equal(made.select(q, balanced=True), by_hand) and not torch.equal(by_hand, first)
    made.count(torch.tensor([[0, 1], [0, 2]]))  # of the k picks of a row each counts
    assert (made.counts - first.flatten().bincount(minlength=5)).tolist() == [2, 1, 1, 0, 0]
    assert "counts" in made.state_dict()


@pytest.mark.parametrize("rows", [1, 7])
def test_use_of_identical_keys_differs_by_one_call_at_most(rows):
    made = pool()
    with torch.no_grad():
        made.keys.copy_(made.keys[0].expand(5, -1).clone())
    for call in range(23):
        made.count(made.select(draw(rows, 8, seed=call), balanced=True))
        assert made.counts.max() - made.counts.min() <= rows
    assert made.counts.sum() == 23 * rows and made.counts.min() >= 4 * rows


def test_balanced_use_is_more_even_than_nearest():
    q = draw(400, 8) + 2  # all on one side
    spread = []
    for balanced in (False, True):
        made = pool()
        for part in q.split(10):
            made.count(made.select(part, balanced=balanced))
        spread.append(float(made.counts.double().std()))
    assert spread[1] < spread[0] / 3


def test_prompts_of_the_picked_entries_stand_one_after_the_other():
    made = Prompts(4, [0, 2], 3, 8, generator(0, "prompts"), LIKE)
    chosen = torch.tensor([[1, 3], [0, 0]])
    tokens = made(chosen)
    assert set(tokens) == {0, 2} and tokens[0].shape == (2, 6, 8)
    for i, number in enumerate((0, 2)):
        for row in range(2):
            by_hand = torch.cat([made.values[entry, i] for entry in chosen[row]])
            assert torch.equal(tokens[number][row], by_hand)
    tokens[2][0].sum().backward()
    touched = made.values.grad.abs().sum((2, 3)) > 0
    assert touched.nonzero().tolist() == [[1, 1], [3, 1]]  # only what was picked, only its block


@pytest.mark.parametrize("kind", ["mean", "token"])
def test_blocks_read_the_tokens_and_give_their_own(kind):
    model = vit(64, outputs=3, pool=kind, **SMALL).eval()
    x, extra = draw(6, 64), draw(6, 2, 16, seed=1)
    plain = model(x)
    with appended(model.blocks, {1: extra}):
        found = model(x)
    h = model.tokens(model.patches(x.reshape(-1, 1, 8, 8)).flatten(2).transpose(1, 2))
    count = h.shape[1]
    h = model.blocks[0](h)
    h = model.blocks[1](torch.cat([h, extra], 1))[:, :count]
    h = model.norm(model.blocks[2](h))
    torch.testing.assert_close(found, model.head(h.mean(1) if kind == "mean" else h[:, 0]))
    assert float((found - plain).detach().abs().max()) > 1e-3
    assert torch.equal(model(x), plain)  # nothing is left behind
    with appended(model.blocks, {1: extra[:, :0], 2: extra[:, :0]}):
        assert torch.equal(model(x), plain)
    with appended(model.blocks, {1: extra.flip(1)}):
        torch.testing.assert_close(model(x), found)  # tokens beside the input are a set


def test_tokens_of_another_width_are_refused_and_leave_nothing_behind():
    model = vit(64, outputs=3, **SMALL).eval()
    plain = model(draw(6, 64))
    with pytest.raises(BadInput, match="8 wide"), appended(model.blocks, {0: draw(6, 2, 8)}):
        model(draw(6, 64))
    assert torch.equal(model(draw(6, 64)), plain)


def test_blocks_are_found_in_other_transformers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2)
    assert token_blocks(encoder) is encoder.layers
    x, extra = draw(3, 5, 16), draw(3, 2, 16, seed=1)
    with appended(token_blocks(encoder), {1: extra}):
        found = encoder(x)
    by_hand = encoder.layers[1](torch.cat([encoder.layers[0](x), extra], 1))[:, :5]
    torch.testing.assert_close(found, by_hand)
    with pytest.raises(BadInput, match="0 lists of blocks"):
        token_blocks(mlp(64, [8]))


def test_a_prompted_network_is_its_formula():
    model = vit(64, outputs=3, pool="token", **SMALL).eval()
    made, x = prompted(copy.deepcopy(model)).eval(), draw(9, 64)
    q = made.query(x)
    torch.testing.assert_close(q, features(model, x).detach())
    chosen = made.pool.distances(q).argmin(1)
    assert len(chosen.unique()) > 1
    for row, key in enumerate(chosen.tolist()):
        tokens = {0: made.shared.values[:1, 0], 1: made.own.values[key, 0][None], 2: made.own.values[key, 1][None]}
        with appended(model.blocks, tokens):
            torch.testing.assert_close(made(x[row : row + 1]), model(x[row : row + 1]))
    both = prompted(copy.deepcopy(model), shared=((1,), 2), own=((1,), 3)).eval()
    chosen = both.choose(both.query(x))
    tokens = torch.cat([both.shared.values[:, 0].expand(9, -1, -1), both.own.values[chosen[:, 0], 0]], 1)
    with appended(model.blocks, {1: tokens}):
        torch.testing.assert_close(both(x), model(x))


def test_without_blocks_it_is_the_network_itself():
    model = vit(64, outputs=3, **SMALL).eval()
    made = prompted(copy.deepcopy(model), shared=((), 2), own=((), 3)).eval()
    assert torch.equal(made(draw(9, 64)), model(draw(9, 64)))


def test_keys_are_balanced_only_inside_balancing_and_only_in_training():
    made, x = prompted(), draw(40, 64)
    q = made.query(x)
    nearest = made.pool.select(q)
    most = nearest.mode(0).values
    made.pool.count(most.expand(1000, 1))
    even = made.pool.select(q, balanced=True)
    assert (nearest == most).any() and not (even == most).any()
    made.train()
    assert torch.equal(made.choose(q), nearest)
    with made.balancing():
        assert torch.equal(made.choose(q), even)
        made.eval()
        assert torch.equal(made.choose(q), nearest)
    assert not made.balanced


def test_the_body_never_drops_out_and_gets_its_gradient_through_prompts_only():
    made, x = prompted(vit(64, outputs=3, dropout=0.5, **SMALL)), draw(9, 64)
    assert made.train().training and torch.equal(made(x), made(x))
    assert not any(module.training for module in made.body.modules())
    assert not made.query(x).requires_grad
    made(x).sum().backward()
    assert made.own.values.grad is not None and made.shared.values.grad.abs().sum() > 0 and made.pool.keys.grad is None


def test_head_growth_copies_and_new_draws_work_on_it():
    made, x = prompted(vit(64, outputs=3, **SMALL)).eval(), draw(9, 64)
    assert head_name(made) == "head" and head(made).out_features == 3
    before = made(x)
    grow_head(made, 2, 0)
    torch.testing.assert_close(made(x)[:, :3], before)
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    made.pool.count(torch.zeros(3, 1, dtype=torch.int64))
    fresh, again = reinitialised(made, 1), reinitialised(made, 1)
    assert fresh.pool.counts.sum() == 0 and torch.equal(fresh.own.values, again.own.values)
    assert not torch.equal(fresh.own.values, made.own.values) and not torch.equal(fresh.pool.keys, made.pool.keys)
    one, other = prompted(seed=3), prompted(seed=3)
    assert torch.equal(one.pool.keys, other.pool.keys) and not torch.equal(one.pool.keys, prompted(seed=4).pool.keys)


def test_blocks_that_are_not_there_are_refused_by_number():
    with pytest.raises(BadInput, match=r"blocks \[3, 7\], and the network has blocks 0 to 2"):
        prompted(shared=((0, 7), 2), own=((3,), 2))
    with pytest.raises(BadInput, match="ModuleList"):
        prompted(mlp(64, [8], 3))
