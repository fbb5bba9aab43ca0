"""Augmentation against NumPy, SciPy and Pillow, and what must move together."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from ml_collections import FrozenConfigDict
from PIL import Image, ImageEnhance, ImageOps

from mira_u_jax import augment
from tests import warping

RNG = np.random.default_rng(0)
STILL = dict(flip=False, rotate=0.0, scale=0.0, shift=0.0)
MOVING = dict(flip=True, rotate=180.0, scale=0.25, shift=0.1)
warp = jax.jit(augment.warp)


def close(found, wanted, atol=1e-6):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=atol)


def photo(h=32, w=32):
    """A smooth uint8 colour image with noise: enough structure for every operation to show."""
    noise = scipy.ndimage.gaussian_filter(RNG.normal(size=(h, w, 3)), (3, 3, 0), mode="wrap")
    values = 130 + 55 * noise / noise.std() + 8 * RNG.normal(size=(h, w, 3))
    return values.clip(20, 235).astype(np.uint8)


PHOTO = photo()


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "atol"), [(32, 32, 0), (24, 40, 2e-4)])
def test_the_identity_leaves_the_image(h, w, atol):
    """Exact where the side is a power of two; elsewhere coordinates round to a 1e-5th of a pixel."""
    image = RNG.uniform(size=(h, w, 3)).astype(np.float32)
    close(warp(image, jnp.eye(2, 3)), image, atol)


def test_flips_and_quarter_turns_equal_numpy():
    """The affine sends output (y, x) to input (v, u), so each matrix is the inverse of what one sees."""
    image = RNG.uniform(size=(32, 32, 3)).astype(np.float32)
    for linear, wanted in (
        ([[1, 0], [0, -1]], np.flip(image, 1)), ([[-1, 0], [0, 1]], np.flip(image, 0)),
        ([[0, 1], [-1, 0]], np.rot90(image)), ([[0, -1], [1, 0]], np.rot90(image, -1)),
        ([[0, 1], [1, 0]], image.swapaxes(0, 1)),
    ):
        close(warp(image, jnp.asarray(np.c_[linear, [0, 0]], jnp.float32)), wanted)


@pytest.mark.parametrize("seed", range(6))
def test_warp_equals_its_definition(seed):
    """Random affines far out of the frame, and steep images, so that some values would leave [0, 1]."""
    image = RNG.uniform(size=(32, 48, 2)).round(1 if seed % 2 else 0).astype(np.float32)
    affine = np.random.default_rng(seed).normal(0, 1, (2, 3)).astype(np.float32)
    wanted = np.stack([warping.warp(image[..., c], affine) for c in range(2)], -1)
    assert ((wanted == 0) | (wanted == 1)).mean() > 0.01 or seed % 2
    close(warp(image, affine), wanted, 2e-4)


def test_warp_keeps_more_of_an_image_than_bilinear_weights():
    """Why it is cubic: half a pixel aside, a fine grating keeps less of its contrast with bilinear weights."""
    grating = (0.5 + 0.4 * np.cos(2 * np.pi * np.arange(32) / 4))[None, :, None] * np.ones((32, 1, 1))
    affine = np.array([[1, 0, 0], [0, 1, 1 / 32]])  # half a pixel to the right
    inside = np.s_[:, 4:-4]
    kept = np.asarray(warp(grating.astype(np.float32), jnp.asarray(affine, jnp.float32)))[inside].std()
    bilinear = ((grating + np.roll(grating, -1, 1)) / 2)[inside].std()
    assert bilinear * 1.1 < kept < grating[inside].std() * 1.05


@pytest.mark.parametrize(("index", "wanted"), [(-1, 0), (-4, 3), (-5, 3), (3, 3), (4, 3), (7, 0), (8, 0), (9, 1)])
def test_mirrored(index, wanted):
    assert augment.mirrored(jnp.asarray(float(index)), 4) == wanted


def test_random_affine_stays_in_its_ranges_and_fills_them():
    cfg = FrozenConfigDict(MOVING | {"rotate": 30.0})
    draw = jax.jit(jax.vmap(lambda key: augment.random_affine(key, cfg)))
    affine = np.asarray(draw(jax.random.split(jax.random.key(0), 500)), np.float64)
    linear, shift = affine[..., :2], affine[..., 2]
    singular = np.linalg.svd(linear, compute_uv=False)
    np.testing.assert_allclose(singular[:, 0], singular[:, 1], rtol=1e-5)  # a similarity: no shear, no squash
    assert 1 / 1.25 - 1e-6 < singular.min() < 0.82 and 1.22 < singular.max() < 1.25 + 1e-6
    assert 0.19 < np.abs(shift).max() <= 0.2 and shift.min() < 0 < shift.max()  # .1 of the side, 2 across
    assert (np.linalg.det(linear) > 0).all()  # flips are not its business
    angle = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert angle.min() < -28 and angle.max() > 28 and np.abs(angle).max() <= 30 + 1e-3


def test_random_affine_can_be_still():
    assert (augment.random_affine(jax.random.key(1), FrozenConfigDict(STILL)) == jnp.eye(2, 3)).all()


def test_flips_come_in_all_four_kinds_and_take_the_mask_along():
    image, flip = RNG.uniform(size=(8, 6, 3)).astype(np.float32), FrozenConfigDict(MOVING)
    draw = jax.jit(jax.vmap(lambda key: augment.flipped(key, image, image[..., 0], flip)))
    images, masks = map(np.asarray, draw(jax.random.split(jax.random.key(0), 400)))
    np.testing.assert_array_equal(masks, images[..., 0])
    wanted = [np.flip(image, axes) for axes in ((), (0,), (1,), (0, 1))]
    share = [np.mean([np.array_equal(i, w) for i in images]) for w in wanted]
    assert sum(share) == 1 and min(share) > 0.18
    still = augment.flipped(jax.random.key(0), image, image[..., 0], FrozenConfigDict(STILL))
    np.testing.assert_array_equal(still[0], image)


# --- colour -----------------------------------------------------------------------------------------------------------


@functools.cache
def batched(op):
    return jax.jit(jax.vmap(op))


def apply(op, m, image=PHOTO):
    """One image of a compiled batch whose other image and strength are different."""
    batch = np.stack([image, image[::-1]]).astype(np.float32) / 255
    return np.asarray(batched(op)(batch, jnp.asarray([m, 0.3 - m], jnp.float32)))[0]


@pytest.mark.parametrize("m", [-1.0, -0.4, 0.5, 1.0])
@pytest.mark.parametrize(
    ("op", "enhance", "strength", "tolerance"),
    [
        (augment.brightness, ImageEnhance.Brightness, 0.5, 1.5),  # Pillow truncates to whole values
        (augment.contrast, ImageEnhance.Contrast, 0.5, 2.5),  # and rounds the mean grey
        (augment.saturation, ImageEnhance.Color, 0.9, 2.5),  # and the grey of each pixel
        (augment.sharpness, ImageEnhance.Sharpness, 0.9, 2.5),
    ],
)
def test_colour_equals_pillow(op, enhance, strength, tolerance, m):
    wanted = np.asarray(enhance(Image.fromarray(PHOTO)).enhance(1 + strength * m), float)
    inside = np.s_[1:-1, 1:-1]  # Pillow's 3x3 filter leaves the border as it is
    close(255 * apply(op, m)[inside], wanted[inside], tolerance)
    assert np.abs(wanted - PHOTO).max() > 5  # the comparison is not of two identities


def test_autocontrast_equals_pillow():
    wanted = np.asarray(ImageOps.autocontrast(Image.fromarray(PHOTO)), float)
    close(255 * apply(augment.autocontrast, 1.0), wanted, 1.5)
    close(255 * apply(augment.autocontrast, -0.5), (wanted + PHOTO) / 2, 1.5)


@pytest.mark.parametrize(("m", "bits"), [(0.0, 8), (0.25, 7), (-0.5, 6), (1.0, 4), (-1.0, 4)])
def test_posterize_keeps_pillows_bits(m, bits):
    """The same levels as Pillow, which leaves the lowest bits 0 where we stretch to white."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    level = np.asarray(ImageOps.posterize(Image.fromarray(ramp), bits)) >> (8 - bits)
    close(apply(augment.posterize, m, ramp), level / (2**bits - 1))


