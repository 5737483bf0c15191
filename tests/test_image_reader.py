"""Reading image files: what they become, odd metadata, several frames, and what is refused."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from capsnet_core.errors import UserError
from inputs import image_reader
from inputs.image_reader import read_image, read_images


def one_line(error):
    text = str(error.value)
    assert text and "\n" not in text
    return text


def keep(_, image):
    return image


def pixels_of(path):
    """The image of a file that is read on its own."""
    images, errors, *_ = read_images([path], keep)
    for _, error in errors:
        raise error
    return images[0]


# --- What files become ----------------------------------------------------------------------------

GREY = np.array([[0, 64, 128], [192, 255, 7]], np.uint8)


@pytest.mark.parametrize(
    "name, image",
    [
        ("L.png", Image.fromarray(GREY)),
        ("RGB.png", Image.fromarray(np.stack([GREY] * 3, -1))),
        ("I16.png", Image.fromarray(GREY.astype(np.uint16) * 257)),
        ("F.tiff", Image.fromarray(GREY.astype(np.float32) / 255)),
        ("I.tiff", Image.fromarray(GREY.astype(np.int32))),
        ("I257.tiff", Image.fromarray(GREY.astype(np.int32) * 257)),
        ("P.gif", Image.fromarray(GREY).convert("P")),
        ("LA.png", Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (3, 2), 255)])),
    ],
)
def test_grey_images_of_every_kind_become_the_same_bytes(tmp_path, name, image):
    image.save(tmp_path / name)
    pixels = pixels_of(tmp_path / name)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, GREY[..., None])


def test_black_and_white_bits_become_0_and_255(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "bits.png")
    pixels = pixels_of(tmp_path / "bits.png")
    assert pixels[..., 0].tolist() == [[0, 0, 255], [255, 255, 0]]


def test_one_coloured_pixel_makes_an_image_one_in_colour(tmp_path):
    pixels = np.stack([GREY] * 3, -1)
    pixels[1, 2] = 7, 8, 7
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda image: image),
        (2, np.fliplr),
        (3, lambda image: np.rot90(image, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda image: np.rot90(image, -1)),
        (7, lambda image: np.rot90(image, 2).T),
        (8, np.rot90),
    ],
)
def test_a_photograph_is_turned_upright(tmp_path, orientation, upright):
    image = Image.fromarray(GREY)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(pixels_of(tmp_path / "photo.png")[..., 0], upright(GREY))


@pytest.mark.parametrize(
    "pixels, expected",
    [
        # Opaque ink, and the same ink where nothing of it is visible.
        ([[255, 200, 200, 255], [255, 200, 200, 0]], [[255, 200, 200], [0, 0, 0]]),
        ([[90, 0, 0, 255], [90, 0, 0, 0]], [[90, 0, 0], [255, 255, 255]]),
        # Only what is visible decides whether the ink is dark.
        (
            [[90, 0, 0, 255], [255, 255, 255, 0], [255, 255, 255, 0]],
            [[90, 0, 0], [255, 255, 255], [255, 255, 255]],
        ),
        # A fifth of black ink on white, and of light ink on black.
        ([[0, 0, 0, 51], [60, 0, 0, 255]], [[204, 204, 204], [60, 0, 0]]),
        ([[255, 255, 255, 51], [250, 255, 255, 255]], [[51, 51, 51], [250, 255, 255]]),
    ],
)
def test_transparency_becomes_white_behind_dark_ink_and_black_behind_light_ink(
    tmp_path, pixels, expected
):
    Image.fromarray(np.array([pixels], np.uint8)).save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").tolist() == [expected]


def test_a_transparent_colour_of_a_palette_is_transparent_too(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.save(tmp_path / "a.png", transparency=1)
    expected = [[[10, 20, 30], [255] * 3, [255] * 3]]
    assert pixels_of(tmp_path / "a.png").tolist() == expected


@pytest.mark.parametrize(
    "pixels", [GREY.astype(np.float32), GREY.astype(np.int32) - 1, GREY.astype(np.int32) * 300]
)
def test_grey_out_of_every_known_range_is_refused_with_its_range(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "wide.tiff")
    span = f"grey from {pixels.min():g} to {pixels.max():g}, expected"
    with pytest.raises(UserError, match=f"wide.tiff .*{span}") as error:
        pixels_of(tmp_path / "wide.tiff")
    one_line(error)


def test_what_is_no_whole_image_is_refused_naming_the_file(tmp_path):
    Image.fromarray(np.stack([GREY] * 3, -1)).save(tmp_path / "good.png")
    for content in (b"", b"no image", (tmp_path / "good.png").read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.png cannot be read") as error:
            pixels_of(tmp_path / "bad.png")
        one_line(error)


@pytest.mark.parametrize("suffix, expected", [("tif", 100), ("png", 100), ("pgm", 0)])
def test_a_dark_image_of_many_bits_is_dark_if_its_format_says_what_white_is(
    tmp_path, suffix, expected
):
    dark = np.full((4, 5), 100, np.int32)
    if suffix == "tif":  # 32 bits, which do not say it, as 16 bits do not
        Image.fromarray(dark).save(tmp_path / "a.tif")
    elif suffix == "png":
        Image.fromarray(dark.astype(np.uint16)).save(tmp_path / "a.png")
    else:
        header = b"P5 5 4 65535\n"
        (tmp_path / "a.pgm").write_bytes(header + dark.astype(">u2").tobytes())
    image = pixels_of(tmp_path / f"a.{suffix}")
    assert image.shape == (4, 5, 1) and (image == expected).all()


# --- Grey of more than 8 bits ---------------------------------------------------------------------


def write_deep(folder, *levels):
    """Write a 16-bit PNG file for each list of grey levels; return the paths."""
    paths = [folder / f"{number}.png" for number in range(len(levels))]
    for path, row in zip(paths, levels, strict=True):
        Image.fromarray(np.array([row], np.uint16)).save(path)
    return paths


@pytest.mark.parametrize(
    "brightest, white",
    [(17, 255), (255, 255), (600, 1023), (1023, 1023), (2100, 4095), (4095, 4095), (40000, 65535)],
)
def test_white_is_the_end_of_the_range_that_all_files_are_in(tmp_path, brightest, white):
    levels = [0, 1, 7], [2, 3, brightest // 2], [brightest, 0, 5]
    images, errors, _, found, notes = read_images(write_deep(tmp_path, *levels), keep)
    assert errors == [] and found == white
    for image, row in zip(images, levels, strict=True):
        expected = [round(255 * level / white) for level in row]
        assert np.abs(image.ravel() - np.array(expected)).max() <= (0 if white < 65535 else 1)
    said = f"grey of 16 bits from 0 to {white} in 3 of 3 files, scaled to 0 to 255"
    assert notes == (() if white == 65535 else (said,))


@pytest.mark.parametrize("brightest", [2, 15, 300, 1500, 9000, 30000])
def test_files_that_do_not_say_what_white_is_are_refused_with_advice(tmp_path, brightest):
    paths = write_deep(tmp_path, [0, brightest], [1, 1])
    Image.fromarray(np.array([[9, 200]], np.uint8)).save(tmp_path / "bytes.png")
    images, errors, *_ = read_images([*paths, tmp_path / "bytes.png"], keep)
    assert [image.ravel().tolist() for image in images] == [[9, 200]]  # which is read all the same
    assert [path for path, _ in errors] == paths
    for _, error in errors:
        text = str(error)
        assert f"from 0 to {brightest} in 2 files" in text and "multiply all pixels" in text
        assert "255, 1023, 4095 or 65535" in text and str(paths[0]) in text


def test_a_white_that_is_known_is_kept_unless_a_file_exceeds_it(tmp_path):
    (dark,) = write_deep(tmp_path, [0, 700])
    for known, white in (4095, 4095), (65535, 65535), (255, 1023), (None, 1023):
        images, _, _, found, _ = read_images([dark], keep, known)
        assert found == white
        assert images[0].ravel().tolist() == [0, round(255 * 700 / white)]


def test_files_of_8_bits_are_read_once_and_their_brightest_value_is_known(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, value in zip(paths, (3, 12), strict=True):
        Image.new("L", (4, 4), value).save(path)
    seen = []
    readings = read_images(paths, lambda path, image: seen.append(path) or image.max())
    assert readings == ([3, 12], [], 12, None, ()) and seen == paths


# --- Odd metadata ---------------------------------------------------------------------------------

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 9: 4, 10: 8, 11: 4, 12: 8}  # of EXIF's types
ORIENTATION, MAKE, X_RESOLUTION, UNIT = 0x0112, 0x010F, 0x011A, 0x0128


def exif_block(entries, order="<"):
    """An EXIF block of (tag, type, count, bytes), whether or not these go together."""
    place, table, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place_of_value = struct.pack(order + "I", place + len(values))
            values += value
            value = place_of_value
        table += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    count = struct.pack(order + "H", len(entries))
    return b"Exif\0\0" + start + count + table + bytes(4) + values


def write_photo(path, exif):
    """Write an image of two halves, red left and blue right, 6 wide and 4 high."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3, 0] = pixels[:, 3:, 2] = 255
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
    Image.fromarray(pixels).save(path, exif=exif, **options.get(path.suffix[1:], {}))
    return pixels


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "odd",
    [
        (MAKE, 5, 1, struct.pack("<II", 1, 2)),  # a number, expected text
        (X_RESOLUTION, 2, 3, b"72\0"),  # text, expected a number
        (X_RESOLUTION, 5, 0, b""),  # no number
        (UNIT, 12, 1, struct.pack("<d", np.nan)),
        (0x9286, 11, 1, struct.pack("<f", 1)),
        (0x02BC, 3, 1, b"\1\0"),
    ],
)
def test_odd_metadata_cost_neither_the_pixels_nor_the_orientation(tmp_path, suffix, odd):
    turn = (ORIENTATION, 3, 1, b"\3\0")  # upside down
    unit = (UNIT, 3, 1, b"\2\0")
    path = tmp_path / f"a.{suffix}"
    entries = [turn, odd] if odd[0] == UNIT else [turn, unit, odd]
    expected = np.rot90(write_photo(path, exif_block(entries)), 2).astype(int)
    pixels = read_image(path).pixels.astype(int)
    assert np.abs(pixels - expected).max() <= (40 if suffix == "jpg" else 0)


