import pytest
import tensorflow as tf
from story import FAST, Command

import commands.devices
from capsnet_core.errors import UsageError
from runtime import machine

pytest_plugins = ["story_fixtures"]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "words, on_cpu, on_gpu",
    [
        ([], ("dft", True), ("direct", True)),
        (["--conv=direct"], ("direct", False), ("direct", True)),
        (["--conv=dft"], ("dft", True), ("dft", True)),
        (["--jit=off"], ("dft", False), ("direct", False)),
        (["--conv=direct", "--jit=on"], ("direct", True), ("direct", True)),
    ],
)
def test_convolution_and_compiler_suit_the_device_unless_flags_choose_them(
    monkeypatch, gpu, words, on_cpu, on_gpu
):
    monkeypatch.setattr(machine, "has_gpu", lambda: gpu)
    devices = Command(*words).devices
    assert (devices.conv, devices.jit) == (on_gpu if gpu else on_cpu)


@pytest.mark.parametrize("conv, jit", [("direct", "on"), ("dft", "off")])
def test_network_and_trainer_get_the_convolution_and_the_compiler_of_the_devices(
    few, monkeypatch, conv, jit
):
    compiled, function = [], tf.function
    monkeypatch.setattr(
        tf,
        "function",
        lambda code, **options: (
            compiled.append(options["jit_compile"]) or function(code, **options)
        ),
    )
    network = Command(*FAST, f"--conv={conv}", f"--jit={jit}").trainer().network
    assert network.conv == network.conv1.method == network.primary.method == conv
    assert set(compiled) == {jit == "on"}


def test_half_precision_needs_an_accelerator_or_a_processor_with_units_for_it(few, monkeypatch):
    word = "--precision=mixed_bfloat16"
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setattr(machine, "bfloat16_units", lambda: [])
    with pytest.raises(UsageError, match="AMX or AVX512-BF16.*expected --precision=float32"):
        Command(*FAST, word)
    assert Command(*FAST).network().dtype_policy.name == "float32"
    monkeypatch.setattr(machine, "bfloat16_units", lambda: ["AMX"])
    assert Command(*FAST, word).network().dtype_policy.name == "mixed_bfloat16"
    monkeypatch.setattr(machine, "bfloat16_units", lambda: [])
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    assert Command(*FAST, word).network().dtype_policy.name == "mixed_bfloat16"


def test_deterministic_operations_are_switched_on_only_by_their_flag(monkeypatch):
    calls = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: calls.append("on"))
    Command(*FAST)
    assert calls == []
    Command(*FAST, "--deterministic")
    assert calls == ["on"]


@pytest.mark.parametrize("name", ["auto", "one", "mirrored"])
def test_the_network_is_created_under_the_strategy_that_the_flag_names(few, monkeypatch, name):
    asked, strategy = [], tf.distribute.OneDeviceStrategy("/cpu:0")
    monkeypatch.setattr(
        commands.devices,
        "choose_strategy",
        lambda name, waiting: asked.append((name, hasattr(waiting, "__enter__"))) or strategy,
    )
    command = Command(*FAST, f"--strategy={name}")
    assert asked == [(name, True)] and command.devices.chief
    trainer = command.trainer()
    assert trainer.strategy is strategy
    with strategy.scope():  # Keras refuses variables that another strategy made
        trainer.optimizer.build(trainer.network.trainable_variables)