@pytest.mark.parametrize("m", [-1.0, 0.5, 1.0])
def test_gamma_equals_pillow(m):
    table = [255 * (i / 255) ** 2.0**m for i in range(256)] * 3
    close(255 * apply(augment.gamma, m), np.asarray(Image.fromarray(PHOTO).point(table), float), 1.0)


@pytest.mark.parametrize("m", [-1.0, 0.4, 1.0])
def test_temperature_equals_pillow(m):
    matrix = (1 + 0.15 * m, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1 - 0.15 * m, 0)
    wanted = np.asarray(Image.fromarray(PHOTO).convert("RGB", matrix), float)
    close(255 * apply(augment.temperature, m), wanted, 1.0)
    assert np.abs(wanted - PHOTO).max() > 5


@pytest.mark.parametrize("m", [-1.0, 0.4, 1.0])
def test_hue_equals_pillow(m):
    """A turn by 25 degrees of the I-Q plane; RGB to YIQ with the decimals of the standard, applied by Pillow."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.59590059, -0.27455667, -0.32134392], [0.21153661, -0.52273617, 0.31119955]])
    cos, sin = np.cos(np.radians(25 * m)), np.sin(np.radians(25 * m))
    turn = np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ to_yiq
    matrix = np.concatenate([turn, np.zeros((3, 1))], 1).ravel()
    wanted = np.asarray(Image.fromarray(PHOTO).convert("RGB", tuple(matrix)), float)
    close(255 * apply(augment.hue, m), wanted, 1.5)
    assert np.abs(wanted - PHOTO).max() > 5


def test_rand_augment_draws_every_operation_and_sign_with_its_magnitude():
    """What one draw did is found by trying all: 10 operations, two signs, strength .7; about each as often as another."""
    image = jnp.asarray(PHOTO[::4, ::4], jnp.float32) / 255
    draw = jax.jit(jax.vmap(lambda key: augment.rand_augment(key, image, ops=1, magnitude=7.0)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 600)))
    tried = {(op, sign): np.asarray(op(image, jnp.float32(sign * 0.7))) for op in augment.COLOUR_OPS for sign in (-1, 1)}
    distance = np.stack([np.abs(found - result).max((1, 2, 3)) for result in tried.values()])
    assert distance.min(0).max() < 1e-5
    ops, signs = zip(*(list(tried)[i] for i in distance.argmin(0)), strict=True)
    counts = [ops.count(op) for op in augment.COLOUR_OPS]
    assert min(counts) > 35 and max(counts) < 90  # 60 expected
    signed = [sign for op, sign in zip(ops, signs, strict=True) if op in (augment.brightness, augment.gamma, augment.hue)]
    assert 0.35 < np.mean(np.array(signed) > 0) < 0.65


def test_rand_augment_applies_its_operations_in_turn():
    image = jnp.asarray(PHOTO[::4, ::4], jnp.float32) / 255
    draw = jax.jit(jax.vmap(lambda key: augment.rand_augment(key, image, ops=2, magnitude=10.0)))
    found = np.asarray(draw(jax.random.split(jax.random.key(1), 20)))
    ops = [functools.partial(op, m=jnp.float32(sign)) for op in augment.COLOUR_OPS for sign in (-1, 1)]
    tried = np.stack([np.asarray(second(first(image))) for first in ops for second in ops])
    assert max(np.abs(tried - result).max((1, 2, 3)).min() for result in found) < 1e-5


def test_colour_jitter_has_a_strength_of_its_own_for_each_operation():
    key, image = jax.random.key(2), jnp.asarray(PHOTO, jnp.float32) / 255
    m = 2 * np.asarray(jax.random.uniform(key, (4,))) - 1
    assert np.ptp(m) > 0.3
    wanted = image
    for op, strength in zip((augment.brightness, augment.contrast, augment.saturation, augment.temperature), m, strict=True):
        wanted = op(wanted, 0.5 * strength)
    close(jax.jit(augment.colour_jitter)(key, image, 0.5), wanted, 1e-5)
    close(augment.colour_jitter(key, image, 0.0), image, 1e-6)


@pytest.mark.parametrize("op", augment.COLOUR_OPS, ids=lambda op: op.__name__)
def test_colour_stays_in_range_and_zero_is_the_identity(op):
    black_to_white = np.stack([PHOTO, 255 * (PHOTO > 128), 0 * PHOTO])[..., :3]
    for image in black_to_white:
        for m in (-1, -0.5, 0, 0.5, 1):
            found = apply(op, m, image)
            assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6, m
        close(apply(op, 0, image), image / 255, 1e-5)


# --- boxes, CutMix ----------------------------------------------------------------------------------------------------


def assert_box(mask, low, high, slack=0.07):
    """`mask` (h, w) bool is one filled rectangle that covers a share of the frame in [low, high], up to whole pixels."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask.any()
    assert mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
    assert low - slack <= mask.mean() <= high + slack


