"""What an epoch consists of, and its batches.

A plan is a pure function of (seed, epoch): which images, in which order, with which partners and
shifts. So an epoch does not depend on the batch size, the number of replicas or the compiler, and
resuming in the middle of it is a slice.

Shapes: N examples, B examples in a batch, K images in each (1, or 2 for MultiMNIST), H×W pixels,
C channels.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from capsnet_core import config
from capsnet_core.errors import UserError
from utils import random_stream


class Plan(NamedTuple):
    """The examples of an epoch or an evaluation, in order. A batch is a slice of both arrays."""

    index: np.ndarray  # (N, K) int32, which images of the data
    shift: np.ndarray  # (N, K, 2) int32, pixels down and right

    def take(self, examples):
        """Return the plan of these examples only, given by a slice or by their numbers."""
        return Plan(self.index[examples], self.shift[examples])


class Examples(NamedTuple):
    """Images with their labels, and how an example is made of them."""

    images: np.ndarray  # (n, H, W, C) uint8
    labels: np.ndarray  # (n,)
    padding: int = 0  # pixels of canvas around an image
    max_shift: int = 0  # pixels, the bound of the shift drawn for each image
    overlap: bool = False  # whether an example is two overlapping images
    class_names: tuple = config.DIGITS  # by label
    background: np.ndarray | None = None  # (C,) uint8, what shifts fill in; by default black

    @property
    def digits_per_example(self):
        """Return K."""
        return 2 if self.overlap else 1

    def canvas_shape(self):
        """Return (H', W', C) of the composed images."""
        _, height, width, channels = self.images.shape
        return (height + 2 * self.padding, width + 2 * self.padding, channels)

    def margin(self):
        """Return how many pixels of background each image gets on all sides, so that it can shift.

        Shifts fill in zeros, so a black background needs none.
        """
        black = self.background is None or not np.any(self.background)
        return 0 if black else self.max_shift + self.padding

    def subset(self, indices):
        """Return the same data, reduced to the images at these indices."""
        return self._replace(images=self.images[indices], labels=self.labels[indices])

    def training_plan(self, seed, epoch):
        """Plan an epoch: each image once, shuffled, a pure function of the seed and the epoch.

        Each image is shifted by -max_shift..max_shift pixels along each axis. For overlap, each
        gets a partner, drawn in each epoch from the images of all other classes (section 6.1).

        Raises:
            UserError: there are fewer than two classes to make pairs of, or a negative seed.
        """
        # Draw by image, then reorder, so an image's shift does not depend on its position.
        index = np.arange(len(self.labels))[:, None]
        if self.overlap:
            stream = random_stream(seed, epoch, "partner")
            index = np.column_stack([index, _draw_partners(self.labels, index[:, 0], stream)])
        shift = _draw_shifts(index.shape, self.max_shift, random_stream(seed, epoch, "shift"))
        order = random_stream(seed, epoch, "order").permutation(len(self.labels))
        return Plan(index[order].astype(np.int32), shift[order])

    def evaluation_plan(self, pairs_per_image=1):
        """Plan an evaluation: all images in order and unshifted, or overlapping pairs.

        Pairs and shifts do not depend on the user's seed, so runs can be compared. Each image comes
        first in `pairs_per_image` pairs (1,000 in the paper); the first pairs of all come first.

        Raises:
            UserError: there are fewer than two classes to make pairs of.
        """
        index = np.arange(len(self.labels), dtype=np.int32)[:, None]
        if not self.overlap:
            return Plan(index, np.zeros((*index.shape, 2), np.int32))
        index = np.tile(index, (pairs_per_image, 1))
        stream = random_stream(0, 0, "evaluation partner")
        partners = _draw_partners(self.labels, index[:, 0], stream)
        index = np.column_stack([index, partners.astype(np.int32)])
        stream = random_stream(0, 0, "evaluation shift")
        return Plan(index, _draw_shifts(index.shape, self.max_shift, stream))


def split_validation(n, seed):
    """Hold out a sixth (n // 6) of n training images, chosen by the seed.

    Return the indices to train on and those to validate with, both sorted, int64. Raise UserError
    if there are fewer than 6 images.
    """
    if n < 6:
        raise UserError(f"{n} training images, expected at least 6 to hold out a sixth; use more")
    held_out = np.zeros(n, bool)
    held_out[random_stream(seed, 0, "validation").permutation(n)[: n // 6]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draw_partners(labels, firsts, stream):
    """For each image in `firsts`, draw one uniformly from the images of all other classes."""
    counts = np.bincount(labels)
    classes = np.count_nonzero(counts)
    if classes < 2:
        raise UserError(f"images of {classes} class, expected two to make pairs; use more images")
    by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    own_class = labels[firsts]
    rank = stream.integers(0, len(labels) - counts[own_class])
    rank += np.where(rank >= starts[own_class], counts[own_class], 0)  # skip its own class
    return by_class[rank]


def _draw_shifts(shape, max_shift, stream):
    return stream.integers(-max_shift, max_shift, (*shape, 2), np.int32, endpoint=True)


def batches(data, plan, batch_size, start=0, strategy=None):
    """Iterate over the batches of a plan; they are prepared while earlier ones are in use.

    The last batch is padded with images of weight 0, so all batches have one shape. The n real
    images of a batch have weight 1/n, so a weighted sum is their mean. Under a strategy, each
    replica gets a consecutive part of every batch, and the last part is padded in the same way.

    Args:
        data: Examples.
        plan: Plan for this data.
        batch_size: examples in a batch, over all replicas.
        start: number of the first batch.
        strategy: tf.distribute.Strategy; by default the current one.

    Returns:
        Iterable of (images (B, K, H, W, C) uint8, shift (B, K, 2), labels (B, K), weight (B,)),
        with PerReplica values under a strategy of several replicas. Images have a margin all around
        (see `Examples.margin`) if the background is not black.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    examples, weights = _layout(len(plan.index), batch_size, replicas)
    examples, weights = examples[start:], weights[start:]

    def pipeline(context):
        local = replicas // context.num_input_pipelines
        first = local * context.input_pipeline_id
        # (steps, replicas, part) -> (steps * local, part): one element for each local replica
        local_examples = examples[:, first : first + local].reshape(-1, examples.shape[-1])
        local_weights = weights[:, first : first + local].reshape(local_examples.shape)
        with tf.device("cpu"):
            images, labels = tf.constant(data.images), tf.constant(data.labels)

        def gather(index, shift, weight):
            chosen = tf.gather(images, index)
            if margin := data.margin():
                chosen = surround(chosen, margin, data.background)
            return chosen, shift, tf.gather(labels, index), weight

        parts = (*plan.take(local_examples), local_weights)
        return tf.data.Dataset.from_tensor_slices(parts).map(gather).prefetch(2 * local)

    return strategy.distribute_datasets_from_function(pipeline)


def surround(images, margin, background):
    """Put a margin of M pixels around images: (B, K, H, W, C) -> (B, K, H + 2·M, W + 2·M, C)."""
    sides = [[0, 0], [0, 0], [margin, margin], [margin, margin], [0, 0]]
    inside = tf.pad(tf.ones_like(images, tf.bool), sides)
    return tf.where(inside, tf.pad(images, sides), tf.constant(background, images.dtype))


def _layout(n, batch_size, replicas):
    """Lay out n examples in batches, and each batch in equal parts for the replicas.

    Returns:
        The examples' numbers (steps, replicas, part) int, 0 where there is none, and their weights
        of the same shape, float32: in each step they add up to 1, and are 0 where there is none.
    """
    steps, part = math.ceil(n / batch_size), math.ceil(batch_size / replicas)
    number = np.full((steps, replicas * part), n)
    number[:, :batch_size] = np.arange(steps * batch_size).reshape(steps, batch_size)
    real = number < n
    weights = (real / real.sum(axis=1, keepdims=True)).astype(np.float32)
    shape = (steps, replicas, part)
    return np.where(real, number, 0).reshape(shape), weights.reshape(shape)
