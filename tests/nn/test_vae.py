"""The autoencoder of embeddings."""

from __future__ import annotations

import pytest
import torch

from remanence.nn.vae import VAE


def made(dim=32, latent=4, seed=0):
    torch.manual_seed(seed)
    return VAE(dim, latent)


def test_sizes_follow_the_embedding():
    widths = [layer.out_features for layer in VAE(256, 8).modules() if isinstance(layer, torch.nn.Linear)]
    assert widths == [128, 32, 8, 8, 32, 128, 256]
    small = VAE(3, 8)  # an embedding smaller than the code
    out, mu, logvar = small(torch.randn(5, 3))
    assert out.shape == (5, 3) and mu.shape == logvar.shape == (5, 8)


def test_the_output_is_linear_and_the_code_is_mu_in_eval():
    vae, e = made().eval(), 50 * torch.randn(6, 32)
    first, mu, _ = vae(e)
    assert torch.equal(first, vae(e)[0]) and torch.equal(first, vae.decoder(mu))
    with torch.no_grad():
        vae.decoder[-1].bias.fill_(7.0)
    assert vae(e)[0].mean() > 5.0  # a sigmoid would end at 1
    vae.train()
    assert not torch.equal(vae(e)[0], vae(e)[0])


def test_the_loss_written_out():
    vae, e = made(), torch.randn(9, 32)
    torch.manual_seed(3)
    loss = vae.loss(e, weight=0.3)
    torch.manual_seed(3)
    mu, logvar = vae.mu(vae.encoder(e)), vae.logvar(vae.encoder(e))
    z = mu + logvar.div(2).exp() * torch.randn(9, 4)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, logvar.div(2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum()
    wanted = ((vae.decoder(z) - e) ** 2).sum() / 9 + 0.3 * kl / 9
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_it_knows_what_is_typical(seed):
    """Rows from the line it learned have a small error, other rows of the same length a large one."""
    rng = torch.Generator().manual_seed(seed)
    line = torch.randn(1, 32, generator=rng)
    near, other = torch.randn(400, 1, generator=rng) * line, torch.randn(400, 32, generator=rng)
    vae = made(seed=seed)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    for step in range(400):
        optimizer.zero_grad()
        vae.loss(near[step % 8 :: 8]).backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        assert vae.errors(near).mean() < 0.1 * vae.errors(other).mean()
        torch.testing.assert_close(vae.errors(near), ((vae(near)[0] - near) ** 2).sum(1))
