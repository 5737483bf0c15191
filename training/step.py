"""One training step: the loss, its gradients, and Adam with running averages of the weights."""

import keras
import tensorflow as tf

OPTIMIZER_NAME = "adam"  # part of its variables' keys in a checkpoint


class AveragingAdam(keras.optimizers.Adam):
    """Adam with running averages of the weights that soon forget the first ones.

    After t steps their momentum is at most (1 + t) / (10 + t), as in
    `tf.train.ExponentialMovingAverage`.
    """

    @property
    def ema_momentum(self):
        """Return the momentum at the current step."""
        steps = tf.cast(self.iterations, tf.float32)
        return tf.minimum(self.largest_momentum, (1 + steps) / (10 + steps))

    @ema_momentum.setter
    def ema_momentum(self, value):
        self.largest_momentum = value


def make_optimizer(config, variables):
    """Create the optimizer of a TrainingConfig for some variables."""
    schedule = keras.optimizers.schedules.ExponentialDecay(
        config.learning_rate, config.decay_steps, config.decay_rate
    )
    optimizer = AveragingAdam(
        schedule, name=OPTIMIZER_NAME, use_ema=config.averaging > 0, ema_momentum=config.averaging
    )
    optimizer.build(variables)
    return optimizer


def learning_rate(config, step):
    """Return the learning rate of a step, counted from 1."""
    return config.learning_rate * config.decay_rate ** ((step - 1) / config.decay_steps)


def compile_step(network, optimizer, config, strategy, jit):
    """Compile a training step, with XLA if `jit`.

    Network and optimizer were created in the scope of the strategy. The weights of a batch make its
    losses means over the whole batch, wherever its parts are.

    Returns:
        A function of a batch -> the means of the loss terms, and the share of correct examples.
    """
    variables = network.trainable_variables

    def gradients(batch):
        weight = batch[-1]
        with tf.GradientTape() as tape:
            seed = tf.stack([config.seed, tf.cast(optimizer.iterations, tf.int32)])
            outputs = network.outputs(batch, seed)
            terms = {
                name: tf.reduce_sum(weight * tf.cast(term, tf.float32))
                for name, term in network.loss_terms(outputs).items()
            }
            loss = config.total_loss(terms)
        correct = tf.reduce_sum(weight * tf.cast(outputs.correct, tf.float32))
        values = [v.value for v in variables]
        metrics = [terms[name] for name in network.config.loss_terms]
        return tape.gradient(loss, values), tf.stack([*metrics, correct])

    def step(batch):
        values, metrics = gradients(batch)
        optimizer.apply(values, variables)  # sums them over all replicas
        return metrics

    if strategy is tf.distribute.get_strategy():  # one device: all in one program
        return tf.function(step, jit_compile=jit, autograph=False)
    gradients = tf.function(gradients, jit_compile=jit, autograph=False)

    def step_of_all(batch):
        return strategy.reduce("SUM", strategy.run(step, (batch,)), axis=None)

    return tf.function(step_of_all, autograph=False)
