import numpy as np
import pytest
from PIL import Image

from capsnet_core.errors import UserError
from figures import files


def test_a_png_has_the_pixels_and_200_dots_an_inch(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    files.write_png(tmp_path / "new/a.png", pixels)
    with Image.open(tmp_path / "new/a.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_gif_runs_to_the_last_frame_and_back_for_ever_and_keeps_shades_of_grey(tmp_path):
    shades = np.linspace(5, 250, 12).astype(np.uint8).repeat(300)
    frames = [np.random.default_rng(n).permutation(shades).reshape(60, 60) for n in range(4)]
    frames = [frame[..., None].repeat(3, -1) for frame in frames]
    files.write_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.info["loop"] == 0 and picture.n_frames == 6
        for number, frame in enumerate((0, 1, 2, 3, 2, 1)):
            picture.seek(number)
            assert picture.info["duration"] == 120
            shown = np.asarray(picture.convert("RGB")).astype(int)
            assert np.abs(shown - frames[frame]).max() <= 4


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(UserError, match=r"cannot write .*file"):
        files.write_png(tmp_path / "file/a.png", pixels)
    with pytest.raises(UserError, match=r"cannot write .*file"):
        files.write_gif(tmp_path / "file/a.gif", [pixels])
