"""`--reconstruction_test` and `--tweak_test`: pictures of what capsules hold."""

from pathlib import Path

from capsnet_core.errors import UserError
from commands.data import run_folders
from commands.reports import outputs_of, show_picture
from figures import examples, files, grids, tweaks
from figures.pages import drawable_names
from model import TWEAKS
from runtime.terminal import report_written

GRID_IMAGES = 64


def refuse_without_capsules(mode, weights):
    """Raise UserError if a mode shows capsules and the network has none."""
    if weights.network.config.network != "capsnet":
        raise UserError(
            f"--{mode} shows capsules, and {weights.folder} holds network="
            f"{weights.network.config.network}, which has none; leave the mode out"
        )


def reconstruction_test(flags, data, weights):
    """Draw one batch of test images and its reconstructions with both masks (section 4.1)."""
    refuse_without_capsules("reconstruction_test", weights)
    plan = data.test.evaluation_plan().take(slice(GRID_IMAGES))
    outputs, labels = outputs_of(weights.network, data.test, plan)
    folder = Path(flags.sample_dir)
    shown = {
        "samples_arrange": outputs.canvas,
        "recon_samples_with_label_arrange": grids.overlay_digits(outputs.with_label),
        "recon_samples_without_label_arrange": grids.overlay_digits(outputs.without_label),
    }
    for name, images in shown.items():
        files.write_png(folder / f"{name}.png", grids.draw_grid(images))
    page = examples.draw_reconstructions(outputs, labels, drawable_names(data.class_names))
    files.write_png(folder / "reconstruction.png", page)
    show_picture(run_folders(flags).logs, weights.metadata["step"], "reconstructions", page)
    report_written([folder / f"{name}.png" for name in (*shown, "reconstruction")])


def tweak_test(flags, data, weights):
    """Draw reconstructions of capsules changed in one dimension (section 5.1, figure 4)."""
    refuse_without_capsules("tweak_test", weights)
    names = drawable_names(data.class_names)
    folder = Path(flags.tweak_dir)
    plan = data.test.evaluation_plan().take(slice(flags.tweak_num))
    outputs, _ = outputs_of(weights.network, data.test, plan)
    longest = outputs.predictions[:, 0]
    images = weights.network.tweak(outputs.capsules, longest)  # (D, digits, steps, H, W, C)
    shown = [names[k] for k in longest]
    for dim, decoded in enumerate(images):
        page = tweaks.draw_tweak(decoded, TWEAKS, dim, shown)
        files.write_png(folder / f"tweak_result_{dim}.png", page)
    overview = tweaks.draw_tweak_overview(images[:, 0], TWEAKS, shown[0])
    files.write_png(folder / "overview.png", overview)
    files.write_gif(folder / "sweep.gif", tweaks.draw_sweep(images, TWEAKS, shown))
    show_picture(run_folders(flags).logs, weights.metadata["step"], "tweaks", overview)
    report_written(
        [
            folder / f"tweak_result_0.png to _{len(images) - 1}.png",
            folder / "overview.png",
            folder / "sweep.gif",
        ]
    )
