"""This tool against a plain PyTorch CapsNet: same network, loss and optimizer.

    pip install torch
    python benchmarks/pytorch_baseline.py [--rounds=7] [--steps=5] [--batch_size=64]

Each runs in its own process with its default settings. They take turns, and the ratio is the median
over the rounds of the ratios within a round. Training is with data deformation.
"""

import importlib.metadata
import importlib.util
import sys

import numpy as np
import timing

import datasets
import errors
import runtime

PARAMETERS = 8_215_568
TRAIN, INFER = "train step, with deformation", "inference"
HEADER = ["", "PyTorch ms", "this tool ms", "ratio (median)", "ratios"]
CALLS = {}  # of this process: what to time, by name


def pytorch(batch_size):
    """Return calls that train one step and classify one batch, in PyTorch as people write it."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - as everybody writes it
    from torch import nn

    def squash(s):
        squared = (s**2).sum(-1, keepdim=True)
        return squared / (1 + squared) * s / torch.sqrt(squared + 1e-9)

    class CapsNet(nn.Module):
        def __init__(self):
            super().__init__()
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

        def forward(self, x):
            u = self.primary(F.relu(self.conv1(x))).view(-1, 32, 8, 36)
            u = squash(u.permute(0, 1, 3, 2).reshape(-1, 1152, 8))
            u_hat = (self.W @ u[:, :, None, :, None]).squeeze(-1)
            b = torch.zeros(x.shape[0], 1152, 10)
            for r in range(3):
                v = squash((F.softmax(b, dim=2)[..., None] * u_hat).sum(dim=1))
                if r < 2:
                    b = b + (u_hat * v[:, None]).sum(-1)
            return v

    network = CapsNet()
    check_size(sum(p.numel() for p in network.parameters()))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    dataset = datasets.load_dataset("mnist", timing.ROOT / "data")
    images = torch.tensor(dataset.x_train[:batch_size, None, :, :, 0]).float() / 255
    labels = F.one_hot(torch.tensor(dataset.y_train[:batch_size]).long(), 10).float()

    def shifted(images):
        padded, moves = F.pad(images, (2, 2, 2, 2)), torch.randint(0, 5, (len(images), 2))
        return torch.stack(
            [
                image[:, y : y + 28, x : x + 28]
                for image, (y, x) in zip(padded, moves.tolist(), strict=True)
            ]
        )

    def train():
        x = shifted(images)
        v = network(x)
        length = v.norm(dim=-1)
        margin = (
            (labels * F.relu(0.9 - length) ** 2 + 0.5 * (1 - labels) * F.relu(length - 0.1) ** 2)
            .sum(1)
            .mean()
        )
        y = network.decoder((v * labels[..., None]).reshape(-1, 160))
        loss = margin + 0.0005 * ((y - x.view(-1, 784)) ** 2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def infer():
        return network(images).norm(dim=-1).numpy()

    return {TRAIN: train, INFER: infer}


def this_tool(batch_size):
    """Return calls that train one step and classify one batch with this tool."""
    runtime.start_tensorflow()
    trainer = timing.make_trainer(timing.load_digits(batch_size), batch_size)
    batch = timing.first_batch(trainer)
    check_size(trainer.network.count_params())
    return {
        TRAIN: lambda: trainer.train_step(batch).numpy(),
        INFER: timing.make_inference(trainer.network, batch),
    }


def check_size(parameters):
    """Raise RuntimeError if a network does not have the paper's number of parameters."""
    if parameters != PARAMETERS:
        raise RuntimeError(f"{parameters:,} parameters, expected {PARAMETERS:,}")


def prepare(make, batch_size):
    """Make what this process times."""
    CALLS.update(make(batch_size))


def measure(name, steps):
    """Return the median milliseconds of a call of this process."""
    return timing.milliseconds(CALLS[name], steps)


def compare(flags):
    """Let both take turns and print the table."""
    if not importlib.util.find_spec("torch"):
        raise errors.UserError(
            "PyTorch is not installed, and not needed for anything else; pip install torch"
        )
    with (
        timing.new_process(prepare, (pytorch, flags.batch_size)) as baseline,
        timing.new_process(prepare, (this_tool, flags.batch_size)) as tool,
    ):
        times = {TRAIN: [], INFER: []}  # (PyTorch, this tool) in each round
        for _ in range(flags.rounds):
            for name, pairs in times.items():
                processes = (baseline, tool)
                pairs.append([p.submit(measure, name, flags.steps).result() for p in processes])
    version = importlib.metadata.version("torch")
    print(
        f"{timing.machine()}, PyTorch {version}; batch {flags.batch_size}, {flags.rounds} rounds\n"
    )
    timing.print_table(HEADER, [row(name, np.array(pairs)) for name, pairs in times.items()])


def row(name, pairs):
    """Return the cells of what was timed: milliseconds (rounds, 2) of PyTorch and this tool."""
    baseline, tool = np.median(pairs, axis=0)
    ratios = pairs[:, 0] / pairs[:, 1]
    return [
        name,
        f"{baseline:.0f}",
        f"{tool:.0f}",
        f"{np.median(ratios):.2f}",
        f"{ratios.min():.2f} to {ratios.max():.2f}",
    ]


if __name__ == "__main__":
    sys.exit(timing.run(sys.argv, __doc__, compare, rounds=7, steps=5, batch_size=64))
