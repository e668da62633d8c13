"""A small variational autoencoder of vectors: what is typical of a set of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VAE(nn.Module):
    """Encoder dim -> dim/2 -> dim/8 -> (mu, log sigma^2) of `latent` numbers, the decoder its mirror with a linear output.

    ``loss = mean over rows of ||decode(z) - e||^2 + weight * KL(N(mu, sigma^2) || N(0, 1))``, in train mode with
    z = mu + sigma * noise from torch's generator, in eval mode with z = mu, so that the same row has the same error twice.
    """

    def __init__(self, dim: int, latent: int) -> None:
        super().__init__()
        wide, narrow = max(dim // 2, latent), max(dim // 8, latent)
        self.encoder = nn.Sequential(nn.Linear(dim, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU())
        self.mu, self.logvar = nn.Linear(narrow, latent), nn.Linear(narrow, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, dim)
        )

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """e (B, dim) to its reconstruction (B, dim), mu and log sigma^2 (B, latent)."""
        inner = self.encoder(e)
        mu, logvar = self.mu(inner), self.logvar(inner)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu) if self.training else mu
        return self.decoder(z), mu, logvar

    def errors(self, e: Tensor) -> Tensor:
        """Squared distance of each row e (B, dim) from its reconstruction: (B,)."""
        made, _, _ = self.forward(e)
        return (made - e).square().sum(1)

    def loss(self, e: Tensor, weight: float = 0.025) -> Tensor:
        """The training loss on e (B, dim), a scalar; `weight` of the divergence."""
        made, mu, logvar = self.forward(e)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
        return ((made - e).square().sum(1) + weight * divergence).mean()
