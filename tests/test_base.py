"""What all networks share: checks of images, and configurations for Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from capsnet_core import networks
from capsnet_core.cnn import CNN
from capsnet_core.networks import CNN_LAYERS
from model import CapsNet

SHAPE = (12, 8, 2)


def small_capsnet(conv="direct", **options):
    sizes = {"n_conv": 5, "n_primary": 2, "primary_dim": 3, "digit_dim": 4, "kernel_size": 3}
    return CapsNet(SHAPE, 3, **sizes, decoder_units=(), conv=conv, **options)


@pytest.fixture(scope="module", params=["capsnet direct", "capsnet dft", "cnn"])
def network(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CNN_LAYERS, "affine", networks.Layers(((4, 3, True),), (5,), 0.5))
        if request.param == "cnn":
            made = CNN(SHAPE, 3, "affine")
        else:
            made = small_capsnet(request.param.split()[1])
        made.compile(jit_compile=False)  # of `predict`
        yield made


def images(n=2, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(0).random((n, *shape)).astype(dtype)


def scores_of(outputs):
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


WRONG = {
    "no channels": (5, 12, 8),
    "no batch": (12, 8, 2),
    "one more axis": (1, 2, 12, 8, 2),
    "rows and columns exchanged": (2, 8, 12, 2),
    "a row more": (2, 13, 8, 2),
    "one channel": (2, 12, 8, 1),
    "three channels": (2, 12, 8, 3),
    "nothing": (),
}


@pytest.mark.parametrize("shape", WRONG.values(), ids=WRONG)
def test_images_of_a_wrong_shape_are_refused_with_both_shapes(network, shape):
    message = r"images must have the shape \(B, 12, 8, 2\). Received: images.shape=\("
    for call in (network, network.predict, network.serve):
        with pytest.raises(ValueError, match=message + ", ".join(map(str, shape))):
            call(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_integers_are_refused_with_advice(network, dtype):
    whole = images(dtype=dtype)
    for call in (network, network.predict, lambda x: network(tf.constant(x)), network.serve):
        with pytest.raises(ValueError, match=f"divide bytes by 255. Received: {dtype}"):
            call(whole)


def test_values_above_one_are_refused_with_advice_where_they_can_be_seen(network):
    bright = images()
    bright[1, 3, 2, 1] = 255
    message = "from 0 to 1: divide bytes by 255. Received: a largest value of 255"
    for call in (network, network.predict, lambda x: network.predict(tf.constant(x), verbose=0)):
        with pytest.raises(ValueError, match=message):
            call(bright)
    bright[1, 3, 2, 1] = 1.25
    with pytest.raises(ValueError, match="a largest value of 1.25"):
        network(bright)


def test_images_from_0_to_1_are_taken_of_any_floating_type(network):
    exact = images(3)
    exact[0], exact[1] = 0, 1
    expected = scores_of(network(exact))
    assert expected.shape == (3, 3)
    for given in (exact.astype(np.float64), tf.constant(exact)):
        assert np.array_equal(scores_of(network(given)), expected)
    predicted = scores_of(network.predict(exact, batch_size=2, verbose=0))
    np.testing.assert_allclose(predicted, expected, atol=1e-6)
    dataset = tf.data.Dataset.from_tensor_slices(exact).batch(2)
    np.testing.assert_allclose(scores_of(network.predict(dataset, verbose=0)), expected, atol=1e-6)


def test_symbolic_images_are_checked_by_their_shape_and_type_alone(network):
    symbolic = keras.Input(SHAPE)
    classifier = keras.Model(symbolic, scores_of(network(symbolic)))
    assert classifier.output_shape == (None, 3)
    np.testing.assert_allclose(classifier(images()), scores_of(network(images())), atol=1e-6)
    for wrong in (keras.Input((8, 12, 2)), keras.Input((None, None, 2))):
        with pytest.raises(ValueError, match=r"images must have the shape \(B, 12, 8, 2\)"):
            network(wrong)
    with pytest.raises(ValueError, match="images must be floats from 0 to 1"):
        network(keras.Input(SHAPE, dtype="uint8"))
    unknown = tf.TensorSpec(None, tf.float32)
    with pytest.raises(ValueError, match="Received: images.shape=<unknown>"):
        tf.function(lambda x: network.check_images(x)).get_concrete_function(unknown)


def test_digits_have_as_much_canvas_on_each_side_as_makes_them_an_image(network):
    assert network.padding(np.zeros((1, 2, 8, 4, 2))) == 2
    assert network.padding(np.zeros((1, 2, 12, 8, 2))) == 0
    assert network.padding(np.zeros((1, 2, 16, 12, 2))) == -2


def test_the_parts_that_can_be_frozen_are_all_layers_with_weights(network):
    variables = [v.path for layer in network.parts().values() for v in layer.variables]
    assert sorted(variables) == sorted(v.path for v in network.variables)
    features = {v.path for layer in network.feature_layers() for v in layer.variables}
    assert features < set(variables)
    for variable in network.class_variables():
        assert variable.shape[0] == 3 and variable.path not in features


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_features_and_classes_of_a_capsnet_are_all_but_its_decoder(variant):
    network = small_capsnet(variant=variant)
    assert list(network.parts()) == ["conv1", "primary", "digits", "decoder"]
    assert network.feature_layers() == [network.conv1, network.primary]
    names = ["W", "bias"] if variant == "authors" else ["W"]
    assert [variable.name for variable in network.class_variables()] == names


def test_a_configuration_for_keras_makes_the_same_network(network):
    config = network.get_config()
    assert "network" not in config
    rebuilt = type(network).from_config(config)
    assert rebuilt.config == network.config and rebuilt.get_config() == config
    assert [(v.path, v.shape) for v in rebuilt.variables] == [
        (v.path, v.shape) for v in network.variables
    ]


def test_the_arguments_of_a_keras_model_reach_it():
    network = small_capsnet(name="digits", dtype="mixed_bfloat16", trainable=False)
    assert (network.name, network.dtype_policy.name) == ("digits", "mixed_bfloat16")
    assert not network.trainable and not network.trainable_variables
