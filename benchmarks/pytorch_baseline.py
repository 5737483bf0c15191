"""This tool against a plain PyTorch CapsNet: same network, loss and optimizer.

    pip install torch
    python benchmarks/pytorch_baseline.py [--rounds=7] [--steps=5] [--batch_size=64]

Each runs in a process of its own with its default settings; they take turns, and the ratio is the
median over the rounds of the ratios within a round. Training is with data deformation.
"""

import argparse
import importlib.util
import subprocess
import sys

import numpy as np
import timing

import utils

PARAMETERS = 8_215_568


def pytorch(batch_size):
    """Calls that train one step and classify one batch, in PyTorch as people write it."""
    import torch
    import torch.nn.functional as F
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
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
    dataset = utils.load_dataset("mnist", timing.ROOT / "data")
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

    return train, infer


def ours(batch_size):
    utils.keep_big_buffers()
    trainer, batch = timing.make_trainer(batch_size)
    assert trainer.model.count_params() == PARAMETERS
    return lambda: trainer.train_step(batch).numpy(), timing.make_inference(trainer, batch)


def work(make, batch_size):
    """Answer each line "WAY STEPS" of the input with the median milliseconds of a call."""
    calls = make(batch_size)
    for call in calls:
        call()
    print("ready", flush=True)
    for line in sys.stdin:
        way, steps = map(int, line.split())
        print(timing.milliseconds(calls[way], steps), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--worker", choices=["pytorch", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work({"pytorch": pytorch, "ours": ours}[args.worker], args.batch_size)
    if not importlib.util.find_spec("torch"):
        sys.exit("PyTorch is not installed, and not needed for anything else: pip install torch")
    workers = {}
    for name in ("pytorch", "ours"):
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, f"--worker={name}", f"--batch_size={args.batch_size}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workers[name].stdout.readline()
    times = {(name, way): [] for name in workers for way in (0, 1)}
    for _ in range(args.rounds):
        for (name, way), found in times.items():
            workers[name].stdin.write(f"{way} {args.steps}\n")
            workers[name].stdin.flush()
            found.append(float(workers[name].stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    import torch

    print(
        f"{timing.machine()}, PyTorch {torch.__version__}; batch {args.batch_size}, "
        f"{args.rounds} rounds\n"
    )
    rows = []
    for way, what in enumerate(("train step, with deformation", "inference")):
        theirs, our = np.array(times["pytorch", way]), np.array(times["ours", way])
        ratio = theirs / our
        rows.append(
            [
                what,
                f"{np.median(theirs):.0f}",
                f"{np.median(our):.0f}",
                f"{np.median(ratio):.2f}",
                f"{ratio.min():.2f} to {ratio.max():.2f}",
            ]
        )
    timing.table(["", "PyTorch ms", "this tool ms", "ratio (median)", "ratios"], rows)
    return None


if __name__ == "__main__":
    main()
