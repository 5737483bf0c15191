"""The paper's CapsNet in PyTorch, as people write it and as fast as it gets.

Imported by `pytorch_baseline.py`, in processes without TensorFlow.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import nn

DECODER_UNITS = (512, 1024)


class Variant(NamedTuple):
    """What is done to make the network faster."""

    channels_last: bool = False  # memory layout of images and convolutions
    einsum: bool = False  # votes and routing as products of matrices
    compiled: bool = False  # by torch.compile
    bfloat16: bool = False  # automatic mixed precision


def squash(s):
    """Shrink each vector to a length below 1 (eq. 1)."""
    squared = (s**2).sum(-1, keepdim=True)
    return squared / (1 + squared) * s / torch.sqrt(squared + 1e-9)


class CapsNet(nn.Module):
    """The network of section 4 for 28×28 pixels.

    Args:
        einsum: whether votes and routing are products of matrices.
    """

    def __init__(self, einsum=False):
        super().__init__()
        self.einsum = einsum
        self.conv1 = nn.Conv2d(1, 256, 9)
        self.primary = nn.Conv2d(256, 256, 9, stride=2)
        self.W = nn.Parameter(0.1 * torch.randn(1, 1152, 10, 16, 8))
        self.decoder = nn.Sequential(
            nn.Linear(160, DECODER_UNITS[0]),
            nn.ReLU(),
            nn.Linear(*DECODER_UNITS),
            nn.ReLU(),
            nn.Linear(DECODER_UNITS[1], 784),
            nn.Sigmoid(),
        )

    def forward(self, x):
        """Compute the digit capsules (B, 10, 16) of images (B, 1, 28, 28)."""
        u = self.primary(F.relu(self.conv1(x))).reshape(-1, 32, 8, 36)
        u = squash(u.permute(0, 1, 3, 2).reshape(-1, 1152, 8).float())
        return self.route_products(u) if self.einsum else self.route(u)

    def route(self, u):
        """Route as most implementations do, with the votes as (B, 1152, 10, 16)."""
        u_hat = (self.W @ u[:, :, None, :, None]).squeeze(-1).float()
        b = torch.zeros(u.shape[0], 1152, 10)
        for r in range(3):
            v = squash((F.softmax(b, dim=2)[..., None] * u_hat).sum(dim=1))
            if r < 2:
                b = b + (u_hat * v[:, None]).sum(-1)
        return v

    def route_products(self, u):
        """Route with products of matrices, the votes as (B, 10, 1152, 16)."""
        u_hat = torch.einsum("bik,ijdk->bjid", u, self.W[0]).float()
        b = torch.zeros(u.shape[0], 10, 1152)
        for r in range(3):
            v = squash(torch.einsum("bji,bjid->bjd", F.softmax(b, dim=1), u_hat).float())
            if r < 2:
                b = b + torch.einsum("bjid,bjd->bji", u_hat, v).float()
        return v

    def loss(self, x, labels):
        """Compute margin loss (eq. 4) and reconstruction loss, averaged over the batch.

        Args:
            x: (B, 1, 28, 28).
            labels: (B, 10), one-hot.
        """
        v = self(x)
        length = v.norm(dim=-1)
        margin = labels * F.relu(0.9 - length) ** 2 + 0.5 * (1 - labels) * F.relu(length - 0.1) ** 2
        y = self.decoder((v * labels[..., None]).reshape(-1, 160))
        error = (y.float() - x.reshape(-1, 784)) ** 2
        return margin.sum(1).mean() + 0.0005 * error.sum(1).mean()

    def lengths(self, x):
        """Compute the lengths of the digit capsules (B, 10)."""
        return self(x).norm(dim=-1)


def shifted(images):
    """Shift each image by up to 2 pixels in each direction."""
    padded, moves = F.pad(images, (2, 2, 2, 2)), torch.randint(0, 5, (len(images), 2))
    return torch.stack(
        [
            image[:, y : y + 28, x : x + 28]
            for image, (y, x) in zip(padded, moves.tolist(), strict=True)
        ]
    )


def calls(variant, images, labels):
    """Return the calls to time.

    Args:
        variant: Variant.
        images: (B, 28, 28, 1) uint8 array.
        labels: (B,) array.

    Returns:
        A call that trains one step on shifted images and returns the loss, a call that returns the
        lengths (B, 10), and the CapsNet.
    """
    network = CapsNet(variant.einsum)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    for convolution in (network.conv1, network.primary):
        convolution.to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    targets = F.one_hot(torch.tensor(labels).long(), 10).float()
    loss_of, lengths_of = network.loss, network.lengths
    if variant.compiled:
        loss_of, lengths_of = torch.compile(loss_of), torch.compile(lengths_of)

    def precision():
        return torch.autocast("cpu", torch.bfloat16, enabled=variant.bfloat16)

    def train():
        inputs = shifted(x).to(memory_format=layout)
        optimizer.zero_grad()
        with precision():
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def infer():
        with precision():
            return lengths_of(x.to(memory_format=layout)).float().numpy()

    return train, infer, network
