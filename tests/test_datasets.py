from pathlib import Path

import numpy as np

import datasets

DATA = Path(__file__).parent.parent / "data"


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_a_set_of_images_is_dark_or_light_if_nearly_all_of_its_edges_are():
    dark = np.zeros((100, 5, 5, 1), np.uint8)
    dark[:, 2, 2] = 255
    assert datasets.common_ground(dark) == "dark"
    assert datasets.common_ground(255 - dark) == "light"
    for light, expected in (4, "dark"), (5, None), (50, None), (95, None), (96, "light"):
        mixed = np.concatenate([255 - dark[:light], dark[light:]])
        assert datasets.common_ground(mixed) == expected, light
    # Of 3,000 images every third one is looked at.
    many = np.concatenate([dark] * 30)
    many[::3] = 255
    assert datasets.common_ground(many) == "light"
    assert datasets.common_ground(np.roll(many, 1, axis=0)) == "dark"
