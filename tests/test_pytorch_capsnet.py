"""The network in PyTorch that the benchmark times is this tool's network.

Skipped where PyTorch is not installed; nothing but the benchmark needs it.
"""

import numpy as np
import pytest
import tensorflow as tf

import ops
from capsnet import config
from model import CapsNet

torch = pytest.importorskip("torch")

from benchmark_lib import pytorch_capsnet  # noqa: E402 - needs torch
from benchmark_lib.pytorch_capsnet import Options, make_calls, shift  # noqa: E402

OPTIONS = [
    Options(),
    Options(channels_last=True),
    Options(einsum=True),
    Options(channels_last=True, einsum=True),
    Options(channels_last=True, einsum=True, bfloat16=True),
]


@pytest.fixture(scope="module")
def network():
    tf.keras.utils.set_random_seed(0)
    network = CapsNet((28, 28, 1), 10, conv="direct")
    stream = np.random.default_rng(0)
    for bias in (network.conv1.bias, network.primary.bias):
        bias.assign(0.1 * stream.standard_normal(bias.shape))
    return network


def copy_weights(network, copy):
    """Give the network in PyTorch the weights of this tool's network."""
    values = {variable.path: variable.numpy() for variable in network.variables}
    # Capsule i is position · 32 + type here, type · 36 + position there.
    order = np.arange(1152).reshape(36, 32).T.ravel()
    weights = np.transpose(values["digit_capsules/W"][:, order], (1, 0, 3, 2))[None]
    pairs = {copy.W: weights}
    for layer, name in (copy.conv1, "conv1"), (copy.primary, "primary_capsules"):
        pairs[layer.weight] = np.transpose(values[f"{name}/kernel"], (3, 2, 0, 1))
        pairs[layer.bias] = values[f"{name}/bias"]
    for layer, name in zip(copy.decoder[::2], ("hidden_1", "hidden_2", "pixels"), strict=True):
        pairs[layer.weight] = values[f"decoder/{name}/kernel"].T
        pairs[layer.bias] = values[f"decoder/{name}/bias"]
    with torch.no_grad():
        for parameter, value in pairs.items():
            parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
    assert {id(parameter) for parameter in copy.parameters()} == {id(each) for each in pairs}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_all_options_it_computes_the_lengths_and_the_loss_of_this_tool(network, options):
    stream = np.random.default_rng(1)
    images = stream.integers(0, 256, (4, 28, 28, 1), np.uint8)
    labels = np.array([3, 1, 4, 1])
    copy = pytorch_capsnet.CapsNet(options)
    copy_weights(network, copy)
    inputs = torch.tensor(images.transpose(0, 3, 1, 2)).float() / 255
    _, infer = make_calls(copy, inputs, torch.eye(10)[labels])
    tolerance = 0.02 if options.bfloat16 else 1e-4
    x = images / np.float32(255)
    lengths, capsules = network(x)
    np.testing.assert_allclose(infer(), lengths, atol=tolerance)
    mask = ops.label_mask(labels[:, None], 10)
    targets = tf.one_hot(labels, 10)
    reconstructions = network.decoder(capsules, mask)
    loss = tf.reduce_mean(
        ops.margin_loss(lengths, targets)
    ) + config.TrainingConfig().reconstruction_weight * (
        tf.reduce_mean(ops.reconstruction_loss(x[:, None], reconstructions))
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        there = copy.loss(inputs, torch.eye(10)[labels])
    assert there.item() == pytest.approx(loss.numpy(), rel=tolerance)


def test_a_step_lowers_the_loss_and_shifts_move_whole_images():
    images = np.zeros((8, 28, 28, 1), np.uint8)
    images[:, 10:18, 12:16] = 255
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    train, _ = make_calls(
        pytorch_capsnet.CapsNet(Options(einsum=True)), x, torch.eye(10)[[0, 1] * 4]
    )
    losses = [train() for _ in range(30)]
    assert losses[-1] < losses[0]
    for before, after in zip(x, shift(x), strict=True):
        assert any(
            torch.equal(torch.roll(before, (dy, dx), (1, 2)), after)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        )
