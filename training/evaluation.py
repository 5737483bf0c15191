"""Run a network over a data set, counting every example once."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from inputs.pipeline import batches

BATCH_SIZE = 128


class Evaluation(NamedTuple):
    """Results for N examples with K digits each, J classes."""

    scores: np.ndarray  # (N, J), what classes are ranked by
    predictions: np.ndarray  # (N, K)
    labels: np.ndarray  # (N, K)
    correct: np.ndarray  # (N,) bool
    losses: dict  # name of a term of the loss -> its mean

    @property
    def accuracy(self):
        """Return the share of examples in which every digit is right."""
        return float(self.correct.mean())


class Evaluator:
    """Evaluates a network on any data of one shape, compiled once.

    Args:
        network: `training.network.Network`.
        jit: whether XLA compiles it.
        strategy: tf.distribute.Strategy in whose scope the network was created, or None.
    """

    def __init__(self, network, jit, strategy=None):
        self.strategy = strategy or tf.distribute.get_strategy()

        def compile_part(function):
            return tf.function(function, jit_compile=jit, autograph=False)

        inference = network.inference(compile_part)

        def select(batch, prepared):
            outputs = inference.outputs(batch, prepared)
            return {
                "scores": outputs.scores,
                "predictions": outputs.predictions,
                "correct": tf.cast(outputs.correct, tf.int32),  # booleans cannot be gathered
                "losses": network.loss_terms(outputs),
            }

        @tf.function(autograph=False)
        def forward(batch, prepared):
            outputs = self.strategy.run(select, (batch, prepared))
            return tf.nest.map_structure(lambda value: self.strategy.gather(value, 0), outputs)

        # A lambda in `run`, which would make one program of all replicas of a tf.function.
        self._prepare = tf.function(
            lambda: self.strategy.run(lambda: inference.prepare()), autograph=False
        )
        self._forward = forward

    def evaluate(self, data, plan, on_batch=None):
        """Return the Evaluation of all examples of a plan for the data, Examples.

        `on_batch` is called after each batch with the number of examples done.
        """
        n, prepared = len(plan.index), self._prepare()
        size, parts = min(BATCH_SIZE, n), []
        for batch in batches(data, plan, size, strategy=self.strategy):
            outputs = self._forward(batch, prepared)
            parts.append(tf.nest.map_structure(lambda value: value.numpy()[:size], outputs))
            if on_batch:
                on_batch(min(len(parts) * size, n))
        whole = tf.nest.map_structure(lambda *values: np.concatenate(values)[:n], *parts)
        return Evaluation(
            scores=whole["scores"],
            predictions=whole["predictions"],
            labels=data.labels[plan.index],
            correct=whole["correct"].astype(bool),
            losses={
                name: float(values.mean(dtype=np.float64))
                for name, values in whole["losses"].items()
            },
        )
