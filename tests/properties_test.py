"""What must hold for every input, not for the ones somebody thought of: Hypothesis looks for those that break it."""

import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs import common as configs
from mira_u_jax import augment, data, metrics
from mira_u_jax import config as configuration
from mira_u_jax.errors import UserError
from tfds_builders import common
from tfds_builders.common import DataError

settings.register_profile("mira", deadline=None, max_examples=50, derandomize=True)  # no clock, the same examples each time
settings.load_profile("mira")

SIDE = 12
images = hnp.arrays(np.float32, (SIDE, SIDE, 3), elements=st.floats(0, 1, width=32))
masks = hnp.arrays(np.float32, (SIDE, SIDE), elements=st.sampled_from([0.0, 0.5, 1.0]))
seeds = st.integers(0, 2**31 - 1)
bools = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))

# --- augmentation: compiled once, whatever the example --------------------------------------------------------------------


@functools.cache
def compiled(name):
    if name == "rand_augment":
        return jax.jit(lambda seed, image: augment.rand_augment(jax.random.key(seed), image, ops=2, magnitude=9.0))
    if name == "labelled_view":
        cfg = configs.tree().augment
        cfg.labelled_colour = 0.0
        return jax.jit(lambda seed, *batch: augment.labelled_view(jax.random.key(seed), *batch, cfg))
    if name == "box":
        return jax.jit(lambda seed: augment.random_box(jax.random.key(seed), SIDE, SIDE, 0.1, 0.5))
    return jax.jit(lambda seed, tree: augment.cutmix(jax.random.key(seed), 1.0, tree))


@given(seeds, images)
def test_colour_stays_a_picture(seed, image):
    moved = np.asarray(compiled("rand_augment")(seed, image))
    assert moved.shape == image.shape and np.isfinite(moved).all()
    assert moved.min() > -0.1 and moved.max() < 1.1


@given(seeds, images, masks)
def test_geometry_invents_no_value(seed, image, mask):
    """Cubic weights sum to 1 and, clipped, give a picture. The moduli of the four sum to 11 / 8 at most, in two directions
    to 1.89, so a value leaves the range of the mirrored image by .446 of it at most; where there is one value, by nothing.
    """
    for moved, before in zip(compiled("labelled_view")(seed, image[None], mask[None]), (image, mask), strict=True):
        moved = moved[0]
        assert moved.shape == before.shape
        assert moved.min() >= 0 and moved.max() <= 1
        beyond = ((11 / 8) ** 2 - 1) / 2 * (before.max() - before.min()) + 1e-5
        assert moved.min() >= before.min() - beyond and moved.max() <= before.max() + beyond


@given(seeds)
def test_a_box_lies_in_the_frame_and_has_its_share(seed):
    box = np.asarray(compiled("box")(seed))
    assert set(np.unique(box)) <= {0.0, 1.0}
    rows, columns = box.any(1), box.any(0)
    assert box.sum() == rows.sum() * columns.sum()  # one rectangle
    assert 0.03 <= box.mean() <= 0.65  # 10 to 50%, on a grid of 12


@given(seeds, hnp.arrays(np.float32, (4, SIDE, SIDE), elements=st.floats(0, 1, width=32)))
def test_cutmix_only_exchanges_within_a_pair(seed, pixels):
    """The two values at a place stay the two values at that place, and what belongs together moves together."""
    origin = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None], pixels.shape)
    mixed, places = compiled("cutmix")(seed, (pixels, origin))
    for pair in (slice(0, 2), slice(2, 4)):
        np.testing.assert_array_equal(np.sort(mixed[pair], 0), np.sort(pixels[pair], 0))
    np.testing.assert_array_equal(mixed, np.take_along_axis(pixels, np.asarray(places).astype(int), 0))


# --- metrics --------------------------------------------------------------------------------------------------------------


@given(bools, st.data())
def test_scores_lie_in_their_range_and_know_their_relations(truth, draw):
    predicted = draw.draw(hnp.arrays(bool, truth.shape))
    counts = metrics.confusion(predicted, truth)
    assert counts.sum() == truth.size and (counts >= 0).all()
    found, turned = metrics.scores(counts), metrics.scores(metrics.confusion(truth, predicted))
    assert all(0 <= value <= 1 for value in found.values())
    assert found["dice"] == turned["dice"] and found["precision"] == turned["recall"]
    np.testing.assert_allclose(found["iou"], found["dice"] / (2 - found["dice"]), atol=1e-12)
    assert found["iou"] <= found["dice"]
    np.testing.assert_array_equal(metrics.confusion(predicted.T, truth.T), counts)


@given(bools)
def test_the_truth_itself_is_right_and_its_opposite_is_not(truth):
    assert all(value == 1 for value in metrics.scores(metrics.confusion(truth, truth)).values())
    assert metrics.scores(metrics.confusion(~truth, truth))["dice"] == 0


# --- configurations -------------------------------------------------------------------------------------------------------

words = st.text(string.printable, max_size=30)
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.lists(st.integers(), max_size=3))


