import math

import numpy as np
import pytest
import tensorflow as tf

import ops
from capsnet_core import config
from capsnet_core.errors import UserError
from inputs import pipeline
from inputs.pipeline import (
    Examples,
    Plan,
    batches,
    split_validation,
)
from utils import random_stream

LABELS = np.random.default_rng(1).integers(0, 10, 3000).astype(np.int32)


def same(plan, other):
    return all(np.array_equal(a, b) for a, b in zip(plan, other, strict=True))


def training_plan(labels, seed, epoch, max_shift, overlap):
    data = Examples(None, labels, max_shift=max_shift, overlap=overlap)
    return data.training_plan(seed, epoch)


def evaluation_plan(labels, max_shift, overlap, pairs=1):
    data = Examples(None, labels, max_shift=max_shift, overlap=overlap)
    return data.evaluation_plan(pairs)


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum()


def bound(degrees):
    """Five standard deviations above the mean of chi-square."""
    return degrees + 5 * math.sqrt(2 * degrees)


# --- The validation set ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, sixth", [(6, 1), (7, 1), (11, 1), (12, 2), (1000, 166), (60000, 10000)]
)
def test_a_sixth_of_the_training_images_is_held_out_and_the_others_are_trained(n, sixth):
    train, held_out = split_validation(n, seed=3)
    assert len(held_out) == sixth
    assert sorted([*train, *held_out]) == list(range(n))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(held_out) > 0)
    assert train.dtype == held_out.dtype == np.int64


def test_the_held_out_images_are_the_first_sixth_of_a_shuffle_by_the_seed():
    for seed in (0, 1):
        shuffled = random_stream(seed, 0, "validation").permutation(600)
        assert split_validation(600, seed)[1].tolist() == sorted(shuffled[:100].tolist())