def test_a_jpeg_file_that_pillow_does_not_open_with_its_metadata_is_opened_without(tmp_path):
    odd = exif_block([(UNIT, 3, 1, b"\2\0"), (X_RESOLUTION, 2, 1, b"\0")])  # a resolution of ""
    expected = write_photo(tmp_path / "a.jpg", odd).astype(int)
    with pytest.raises(UnidentifiedImageError):
        Image.open(tmp_path / "a.jpg")
    assert np.abs(read_image(tmp_path / "a.jpg").pixels - expected).max() <= 40


def test_hundreds_of_images_with_random_metadata_are_read_without_a_warning(tmp_path):
    stream = np.random.default_rng(0)
    tags = [ORIENTATION, MAKE, X_RESOLUTION, 0x011B, UNIT, 0x8769, 0x8825, 0x014A, 0x9286, 0x02BC]
    turned = 0
    for number in range(400):
        entries = []
        for tag in stream.choice(tags, stream.integers(1, 6), replace=False).tolist():
            kind = int(stream.choice(list(SIZES)))
            count = int(stream.choice([0, 1, 1, 2, 5]))
            entries.append((tag, kind, count, stream.bytes(SIZES[kind] * count)))
        block = exif_block(entries, "<>"[number % 2])
        if number % 7 == 0:
            block = block[: stream.integers(14, len(block))]
        path = tmp_path / f"a.{('jpg', 'png', 'webp')[number % 3]}"
        write_photo(path, block)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels, has_more = read_image(path)
        turned += pixels.shape == (6, 4, 3)
        assert pixels.shape in ((4, 6, 3), (6, 4, 3)) and not has_more
        assert sorted(np.median(pixels.reshape(-1, 3), axis=0).tolist())[0] < 10
    assert turned < 40