@given(words)
def test_what_follows_the_colon_is_a_configuration_or_one_line(text):
    try:
        config = configs.get_config(text)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        configuration.get(config, "train.steps")


@given(st.sampled_from(sorted(configs.KEYS)), words.filter(lambda text: "," not in text))
def test_a_key_with_any_value_is_a_configuration_or_one_line_that_names_it(key, text):
    try:
        configs.get_config(f"{key}={text}")
    except UserError as error:
        assert (key in str(error) or configs.SHORT[key] in str(error)) and "\n" not in str(error)


@given(st.sampled_from(sorted(configuration.RULES)), values)
def test_a_rule_answers_every_value(key, value):
    """By passing or by one line that names the key; never by breaking on a type it did not expect."""
    try:
        configuration.check_value(key, value)
    except UserError as error:
        assert key in str(error) and "\n" not in str(error)


@given(st.one_of(words, st.integers(), st.floats()), st.integers(1, 10**4), st.one_of(st.none(), st.integers(1, 10**6)))
def test_a_duration_is_steps_or_one_line(value, epoch, total):
    try:
        assert configuration.steps_of(value, epoch=epoch, total=total, key="train.steps") >= 0
    except UserError as error:
        assert "train.steps" in str(error) and "\n" not in str(error)


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_durations_mean_what_they_say(n, epoch):
    assert configuration.steps_of(n, epoch=epoch) == configuration.steps_of(f" {n} ", epoch=epoch) == n
    assert configuration.steps_of(f"{n} epochs", epoch=epoch) == n * epoch
    assert configuration.steps_of("100%", epoch=epoch, total=n) == n


# --- who is labelled, what comes next -------------------------------------------------------------------------------------

letters = string.ascii_letters + string.digits + "_- äß"
ids = st.lists(st.text(letters, min_size=1, max_size=12), min_size=1, max_size=40, unique=True)


@given(ids, st.randoms())
def test_label_ranks_are_permutations_whatever_the_order_of_the_ids(names, random):
    ranks = common.label_rank(names, "isic2016")
    assert sorted(ranks) == sorted(names)
    table = np.stack(list(ranks.values()))
    np.testing.assert_array_equal(np.sort(table, 0), np.tile(np.arange(len(names))[:, None], (1, common.LABEL_SEEDS)))
    shuffled = random.sample(names, len(names))
    assert all((common.label_rank(shuffled, "isic2016")[name] == rank).all() for name, rank in ranks.items())


@given(ids)
def test_removing_an_image_from_the_list_keeps_the_order_of_the_others(names):
    """Ranks come from each id alone, so that a budget of the smaller list is one of the larger."""
    before, after = common.label_rank(names, "x"), common.label_rank(names[1:], "x")
    for seed in range(common.LABEL_SEEDS):
        left = sorted(names[1:], key=lambda name: before[name][seed])
        assert left == sorted(names[1:], key=lambda name: after[name][seed])


@given(st.integers(0, 2**31 - 1), st.integers(1, 30), st.integers(0, 200))
def test_an_order_shows_each_image_once_an_epoch_from_wherever_one_starts(seed, count, position):
    order = data.order(seed, "labelled", np.arange(count, dtype=np.int32))
    epoch = position // count
    assert sorted(int(order[p]) for p in range(epoch * count, (epoch + 1) * count)) == list(range(count))
    assert order[position] == data.order(seed, "labelled", np.arange(count, dtype=np.int32))[position]


@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4))
def test_the_shares_of_all_processes_are_the_batch(step, processes, each):
    order, batch = data.order(0, "x", np.arange(23, dtype=np.int32)), processes * each
    whole = data.batch_at(order, step, batch)
    for process in range(processes):
        places = range(process * each, (process + 1) * each)
        share = data.Share(order, step, batch, places)
        assert [share[p] for p in range(each)] == whole[places.start : places.stop].tolist()
        assert [share[p] for p in range(each, 2 * each)] == data.batch_at(order, step + 1, batch)[places].tolist()


# --- bytes from anywhere --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400))
def test_any_bytes_are_an_image_or_one_line(content):
    try:
        common.decode(content, "x.png")
    except DataError as error:
        assert str(error).startswith("x.png ") and "\n" not in str(error)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(8, 20), st.integers(8, 20))), st.integers(0, 60), st.integers(0, 255))
def test_a_png_with_a_changed_byte_is_an_image_or_one_line(pixels, place, byte):
    content = bytearray(common.png(pixels))
    content[place % len(content)] = byte
    try:
        assert common.decode(bytes(content), "x.png").size
    except DataError as error:
        assert str(error).startswith("x.png ") and "\n" not in str(error)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@given(seeds)
def test_a_checksum_sees_one_changed_word(dtype, seed):
    from mira_u_jax import checkpoint

    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.integers(-99, 99, (5, 7)), dtype)
    place = tuple(rng.integers(0, (5, 7)))
    assert checkpoint.checksums([x]) != checkpoint.checksums([x.at[place].add(1)])
