"""Write pictures: PNG, and GIF for animations."""

from PIL import Image

from utils import atomic_path

DPI = 200


def write_png(path, pixels):
    """Write pixels, uint8 (H, W, 3). Raise as `atomic_path`."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG", dpi=(DPI, DPI))


def write_gif(path, frames):
    """Write frames, each uint8 (H, W, 3), that run to the last one and back for ever.

    Raise as `atomic_path`.
    """
    frames = [Image.fromarray(frame).quantize(64) for frame in frames]
    first, *others = frames + frames[-2:0:-1]
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, loop=0, duration=120)
