"""The network in PyTorch that the benchmark times is this tool's network.

Skipped where PyTorch is not installed; nothing but the benchmark needs it.
"""

import numpy as np
import pytest
import tensorflow as tf

from model import CapsNet

torch = pytest.importorskip("torch")

import pytorch_baseline  # noqa: E402 - needs torch
from benchmark_lib import pytorch_capsnet  # noqa: E402
from benchmark_lib.pytorch_capsnet import Options, make_calls, shift  # noqa: E402


@pytest.mark.parametrize("name", pytorch_baseline.PYTORCH)
def test_pytorch_computes_what_this_tool_does(name, monkeypatch):
    options = Options(**dict.fromkeys(pytorch_baseline.PYTORCH[name], True))
    if options.compiled and not pytorch_baseline.find_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (4, 1, 28, 28, 1)).astype(np.uint8)
    classes, moves = np.array([[3], [0], [9], [3]]), np.zeros((4, 1, 2), np.int32)
    network = CapsNet((28, 28, 1), 10)
    # Capsules so long that it does not matter where squash has its epsilon.
    network.primary.kernel.assign(5 * network.primary.kernel)
    with tf.GradientTape() as tape:
        outputs = network.outputs((tf.constant(digits), moves, tf.constant(classes), np.ones(4)))
        loss = tf.reduce_mean(outputs.margin_loss + 0.0005 * outputs.reconstruction_loss)
    kernel_gradient = tape.gradient(loss, network.conv1.kernel.value)

    module = pytorch_capsnet.CapsNet(options)
    with torch.no_grad():
        for layer, other in (
            (network.conv1, module.conv1),
            (network.primary, module.primary),
            *zip((*network.decoder.hidden, network.decoder.pixels), module.decoder[::2],
                 strict=True),
        ):  # fmt: skip
            kernel = layer.kernel.numpy()
            order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            other.weight.copy_(torch.tensor(kernel.transpose(order)))
            other.bias.copy_(torch.tensor(layer.bias.numpy()))
        # There the capsules of one type follow each other, here those of one position.
        weights = network.digits.W.numpy().reshape(10, 36, 32, 8, 16).transpose(2, 1, 0, 4, 3)
        module.W.copy_(torch.tensor(weights.reshape(1, 1152, 10, 16, 8)))
    monkeypatch.setattr(pytorch_capsnet, "shift", lambda images: images)
    images = torch.tensor(digits[:, 0].transpose(0, 3, 1, 2)).float() / 255
    labels = torch.eye(10)[torch.tensor(classes[:, 0])]
    train, infer = make_calls(module, images, labels)
    exactness = 0.03 if options.bfloat16 else 1e-4
    np.testing.assert_allclose(infer(), outputs.lengths, rtol=exactness, atol=exactness)
    assert train() == pytest.approx(float(loss), rel=exactness)
    gradient = module.conv1.weight.grad.numpy().transpose(2, 3, 1, 0)
    scale = np.abs(kernel_gradient).max()
    np.testing.assert_allclose(gradient, kernel_gradient, atol=2 * exactness * scale)


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
