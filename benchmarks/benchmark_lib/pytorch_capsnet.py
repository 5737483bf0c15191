"""A CapsNet in PyTorch, as people write it and as fast as its options make it.

Shapes: B images, I = 1152 lower capsules of C = 8 channels, J = 10 upper capsules of dimension
D = 16.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import nn


class Options(NamedTuple):
    """What makes PyTorch faster than it is by default."""

    channels_last: bool = False  # layout of images and kernels
    einsum: bool = False  # routing by batched products, and Adam as one fused operation
    bfloat16: bool = False  # autocast
    compiled: bool = False  # torch.compile


def squash(s):
    """Shrink each vector to a length below 1 (eq. 1)."""
    squared = (s**2).sum(-1, keepdim=True)
    return squared / (1 + squared) * s / torch.sqrt(squared + 1e-9)


def votes(u, weights):
    """Compute the votes with one small product for each: (B, I, C) -> (B, I, J, D)."""
    return (weights @ u[:, :, None, :, None]).squeeze(-1)


def routing(u_hat):
    """Route votes by agreement (procedure 1), by sums of products: (B, I, J, D) -> (B, J, D)."""
    b = torch.zeros(u_hat.shape[:3])
    for r in range(3):
        v = squash((F.softmax(b, dim=2)[..., None] * u_hat).sum(dim=1))
        if r < 2:
            b = b + (u_hat * v[:, None]).sum(-1)
    return v


def einsum_votes(u, weights):
    """Compute the votes as one product, batched over I: (B, I, C) -> (B, J, I, D)."""
    return torch.einsum("ijdc,bic->bjid", weights[0], u)


def einsum_routing(u_hat):
    """Route votes by agreement, by batched products: (B, J, I, D) -> (B, J, D)."""
    b = torch.zeros(u_hat.shape[:3])
    for r in range(3):
        v = squash(torch.einsum("bji,bjid->bjd", F.softmax(b, dim=1), u_hat))
        if r < 2:
            b = b + torch.einsum("bjid,bjd->bji", u_hat, v)
    return v


class CapsNet(nn.Module):
    """The paper's network for MNIST.

    Args:
        options: Options.
    """

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.conv1 = nn.Conv2d(1, 256, 9)
        self.primary = nn.Conv2d(256, 256, 9, stride=2)
        self.W = nn.Parameter(0.1 * torch.randn(1, 1152, 10, 16, 8))
        self.decoder = nn.Sequential(
            nn.Linear(160, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, 784),
            nn.Sigmoid(),
        )
        if options.channels_last:
            self.conv1.to(memory_format=torch.channels_last)
            self.primary.to(memory_format=torch.channels_last)

    def forward(self, x):
        """Compute the digit capsules: (B, 1, 28, 28) -> (B, J, D)."""
        if self.options.channels_last:
            x = x.to(memory_format=torch.channels_last)
        u = self.primary(F.relu(self.conv1(x)))
        u = squash(u.reshape(-1, 32, 8, 36).permute(0, 1, 3, 2).reshape(-1, 1152, 8))
        if self.options.einsum:
            return einsum_routing(einsum_votes(u, self.W))
        return routing(votes(u, self.W))

    def loss(self, x, labels):
        """Compute the loss of images (B, 1, 28, 28) with labels (B, J) of zeros and ones."""
        v = self(x)
        length = v.norm(dim=-1)
        margin = (
            (labels * F.relu(0.9 - length) ** 2 + 0.5 * (1 - labels) * F.relu(length - 0.1) ** 2)
            .sum(1)
            .mean()
        )
        y = self.decoder((v * labels[..., None]).reshape(-1, 160))
        return margin + 0.0005 * ((y - x.reshape(-1, 784)) ** 2).sum(1).mean()


def shift(images):
    """Shift each image by up to 2 pixels in each direction, zeros shifted in."""
    padded, moves = F.pad(images, (2, 2, 2, 2)), torch.randint(0, 5, (len(images), 2))
    return torch.stack(
        [
            image[:, y : y + 28, x : x + 28]
            for image, (y, x) in zip(padded, moves.tolist(), strict=True)
        ]
    )


def make_calls(network, images, labels):
    """Return a call that trains one step with shifted images, and one that classifies them.

    Args:
        network: CapsNet.
        images: (B, 1, 28, 28) in [0, 1].
        labels: (B, J) of zeros and ones.
    """
    options = network.options
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=options.einsum or None)
    loss_of, capsules_of = network.loss, network.forward
    if options.compiled:  # frozen: the compiler may prepare the weights
        loss_of = torch.compile(loss_of)
        capsules_of = torch.compile(capsules_of, options={"freezing": True})

    def precision():
        return torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16)

    def train():
        with precision():
            loss = loss_of(shift(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def infer():
        with precision():
            return capsules_of(images).norm(dim=-1).float().numpy()

    return train, infer
