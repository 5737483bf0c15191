"""`--reconstruction_test` and `--tweak_test`: pictures of what capsules hold."""

from pathlib import Path

import figures
from inputs.pipeline import batches
from model import TWEAKS, Outputs, uncompiled
from runtime.terminal import report_written

GRID_IMAGES = 64


def outputs_of(network, data, plan):
    """Run a network on the examples of a plan of the data, all in one batch.

    Returns:
        Outputs as arrays, and the labels (B, K).
    """
    batch = next(iter(batches(data, plan, len(plan.index))))
    outputs = network.outputs(batch, network.spectra(), uncompiled)
    return Outputs(*(value.numpy() for value in outputs)), batch[2].numpy()


def reconstruction_test(session):
    """Draw one batch of test images and its reconstructions with both masks (section 4.1)."""
    plan = session.test_data.evaluation_plan().take(slice(GRID_IMAGES))
    outputs, labels = outputs_of(session.network, session.test_data, plan)
    folder = Path(session.flags.sample_dir)
    grids = {
        "samples_arrange": outputs.canvas,
        "recon_samples_with_label_arrange": figures.overlay_digits(outputs.with_label),
        "recon_samples_without_label_arrange": figures.overlay_digits(outputs.without_label),
    }
    for name, images in grids.items():
        figures.save_grid(folder / f"{name}.png", images)
    page = figures.save_reconstructions(
        folder / "reconstruction.png",
        outputs.canvas,
        outputs.with_label,
        outputs.without_label,
        labels,
        outputs.predictions,
        figures.drawable_names(session.dataset.class_names),
    )
    session.show_picture("reconstructions", page)
    report_written([folder / f"{name}.png" for name in (*grids, "reconstruction")])


def tweak_test(session):
    """Draw reconstructions of capsules changed in one dimension (section 5.1, figure 4)."""
    names = figures.drawable_names(session.dataset.class_names)
    folder = Path(session.flags.tweak_dir)
    plan = session.test_data.evaluation_plan().take(slice(session.flags.tweak_num))
    outputs, _ = outputs_of(session.network, session.test_data, plan)
    longest = outputs.predictions[:, 0]
    images = session.network.tweak(outputs.capsules, longest)  # (D, digits, steps, H, W, C)
    shown = [names[k] for k in longest]
    for dim, decoded in enumerate(images):
        figures.save_tweak(folder / f"tweak_result_{dim}.png", decoded, TWEAKS, dim, shown)
    overview = folder / "overview.png"
    page = figures.save_tweak_overview(overview, images[:, 0], TWEAKS, shown[0])
    figures.save_sweep(folder / "sweep.gif", images, TWEAKS, shown)
    session.show_picture("tweaks", page)
    report_written(
        [
            folder / f"tweak_result_0.png to _{len(images) - 1}.png",
            overview,
            folder / "sweep.gif",
        ]
    )
