"""Several devices and machines: strategies, the chief, and what workers agree on."""

import contextlib
import json
import os

import tensorflow as tf

from capsnet_core.errors import UserError


def choose_strategy(name, waiting=None):
    """Return the tf.distribute.Strategy of a name. Call it before anything is computed.

    Args:
        name: "one" device; "mirrored", all GPUs (or logical CPUs) of this machine; "multi_worker",
            the machines of the cluster in TF_CONFIG; or "auto", mirrored where there are several
            GPUs.
        waiting: context manager, entered while a worker waits for the others.

    Raises:
        UserError: TF_CONFIG does not describe a cluster and this worker's place in it.
    """
    if name == "multi_worker":
        check_cluster(os.environ.get("TF_CONFIG", ""))
        with waiting or contextlib.nullcontext():
            return tf.distribute.MultiWorkerMirroredStrategy()
    gpus = tf.config.list_logical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        devices = gpus or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def check_cluster(text):
    """Raise UserError unless TF_CONFIG describes a cluster and the place of this worker in it."""
    try:
        config = json.loads(text)
        task, cluster = config["task"], config["cluster"]
        cluster[task["type"]][int(task["index"])]
        known = task["type"] in ("chief", "worker")
    except (ValueError, KeyError, IndexError, TypeError):
        known = False
    if not known:
        raise UserError(
            "TF_CONFIG does not say which worker of which cluster this is, expected JSON such "
            """as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": """
            """"worker", "index": 0}}, with a different index on each host"""
        )


def is_chief(strategy):
    """Return whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return True
    return resolver.task_type == "chief" or (
        resolver.task_id == 0 and "chief" not in resolver.cluster_spec().jobs
    )


def count_workers(strategy):
    """Count the processes of a strategy."""
    if strategy.cluster_resolver is None:
        return 1
    cluster = strategy.cluster_resolver.cluster_spec().as_dict()
    return sum(len(cluster.get(job, ())) for job in ("chief", "worker")) or 1


def sum_over_workers(strategy, number):
    """Sum an integer over the processes of a strategy. All of them wait for each other here."""
    workers = count_workers(strategy)
    if workers == 1:
        return number
    local = strategy.num_replicas_in_sync // workers

    def of_replica(context):
        first = context.replica_id_in_sync_group % local == 0
        return tf.constant(number if first else 0, tf.int64)

    numbers = strategy.experimental_distribute_values_from_function(of_replica)
    return int(strategy.reduce("SUM", numbers, axis=None))


def barrier(strategy):
    """Wait until all processes of a strategy are here."""
    sum_over_workers(strategy, 0)


def all_equal(strategy, number):
    """Return whether an integer is the same in all processes of a strategy."""
    return sum_over_workers(strategy, number) == number * count_workers(strategy)
