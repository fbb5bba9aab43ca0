"""Images and masks as cameras, editors and archives store them: what `decode` makes of them. Refused: hostile_test.py."""

import io

import numpy as np
import pytest
from PIL import Image

from mira_u_jax import data, files
from tfds_builders import common
from tfds_builders.common import DataError, Source

LESION = np.pad(np.full((20, 30), 255, np.uint8), ((20, 20), (25, 25)))  # 60 x 80
SKIN = np.where(LESION[..., None] > 0, [90, 60, 50], [210, 170, 150]).astype(np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def rgb(data):
    return np.asarray(common.decode(data, "x.png").convert("RGB")).astype(int)


def rotated_tag(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    return encoded(image, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize(
    "store",
    [
        lambda image: encoded(image),
        lambda image: encoded(image.convert("RGBA")),
        lambda image: encoded(image.quantize(64)),
        lambda image: encoded(image.convert("CMYK"), "TIFF"),
        lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
        lambda image: encoded(image, "BMP"),
        lambda image: encoded(image, "MPO", save_all=True, append_images=[image.resize((40, 30))]),
        rotated_tag,
    ],
    ids=["PNG", "RGBA", "palette", "CMYK TIFF", "CMYK JPEG", "BMP", "MPO", "EXIF orientation"],
)
def test_the_same_picture_however_it_is_stored(store):
    found = rgb(store(Image.fromarray(SKIN)))
    assert found.shape == (60, 80, 3)  # as stored, not as a tag would turn it
    inner = np.s_[25:35, 35:45]  # away from the outline, where JPEG rings
    assert np.abs(found[inner] - SKIN[inner].astype(int)).max() < 8 and np.abs(found[:10] - SKIN[:10].astype(int)).max() < 8


def test_grey_and_sixteen_bits():
    grey = SKIN[..., 0]
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(grey)))[..., 1], grey)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(rgb(encoded(sixteen))[..., 2], grey)
    np.testing.assert_array_equal(rgb(encoded(sixteen, "TIFF"))[..., 2], grey)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(grey.astype(np.uint16))))[..., 0], grey)  # 8 bits in 16


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(LESION), Image.fromarray(LESION // 255), Image.fromarray(LESION > 0),
        Image.fromarray(LESION).convert("RGBA"), Image.fromarray(LESION.astype(np.uint16) * 257),
        Image.fromarray(LESION.astype(np.uint16)), Image.fromarray(LESION // 255 * 200),
    ],
    ids=["0/255", "0/1", "1 bit", "RGBA", "16 bits", "8 bits in 16", "0/200"],
)
def test_the_same_mask_however_it_is_stored(mask):
    np.testing.assert_array_equal(common.binary_mask(common.decode(encoded(mask), "m.png")), LESION)


def test_a_palette_mask_is_read_by_its_colours_and_refused_where_they_say_nothing():
    indices = Image.fromarray(LESION // 255).convert("P")
    indices.putpalette([0, 0, 0, 255, 255, 255])
    np.testing.assert_array_equal(common.binary_mask(common.decode(encoded(indices), "m.png")), LESION)
    indices.putpalette([0, 0, 0, 128, 0, 0])  # dark red, as the palettes of some data sets have it
    with pytest.raises(DataError, match="m.png has values up to 38"):
        common.binary_mask(common.decode(encoded(indices), "m.png"), "m.png")


def test_the_upper_limit_is_just_refused_and_looked_at_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(common, "MAX_PIXELS", 60 * 80)
    assert rgb(encoded(Image.fromarray(SKIN))).shape == (60, 80, 3)
    wider = encoded(Image.fromarray(np.pad(SKIN, ((0, 0), (0, 1), (0, 0)))))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("loaded"))
    with pytest.raises(DataError, match="more than 4,800 pixels: shrink it"):
        common.decode(wider, "x.png")


def folder(path, masks, suffix=".png"):
    for part in ("images", "masks"):
        (path / part).mkdir()
    for name, mask in masks.items():
        (path / "images" / f"{name}.JPG").write_bytes(encoded(Image.fromarray(SKIN), "JPEG"))
        (path / "masks" / f"{name}{suffix}").write_bytes(encoded(Image.fromarray(mask)))
    return path


def test_names_with_spaces_umlauts_and_upper_case_extensions(tmp_path):
    names = ["läsion 1", "病变", "a.b", "MIXED Case"]
    examples = list(data.folder(folder(tmp_path, dict.fromkeys(names, LESION), "_Segmentation.PNG"), 32))
    assert sorted(e.id for e in examples) == sorted(names)
    assert all((e.mask == (LESION > 0)).all() for e in examples)


def test_links_inside_a_folder_are_files(tmp_path):
    folder(tmp_path, {"a": LESION})
    (tmp_path / "images" / "b.JPG").symlink_to(tmp_path / "images" / "a.JPG")
    (tmp_path / "masks" / "b.png").symlink_to("a.png")
    assert [e.id for e in data.folder(tmp_path, 32)] == ["a", "b"]


def test_a_persons_own_folder_may_hold_links_to_anywhere_and_files_that_are_no_images(tmp_path):
    store, mine = tmp_path / "store", tmp_path / "mine"
    store.mkdir()
    mine.mkdir()
    folder(store, {"a": LESION, "b": LESION})
    folder(mine, {"a": LESION})
    (mine / "images" / "b.JPG").symlink_to(store / "images" / "b.JPG")
    (mine / "masks" / "b.png").symlink_to(store / "masks" / "b.png")
    (mine / "images" / "Thumbs.db").write_bytes(b"x")
    (mine / "masks" / "README.txt").write_text("outlines by two readers")
    assert [e.id for e in data.folder(mine, 32)] == ["a", "b"]
    found = files.check(mine / "images", mine / "masks")
    assert list(found.masks) == ["a", "b"] and not found.wrong
    with pytest.raises(DataError, match="b.JPG is a link out of the folder"):
        Source(mine / "images")