def test_a_tiff_file_with_odd_tags_is_read(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for tag, value in (0x02BC, 7), (0x8769, 10**6), (0x8825, 3):  # XMP, EXIF and GPS data
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF", tiffinfo={tag: value})
        (tmp_path / "a.tif").write_bytes(buffer.getvalue())
        assert read_image(tmp_path / "a.tif").pixels[..., 0].tolist() == pixels.tolist()


# --- Frames and sizes -----------------------------------------------------------------------------


def test_files_of_several_frames_or_pages_are_counted_and_their_first_one_is_used(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (50, 100, 150)]
    names = ["a.gif", "b.tif", "c.webp", "d.png"]
    for name in names:
        options = {"lossless": True} if name == "c.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    frames[0].save(tmp_path / "one.gif")
    frames[0].save(tmp_path / "one.tif")
    paths = [tmp_path / name for name in (*names, "one.gif", "one.tif")]
    images, errors, *_, notes = read_images(paths, keep)
    assert errors == [] and all((image == 50).all() for image in images)
    assert notes == ("4 of 6 files have several frames or pages, the first is used",)


def test_previews_and_sizes_in_a_file_are_no_frames(tmp_path):
    image = Image.new("RGB", (32, 32), (200, 10, 10))
    image.save(tmp_path / "a.ico", sizes=[(16, 16), (32, 32)])
    image.save(tmp_path / "a.mpo", save_all=True, append_images=[image.resize((8, 8))])
    for name in "a.ico", "a.mpo":
        assert not read_image(tmp_path / name).has_more


def test_large_images_are_read_without_a_warning_and_larger_ones_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above, and refuses twice it
    Image.new("L", (12, 12), 80).save(tmp_path / "large.png")
    Image.new("L", (15, 15), 80).save(tmp_path / "larger.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_image(tmp_path / "large.png").pixels == 80).all()
    with pytest.raises(UserError, match="larger.png .*more than 178,956,970 pixels") as error:
        read_image(tmp_path / "larger.png")
    assert "reduce it" in one_line(error)
    assert image_reader.MAX_PIXELS == 178_956_970
