"""What a command computes on: devices, the convolution and the compiler that suit them."""

from typing import NamedTuple

import tensorflow as tf

from capsnet_core.errors import UsageError
from runtime import machine, startup
from training.distribution import choose_strategy, is_chief


class Devices(NamedTuple):
    """The devices of a command, and how it computes on them."""

    strategy: tf.distribute.Strategy
    chief: bool  # whether this process writes files
    conv: str  # see `ops.Convolution`
    jit: bool  # whether XLA compiles
    precision: str


def choose_devices(flags):
    """Return the Devices that the flags ask for. Call it before anything is computed.

    Raise UsageError for what this machine does not have, UserError for an unusable cluster.
    """
    if flags.precision != "float32" and not machine.multiplies_bfloat16():
        units = " or ".join(machine.BFLOAT16_UNITS.values())
        raise UsageError(
            f"--precision={flags.precision} needs an accelerator or a processor with {units}, "
            "and there is none here, expected --precision=float32"
        )
    if flags.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = choose_strategy(flags.strategy, startup.waiting_for_workers())
    conv = machine.fastest_conv() if flags.conv == "auto" else flags.conv
    fast = machine.has_gpu() or conv == "dft"
    jit = fast if flags.jit == "auto" else flags.jit == "on"
    return Devices(strategy, is_chief(strategy), conv, jit, flags.precision)