def test_the_seed_decides_which_images_are_held_out():
    first, again, other = (split_validation(600, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert 5 < len(np.intersect1d(first, other)) < 40  # 17 expected of independent choices


def test_too_few_images_for_a_validation_set_are_refused():
    with pytest.raises(UserError, match="5 training images, expected at least 6"):
        split_validation(5, 0)


# --- Plans of training ----------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_every_training_image_comes_first_exactly_once_an_epoch(overlap):
    plan = training_plan(LABELS, 0, 0, 2, overlap)
    k = 2 if overlap else 1
    assert plan.index.shape == (3000, k) and plan.shift.shape == (3000, k, 2)
    assert plan.index.dtype == plan.shift.dtype == np.int32
    assert np.array_equal(np.sort(plan.index[:, 0]), np.arange(3000))
    assert not np.array_equal(plan.index[:, 0], np.arange(3000))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_plan_is_a_function_of_seed_and_epoch_and_both_matter(overlap):
    plan = training_plan(LABELS, 7, 4, 2, overlap)
    training_plan(LABELS, 7, 5, 2, overlap)
    np.random.default_rng(0).random()
    assert same(plan, training_plan(LABELS, 7, 4, 2, overlap))
    for seed, epoch in ((7, 5), (8, 4), (4, 7)):
        other = training_plan(LABELS, seed, epoch, 2, overlap)
        assert not np.array_equal(plan.index, other.index)
        assert not np.array_equal(plan.shift, other.shift)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_training_plan_is_the_one_drawn_image_by_image(overlap):
    # Earlier versions trained on these very examples, and resumed runs need the rest of them.
    labels, seed, epoch, max_shift = LABELS[:200], 5, 3, 4
    classes = sorted(set(labels.tolist()))
    images_by_class = [[i for i in range(200) if labels[i] == c] for c in classes]
    candidates = [
        [
            i
            for c, images in zip(classes, images_by_class, strict=True)
            if c != label
            for i in images
        ]
        for label in labels
    ]
    k = 2 if overlap else 1
    stream = random_stream(seed, epoch, "partner")
    ranks = stream.integers(0, [len(images) for images in candidates])
    shifts = random_stream(seed, epoch, "shift").integers(-4, 5, (200, k, 2), np.int32)
    order = random_stream(seed, epoch, "order").permutation(200)
    plan = training_plan(labels, seed, epoch, max_shift, overlap)
    for example, image in enumerate(order):
        expected = [image, candidates[image][ranks[image]]][:k]
        assert plan.index[example].tolist() == expected
        assert plan.shift[example].tolist() == shifts[image].tolist()


@pytest.mark.parametrize("max_shift", [2, 4])
def test_shifts_cover_the_whole_range_evenly_on_both_axes(max_shift):
    shift = training_plan(np.zeros(50000, np.int32), 0, 0, max_shift, False).shift
    values = 2 * max_shift + 1
    # Rows and columns together: each of the values**2 shifts is as likely as any other.
    cell = (shift[:, 0, 0] + max_shift) * values + shift[:, 0, 1] + max_shift
    counts = np.bincount(cell, minlength=values**2)
    assert len(counts) == values**2
    assert chi_square(counts) < bound(values**2 - 1)


def test_a_largest_shift_of_zero_leaves_all_images_in_their_place():
    assert not training_plan(LABELS, 0, 0, 0, True).shift.any()


def test_partners_are_never_of_the_same_class():
    for labels in (LABELS, np.array([0, 1]), np.array([7, 7, 7, 2, 9]), np.array([3] * 99 + [0])):
        for epoch in range(5):
            first, second = training_plan(labels, 0, epoch, 4, True).index.T
            assert np.all(labels[first] != labels[second])


def test_partners_are_uniform_over_the_images_of_all_other_classes():
    labels = np.array([2, 0, 5, 0, 2, 2, 9, 0])  # classes of unequal sizes, not in order
    counts = np.zeros((8, 8), int)
    for epoch in range(3000):
        np.add.at(counts, tuple(training_plan(labels, 0, epoch, 0, True).index.T), 1)
    other_class = labels[:, None] != labels
    assert not counts[~other_class].any()
    total = sum(chi_square(row[allowed]) for row, allowed in zip(counts, other_class, strict=True))
    assert total < bound(sum(allowed.sum() - 1 for allowed in other_class))


@pytest.mark.parametrize("max_shift", [1, config.MULTI_SHIFT, 6])
def test_both_digits_of_a_pair_are_shifted_independently_by_up_to_the_largest_shift(max_shift):
    whole_range = list(range(-max_shift, max_shift + 1))
    for plan in (
        training_plan(LABELS, 0, 0, max_shift, True),
        evaluation_plan(LABELS, max_shift, True),
    ):
        for digit in (0, 1):
            for axis in (0, 1):
                assert np.unique(plan.shift[:, digit, axis]).tolist() == whole_range
        assert np.all(abs(np.corrcoef(plan.shift.reshape(3000, 4).T) - np.eye(4)) < 0.1)


@pytest.mark.parametrize("labels", [np.full(10, 4), np.array([], np.int32)])
def test_pairs_of_a_single_class_are_refused(labels):
    with pytest.raises(UserError, match="expected two"):
        training_plan(labels, 0, 0, 4, True)
    with pytest.raises(UserError, match="expected two"):
        evaluation_plan(labels, 4, True)


# --- Plans of evaluation --------------------------------------------------------------------------


def test_single_digits_are_evaluated_in_order_and_unshifted():
    plan = evaluation_plan(LABELS, 2, False)
    assert plan.index.dtype == plan.shift.dtype == np.int32
    assert np.array_equal(plan.index, np.arange(3000)[:, None])
    assert plan.shift.shape == (3000, 1, 2) and not plan.shift.any()


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_each_image_comes_first_in_as_many_evaluation_pairs_as_asked_for(pairs):
    plan = evaluation_plan(LABELS, 4, True, pairs)
    assert plan.index.dtype == plan.shift.dtype == np.int32
    assert plan.index[:, 0].tolist() == list(range(3000)) * pairs
    assert np.all(LABELS[plan.index[:, 0]] != LABELS[plan.index[:, 1]])
    assert plan.shift.shape == (3000 * pairs, 2, 2)
    assert same(plan, evaluation_plan(LABELS, 4, True, pairs))


def test_the_first_evaluation_pairs_are_the_same_however_many_follow():
    once = evaluation_plan(LABELS, 4, True)
    for pairs in (2, 5):
        assert same(evaluation_plan(LABELS, 4, True, pairs).take(slice(3000)), once)


def test_later_rounds_of_evaluation_pairs_have_other_partners_and_shifts():
    plan = evaluation_plan(LABELS, 4, True, 2)
    first, second = plan.take(slice(3000)), plan.take(slice(3000, None))
    assert np.mean(first.index[:, 1] == second.index[:, 1]) < 0.01
    assert np.mean((first.shift == second.shift).all(axis=(1, 2))) < 0.01


def test_evaluation_pairs_are_drawn_from_streams_of_their_own():
    # Reported errors of pairs can only be compared if everyone tests on the same pairs.
    labels = np.array([0, 1, 0, 1, 1, 0])
    plan = evaluation_plan(labels, 4, True)
    ranks = random_stream(0, 0, "evaluation partner").integers(0, np.full(6, 3))
    candidates = [[1, 3, 4], [0, 2, 5]]  # all images of the other class
    expected = [candidates[label][rank] for label, rank in zip(labels, ranks, strict=True)]
    assert plan.index[:, 1].tolist() == expected
    shifts = random_stream(0, 0, "evaluation shift").integers(-4, 5, (6, 2, 2), np.int32)
    np.testing.assert_array_equal(plan.shift, shifts)


def test_a_part_of_a_plan_has_the_examples_asked_for_in_their_order():
    plan = training_plan(LABELS, 0, 0, 2, True)
    for chosen in (slice(3, 9, 2), np.array([7, 3, 5]), np.arange(3000) % 2 == 0):
        part = plan.take(chosen)
        positions = np.arange(3000)[chosen]
        assert len(part.index) == len(part.shift) == len(positions)
        for row, position in enumerate(positions):
            assert part.index[row].tolist() == plan.index[position].tolist()
            assert part.shift[row].tolist() == plan.shift[position].tolist()


# --- Examples -----------------------------------------------------------------------------------


def numbered(n, overlap=False):
    """Images in which every pixel is the image's number, with labels that follow from it."""
    numbers = np.arange(n, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None, None], (n, 5, 4, 1)).copy()
    return Examples(images, numbers % 3, padding=4, max_shift=2, overlap=overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_data_know_the_shape_of_an_example(overlap):
    data = numbered(6, overlap)
    assert data.digits_per_example == (2 if overlap else 1)
    assert data.canvas_shape() == (5 + 4 + 4, 4 + 4 + 4, 1)
    assert Examples(np.zeros((2, 7, 9, 3), np.uint8), np.zeros(2)).canvas_shape() == (7, 9, 3)


def test_single_images_are_shifted_in_training_only():
    data = numbered(30)
    assert np.unique(data.training_plan(0, 0).shift).tolist() == [-2, -1, 0, 1, 2]
    assert not data.evaluation_plan().shift.any()


def test_a_subset_keeps_images_and_labels_together_and_everything_else():
    data = numbered(30, overlap=True)._replace(class_names=("a", "b", "c"))
    part = data.subset(np.array([4, 8, 20]))
    np.testing.assert_array_equal(part.images[:, 0, 0, 0], [4, 8, 20])
    np.testing.assert_array_equal(part.labels, [1, 2, 2])
    assert part[2:] == data[2:]


# --- Batches --------------------------------------------------------------------------------------


def expected_batches(data, plan, batch_size):
    """All batches of a plan, put together one example at a time."""
    n, k = plan.index.shape
    whole = []
    for start in range(0, n, batch_size):
        real = min(batch_size, n - start)
        digits = np.zeros((batch_size, k, *data.images.shape[1:]), np.uint8)
        shift = np.zeros((batch_size, k, 2), np.int32)
        labels = np.zeros((batch_size, k), data.labels.dtype)
        weight = np.zeros(batch_size, np.float32)
        for row in range(real):
            for digit in range(k):
                image = plan.index[start + row, digit]
                digits[row, digit] = data.images[image]
                labels[row, digit] = data.labels[image]
                shift[row, digit] = plan.shift[start + row, digit]
            weight[row] = 1 / real
        whole.append((digits, shift, labels, weight))
    return whole


def assert_equal_where_real(batch, expected):
    """Compare two batches; images of weight 0 may be any, but have to be there."""
    *_, weight = expected
    for part, expected_part in zip(batch, expected, strict=True):
        assert part.shape == expected_part.shape and part.dtype == expected_part.dtype
        np.testing.assert_array_equal(part[weight > 0], expected_part[weight > 0])
    np.testing.assert_array_equal(batch[3], weight)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "n, batch_size", [(2, 8), (7, 8), (8, 8), (21, 8), (21, 1), (21, 5), (9, 3)]
)
def test_batches_are_those_put_together_one_example_at_a_time(n, batch_size, overlap):
    data = numbered(n, overlap)
    plan = data.training_plan(seed=3, epoch=1)
    whole = expected_batches(data, plan, batch_size)
    for start in sorted({0, 1, len(whole) // 2, len(whole) - 1, len(whole)}):
        made = list(batches(data, plan, batch_size, start).as_numpy_iterator())
        assert len(made) == len(whole[start:])
        for batch, expected in zip(made, whole[start:], strict=True):
            assert_equal_where_real(batch, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_batches_of_any_size_joined_are_the_same_epoch(overlap):
    data = numbered(21, overlap)
    plan = data.training_plan(seed=0, epoch=0)
    for batch_size in (1, 4, 8, 21, 30):
        made = list(batches(data, plan, batch_size).as_numpy_iterator())
        digits, shift, labels, weight = (np.concatenate(parts) for parts in zip(*made, strict=True))
        real = weight > 0
        assert real.sum() == 21
        np.testing.assert_array_equal(digits[real][..., 0, 0, 0], plan.index)
        np.testing.assert_array_equal(shift[real], plan.shift)
        np.testing.assert_array_equal(labels[real], plan.index % 3)


def test_the_last_batch_is_padded_to_full_size_with_weight_zero():
    data = numbered(21)
    *full, last = batches(data, data.training_plan(0, 0), 8).as_numpy_iterator()
    assert [len(part) for part in last] == [8] * 4
    np.testing.assert_allclose(last[3], [0.2] * 5 + [0] * 3)
    for batch in full:
        np.testing.assert_allclose(batch[3], 1 / 8)


class Strategy:
    """Stands in for a tf.distribute.Strategy, and hands out the pipeline of each worker."""

    def __init__(self, replicas, workers):
        self.num_replicas_in_sync, self.workers = replicas, workers

    def distribute_datasets_from_function(self, pipeline):
        contexts = [
            tf.distribute.InputContext(self.workers, worker, self.num_replicas_in_sync)
            for worker in range(self.workers)
        ]
        return [list(pipeline(context).as_numpy_iterator()) for context in contexts]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("batch_size", [8, 6, 3, 1])
@pytest.mark.parametrize("replicas, workers", [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (4, 4)])
def test_each_replica_gets_its_consecutive_part_of_every_batch(
    replicas, workers, batch_size, overlap
):
    data = numbered(21, overlap)
    plan = data.training_plan(seed=3, epoch=1)
    part = -(-batch_size // replicas)
    start = 1
    by_worker = batches(data, plan, batch_size, start, Strategy(replicas, workers))
    whole = expected_batches(data, plan, batch_size)[start:]
    local = replicas // workers
    assert [len(elements) for elements in by_worker] == [local * len(whole)] * workers
    for step, expected in enumerate(whole):
        elements = [e for own in by_worker for e in own[step * local : (step + 1) * local]]
        assert all(len(array) == part for element in elements for array in element)
        joined = [np.concatenate(arrays) for arrays in zip(*elements, strict=True)]
        assert not joined[3][batch_size:].any()  # the last replica's part may be padded
        assert_equal_where_real([array[:batch_size] for array in joined], expected)


def test_a_plan_names_its_arrays():
    plan = Plan(index=np.array([[1]]), shift=np.array([[[2, 3]]]))
    data = numbered(3)
    ((images, shift, labels, weight),) = batches(data, plan, 1).as_numpy_iterator()
    assert (images == 1).all() and shift.tolist() == [[[2, 3]]]
    assert labels.tolist() == [[1]] and weight.tolist() == [1]


def test_batches_follow_the_strategy_in_whose_scope_they_are_made(monkeypatch):
    strategy = Strategy(replicas=2, workers=1)
    monkeypatch.setattr(pipeline.tf.distribute, "get_strategy", lambda: strategy)
    data = numbered(4)
    (elements,) = batches(data, data.evaluation_plan(), 4)
    numbers = [images[:, 0, 0, 0, 0].tolist() for images, *_ in elements]
    assert numbers == [[0, 1], [2, 3]]


# --- Background ---------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [None, [0, 0, 0], [250, 240, 30]])
def test_shifts_fill_in_the_background_of_the_data(background):
    stream = np.random.default_rng(0)
    images = stream.integers(0, 256, (9, 7, 6, 3), np.uint8)
    colour = None if background is None else np.array(background, np.uint8)
    data = Examples(images, np.arange(9) % 3, max_shift=2, background=colour)
    plan = data.training_plan(seed=0, epoch=0)
    (batch,) = batches(data, plan, 9)
    canvas, shifted = ops.compose(batch[0], batch[1], (7 - batch[0].shape[2]) // 2)
    expected = np.zeros((9, 7, 6, 3))
    expected[:] = background or 0
    for number, ((index,), ((down, right),)) in enumerate(zip(plan.index, plan.shift, strict=True)):
        for y in range(7):
            for x in range(6):
                if 0 <= y - down < 7 and 0 <= x - right < 6:
                    expected[number, y, x] = images[index, y - down, x - right]
    np.testing.assert_array_equal(np.rint(canvas * 255), expected)
    np.testing.assert_array_equal(shifted[:, 0], canvas)


def test_images_on_black_are_passed_on_without_a_margin():
    images = np.full((3, 4, 4, 1), 9, np.uint8)
    for background in None, np.zeros(1, np.uint8):
        data = Examples(images, np.arange(3), max_shift=2, background=background)
        digits, *_ = next(iter(batches(data, data.training_plan(0, 0), 3)))
        np.testing.assert_array_equal(digits[:, 0], images)