def test_random_boxes():
    draw = jax.jit(jax.vmap(lambda k: augment.random_box(k, 64, 64, 0.1, 0.5)))
    boxes = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    for box in boxes:
        assert_box(box > 0, 0.1, 0.5, slack=0.02)
    assert 0.25 < boxes.mean() < 0.35  # the area is uniform in [.1, .5]
    assert (boxes.max(0)[4:-4, 4:-4] == 1).all()  # only the outermost pixels are hard to reach from within the frame


@functools.partial(jax.jit, static_argnums=1)
def mixed(key, probability, *arrays):
    return augment.cutmix(key, probability, arrays)


@pytest.fixture(scope="module")
def arrays():
    """A colour batch and two maps whose values say which example and pixel they come from."""
    image = RNG.uniform(size=(4, 32, 32, 3)).astype(np.float32)
    return image, image[..., 0].copy(), image[..., 1] + 2


def test_cutmix_swaps_one_box_between_partners_in_every_array(arrays):
    found = [np.asarray(a) for a in mixed(jax.random.key(0), 1.0, *arrays)]
    partner = [1, 0, 3, 2]
    swapped = found[1] != arrays[1]
    for i in range(4):
        assert_box(swapped[i], 0.1, 0.5)
        assert (swapped[i] == swapped[partner[i]]).all()
    assert (swapped[0] != swapped[2]).any()  # pairs have boxes of their own
    for before, after in zip(arrays, found, strict=True):
        box = swapped if before.ndim == 3 else swapped[..., None]
        np.testing.assert_array_equal(after, np.where(box, before[partner], before))


def test_cutmix_probability_and_key(arrays):
    for before, after in zip(arrays, mixed(jax.random.key(0), 0.0, *arrays), strict=True):
        np.testing.assert_array_equal(before, after)
    first, again, other = (mixed(jax.random.key(k), 1.0, *arrays)[1] for k in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    each = jax.vmap(lambda k: augment.cutmix(k, 0.25, arrays[1]))(jax.random.split(jax.random.key(2), 200))
    used = (np.asarray(each) != arrays[1]).any((2, 3))
    assert 0.18 < used.mean() < 0.33
    np.testing.assert_array_equal(used[:, 0], used[:, 1])


# --- views ------------------------------------------------------------------------------------------------------------


def settings(geometry, **colour):
    default = dict(
        labelled_colour=0.5, weak_colour=0.2, strong_views=1, strong_ops=2, strong_magnitude=9.0, cutout=0.15,
        upright=True,
    )
    return FrozenConfigDict(default | colour | {"geometry": geometry})


labelled_view = jax.jit(augment.labelled_view, static_argnums=3)
views = jax.jit(augment.weak_strong_views, static_argnums=3)
PLAIN = dict(labelled_colour=0.0, weak_colour=0.0, strong_ops=0, cutout=0.0)


def weak_strong_views(key, image, mask, cfg):
    """weak, strong, notcut, affine, mask, of the first strong view."""
    weak, [(strong, notcut), *_], affine, mask = views(key, image, mask, cfg)
    return weak, strong, notcut, affine, mask


@pytest.fixture(scope="module")
def blobs():
    """Batch of 4 whose red channel IS the mask, a soft blob off the centre; green and blue are noise."""
    y, x = np.mgrid[:32, :32]
    mask = np.stack([1 / (1 + np.exp(np.hypot(y - cy, x - cx) - 6)) for cy, cx in ((9, 20), (15, 12), (22, 22), (8, 8))])
    return np.concatenate([mask[..., None], RNG.uniform(size=(4, 32, 32, 2))], -1).astype(np.float32), np.float32(mask)


def test_image_and_mask_move_together(blobs):
    image, mask = labelled_view(jax.random.key(3), *blobs, settings(MOVING, **PLAIN))
    close(image[..., 0], mask)
    moved = np.abs(np.asarray(mask) - blobs[1]).max((1, 2))
    assert moved.min() > 0.1  # each was moved
    assert image.shape == (4, 32, 32, 3) and image.dtype == jnp.float32


def test_what_is_moved_fits_the_strong_view(blobs):
    """The weak view lies as the image does, flips apart; its mask, moved, is the strong view's lesion."""
    weak, strong, notcut, affine, mask = weak_strong_views(jax.random.key(3), *blobs, settings(MOVING, **PLAIN))
    close(weak[..., 0], mask)
    for i in range(4):
        assert any(np.array_equal(mask[i], np.flip(blobs[1][i], axes)) for axes in ((), (0,), (1,), (0, 1)))
    found = augment.moved({"a": mask, "b": (1 - mask, mask)}, affine)
    close(found["a"], strong[..., 0])
    close(found["b"][0], 1 - strong[..., 0], 1e-5)
    close(found["b"][1], found["a"])
    for i in range(4):
        close(found["a"][i], warping.warp(np.asarray(mask[i], np.float64), affine[i]), 2e-4)
    assert (notcut == 1).all()
    assert np.abs(np.asarray(strong[..., 0]) - mask).max((1, 2)).min() > 0.1


def test_not_upright_all_views_share_one_geometry(blobs):
    weak, strong, _, affine, mask = weak_strong_views(
        jax.random.key(3), *blobs, settings(MOVING, **PLAIN, upright=False)
    )
    close(weak, strong)
    close(weak[..., 0], mask)
    close(augment.moved(mask, affine), mask)
    there = weak_strong_views(jax.random.key(3), *blobs, settings(MOVING, **PLAIN))[1]
    close(strong, there)  # the strong view is the same picture either way


def test_notcut_is_zero_exactly_where_the_strong_view_is_grey(blobs):
    cfg = settings(MOVING, **PLAIN | {"cutout": 0.3})
    _, strong, notcut, _, _ = map(np.asarray, weak_strong_views(jax.random.key(4), *blobs, cfg))
    whole = np.asarray(weak_strong_views(jax.random.key(4), *blobs, settings(MOVING, **PLAIN))[1])
    np.testing.assert_array_equal(notcut == 0, (strong == 0.5).all(-1))
    assert set(np.unique(notcut)) == {0, 1}
    for cut in notcut == 0:
        assert_box(cut, 0.02, 0.3)
    close(np.where(notcut[..., None] == 1, whole - strong, 0), np.zeros_like(whole))  # and nowhere else


def test_two_strong_views_differ_in_colour_and_box_only(blobs):
    """As UniMatch draws them; the first one is the same whether or not there is a second."""
    cfg = settings(MOVING, cutout=0.3, strong_views=2)
    weak, strong, affine, _ = views(jax.random.key(4), *blobs, cfg)
    (first, first_left), (second, second_left) = strong
    assert (np.asarray(first_left) != np.asarray(second_left)).any((1, 2)).all()
    assert np.abs(first - second).max((1, 2, 3)).min() > 0.05
    alone = views(jax.random.key(4), *blobs, settings(MOVING, cutout=0.3))
    chex.assert_trees_all_equal((weak, strong[0], affine), (alone[0], alone[1][0], alone[2]))
    still = views(jax.random.key(4), *blobs, settings(STILL, **PLAIN, strong_views=2))
    for view, notcut in still[1]:
        close(view, still[0])
        assert (notcut == 1).all()


def test_colour_changes_the_image_and_never_the_mask(blobs):
    """The strong view differs more than the weak one; the mask is that of the plain views."""
    cfg = settings(STILL)
    weak, strong, _, _, mask = map(np.asarray, weak_strong_views(jax.random.key(5), *blobs, cfg))
    image, label = labelled_view(jax.random.key(5), *blobs, cfg)
    np.testing.assert_array_equal(mask, blobs[1])
    np.testing.assert_array_equal(label, blobs[1])
    for view in (weak, strong, image):
        assert view.min() >= -1e-6 and view.max() <= 1 + 1e-6
        assert np.abs(view - blobs[0]).max() > 0.02
    assert np.abs(strong - blobs[0]).mean() > np.abs(weak - blobs[0]).mean()


def test_an_example_does_not_depend_on_the_batch_size(blobs):
    """One of 4 is what it would be among 2: keys follow the global index, so devices may share a batch."""
    cfg, key = settings(MOVING), jax.random.key(6)
    half = [a[:2] for a in blobs]
    for view in (labelled_view, weak_strong_views):
        for whole, part in zip(view(key, *blobs, cfg), view(key, *half, cfg), strict=True):
            close(whole[:2], part, 1e-5)
    close(mixed(key, 0.5, *blobs)[0][:2], mixed(key, 0.5, *half)[0], 0)


def test_examples_and_keys_differ(blobs):
    same = [np.repeat(a[:1], 4, 0) for a in blobs]
    cfg = settings(MOVING)
    image, _ = labelled_view(jax.random.key(0), *same, cfg)
    other, _ = labelled_view(jax.random.key(1), *same, cfg)
    again, _ = labelled_view(jax.random.key(0), *same, cfg)
    np.testing.assert_array_equal(image, again)
    assert np.abs(image[0] - image[1]).max() > 0.05 and np.abs(image - other).max() > 0.05
