"""Folders of one's own: what is found and what is wrong, who is labelled and held out, what must not come in."""

import shutil

import cli_test
import ml_collections
import numpy as np
import pytest
from cli_test import encoded, main, refused, zips
from PIL import Image

from configs import folder as folder_config
from configs import isic
from mira_u_jax import config as configuration
from mira_u_jax import data, files, learned
from mira_u_jax.errors import UserError
from tfds_builders import build, common

NAMES = [f"mole {i:02d}" for i in range(12)]  # with a space, as people have them


def lesion(i, size=(40, 30)):
    """(image, mask) of size (w, h), a box of its own for each i."""
    w, h = size
    mask = np.zeros((h, w), np.uint8)
    mask[5 + i % 7 : 18 + i % 7, 8 + i : 20 + i] = 255
    skin = np.random.default_rng(i).integers(180, 230, (h, w, 3), np.uint8)
    return np.where(mask[..., None] > 0, skin // 3, skin), mask


@pytest.fixture
def mine(tmp_path):
    """12 images, JPEG and PNG and one of another size; outlines of the first 8 under the three names they may have."""
    for part in ("images/deep", "outlines"):
        (tmp_path / part).mkdir(parents=True)
    for i, name in enumerate(NAMES):
        image, mask = lesion(i, (64, 48) if i == 3 else (40, 30))
        where = "images/deep" if i % 5 == 4 else "images"
        Image.fromarray(image).save(tmp_path / where / f"{name}.{'jpg' if i % 2 else 'png'}", quality=95)
        if i < 8:
            suffix = ("", "_Segmentation", "_mask")[i % 3]
            Image.fromarray(mask // 255 if i == 0 else mask).save(tmp_path / "outlines" / f"{name}{suffix}.png")
    (tmp_path / "images" / "notes.txt").write_text("x")
    return tmp_path


def config(mine, **keys):
    arg = ",".join(f"{k}={v}" for k, v in {"images": mine / "images", "masks": mine / "outlines", **keys}.items())
    return configuration.check(folder_config.get_config(f"preset=smoke,{arg}"))


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_what_is_found_is_said(mine):
    found = files.check(mine / "images", mine / "outlines")
    assert list(found.images) == NAMES and list(found.masks) == NAMES[:8] and not found.wrong
    text = "\n".join(found.notes)
    assert "12 images, 40x30 to 64x48 pixels" in text and "8 outlines of them, 4 images without" in text
    assert "1 files that are no images" in text and "notes.txt" in text


def test_labelled_are_the_outlined_and_the_held_out_leave_both_parts(mine):
    whole = data.training_set(config(mine, holdout=0))
    assert whole.labelled.tolist() == list(range(8)) and whole.unlabelled.tolist() == list(range(12))
    rows = whole.rows.take(range(12))
    for i in range(8):  # a mask lies on its own image, in [0, 255] also where it came as 0 and 1
        image, mask = rows["image"][i].mean(-1), rows["mask"][i]
        assert mask.max() == 255 and image[mask > 200].mean() < image[mask < 50].mean() - 80
    assert not rows["mask"][8:].any()  # what nobody outlined

    settings = config(mine, holdout=0.4)
    part, held = data.training_set(settings), [n for n in NAMES[:8] if files.held_out(n, 0.4)]
    assert 0 < len(held) < 8 and len(part.labelled) == 8 - len(held) and len(part.unlabelled) == 12 - len(held)
    assert f"{len(held)} more held out" in part.summary
    examples = list(data.evaluation_set("folder", settings, split="test", data_dir=""))
    assert [e.id for e in examples] == held and data.measurable(settings) and not data.measurable(config(mine, holdout=0))
    trained = {image.tobytes() for image in part.rows.take(part.unlabelled)["image"]}
    assert len(trained) == 12 - len(held) and not trained & {e.image.tobytes() for e in examples}
    outlined = part.rows.take(part.unlabelled)["mask"].any((1, 2))
    assert np.flatnonzero(outlined).tolist() == part.labelled.tolist()  # places, without the held-out ones
    for e in examples:
        np.testing.assert_array_equal(e.mask, lesion(NAMES.index(e.id))[1] > 0)

    half = data.training_set(config(mine, holdout=0, frac=0.5))
    rank = common.label_rank(NAMES[:8], "folder")
    assert {NAMES[i] for i in half.labelled} == {n for n in NAMES[:8] if rank[n][0] < 4}
    assert len(half.unlabelled) == 12


def test_a_share_is_held_out_and_an_image_stays_on_its_side():
    names = [f"ISIC_{i:07d}" for i in range(3000)]
    held = {share: {n for n in names if files.held_out(n, share)} for share in (0, 0.2, 0.5)}
    assert not held[0] and held[0.2] < held[0.5] and 0.17 < len(held[0.2]) / 3000 < 0.23


def test_what_a_run_was_trained_on_is_not_measured(mine):
    """In a folder that holds the run's images too, under whatever name; nor what is outlined and held out later."""
    own, other = config(mine, holdout=0.4), mine / "other"
    for i, name in enumerate(NAMES):
        for part, pixels in zip(("images", "masks"), lesion(i, (64, 48) if i == 3 else (40, 30)), strict=True):
            (other / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(other / part / f"{name}.png")
    for path in (mine / "images").rglob("*.jpg"):
        (other / "images" / f"{path.stem}.png").unlink()
        shutil.copy(path, other / "images")
    learned.keep(mine, data.training_set(own).images)
    known = learned.of(mine, own)

    def measured(name, settings=own):
        found = data.evaluation_set(str(name), settings, split="test", data_dir="", known=known)
        assert not {e.id for e in found} & set(found.left_out) and len(found) + len(found.left_out) >= len(found)
        return [e.id for e in found], found.left_out

    held = [name for name in NAMES[:8] if files.held_out(name, 0.4)]
    assert 0 < len(held) < 8 and measured(other) == (held, [name for name in NAMES if name not in held])
    assert measured("folder") == (held, [])
    for path in [*(other / "images").glob(f"{NAMES[8]}.*"), *(other / "masks").glob(f"{NAMES[8]}.*")]:
        path.rename(path.with_name(f"renamed{path.suffix}"))
    assert "renamed" in measured(other)[1]
    (path,) = (other / "images").glob("renamed.*")
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert measured(other)[0] == [*held, "renamed"]

    for i, name in enumerate(NAMES):  # all are outlined now, so some of the pool count as held out
        Image.fromarray(lesion(i, (64, 48) if i == 3 else (40, 30))[1]).save(mine / "outlines" / f"{name}.png")
    for path in (*(mine / "outlines").glob("*_mask.png"), *(mine / "outlines").glob("*_Segmentation.png")):
        path.unlink()
    late = [name for name in NAMES[8:] if files.held_out(name, 0.6)]
    assert late and set(late) <= set(measured("folder", config(mine, holdout=0.6))[1])


@pytest.mark.parametrize("split", ["test", "dev"])
def test_an_archive_is_measured_without_the_images_of_isic_2016_that_taught(isic_dir, tmp_path, split):
    """As a folder, and as a data set; of a run from before they were kept too."""
    settings = configuration.check(isic.get_config(f"preset=smoke,frac=1,split={split},data_dir={isic_dir}"))
    pool = data.training_set(settings).images
    assert pool.ids == {*cli_test.TRAIN, *([DEV] if split == "test" else [])}
    older = learned.of(tmp_path / "older", settings)
    assert len(older.ids) > 700 and pool.ids <= older.ids and (DEV in older.ids) == (split == "test")
    ids = [*cli_test.TRAIN, DEV, "ISIC_0999999"]
    for id in ids:
        for part, pixels in zip(("images", "masks"), lesion(0), strict=True):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"{id}{'_Segmentation' if part == 'masks' else ''}.png")
    for known in (pool, older):
        found = data.evaluation_set(str(tmp_path), settings, split="test", data_dir="", known=known)
        assert [e.id for e in found] == ids[len(cli_test.TRAIN) + (split == "test"):]
        dev = data.evaluation_set("isic2016", settings, split="dev", data_dir=str(isic_dir), known=known)
        assert dev.left_out == ([DEV] if split == "test" else []) and len(dev) == (split == "dev")


def broken(mine):
    path = mine / "images" / "mole 02.png"
    path.write_bytes(path.read_bytes()[:200])
    return "mole 02.png", NAMES[2]


def other_size(mine):
    Image.new("L", (41, 30), 255).save(mine / "outlines" / "mole 03.png")
    return "mole 03.png is 41x30 but its image is 64x48", NAMES[3]


def orphan(mine):
    Image.new("L", (40, 30), 255).save(mine / "outlines" / "nobody.png")
    return "nobody.png has no image", None


def twice(mine):
    Image.new("RGB", (40, 30)).save(mine / "images" / "mole 09.bmp")
    return "are all mole 09: keep one", NAMES[9]


def bad_outline(mine):
    (mine / "outlines" / "mole 06.png").write_bytes(b"nothing")
    return "mole 06.png cannot be decoded", NAMES[6]


def test_a_digest_tells_data_apart(mine):
    """A run must not go on with a new outline that it would never learn from: its digest is another."""
    before = data.training_set(config(mine, holdout=0)).digest
    assert data.training_set(config(mine, holdout=0)).digest == before != data.training_set(config(mine)).digest
    Image.fromarray(lesion(9)[1]).save(mine / "outlines" / f"{NAMES[9]}.png")
    after = data.training_set(config(mine, holdout=0))
    assert len(after.labelled) == 9 and after.digest != before


def test_a_digest_tells_contents_apart_that_are_trained_on(mine):
    """An outline drawn anew under its name is other data; one that is held out or over the budget is not learnt from."""
    part = config(mine, frac=0.5)  # of the outlines that are not held out
    whole, before = data.training_set(part), data.training_set(part).digest
    ids = [id for id in NAMES if not (id in NAMES[:8] and files.held_out(id, part.files.holdout))]
    used = {ids[i] for i in whole.labelled}
    assert 0 < len(used) < len(set(ids) & set(NAMES[:8]))
    for id in NAMES[:8]:
        (path,) = (mine / "outlines").glob(f"{id}*")
        kept = path.read_bytes()
        Image.fromarray(255 - np.asarray(Image.open(path).convert("L"))).save(path)
        assert (data.training_set(part).digest != before) == (id in used), id
        path.write_bytes(kept)
    assert data.training_set(part).digest == before
    Image.fromarray(lesion(99)[0]).save(mine / "images" / f"{NAMES[10]}.png")  # of the pool, without an outline
    assert data.training_set(part).digest != before


def test_a_folder_whose_only_held_out_outline_is_damaged_has_nothing_to_measure_on(mine):
    for path in (mine / "outlines").glob("*"):
        path.write_bytes(b"")
    assert data.measurable(config(mine, holdout=0.9)) and not data.measurable(config(mine, holdout=0.9, skip=1))


@pytest.mark.parametrize("fault", [broken, other_size, orphan, twice, bad_outline])
def test_what_is_wrong_is_named_and_can_be_skipped(mine, fault, capsys):
    said, lost = fault(mine)
    with pytest.raises(UserError, match="wrong.*skip=1") as error:
        data.training_set(config(mine, holdout=0))
    assert said in str(error.value) and "\n" not in str(error.value)
    printed = capsys.readouterr().out
    assert "images, 40x30" in printed and any(said in line for line in printed.splitlines() if line.startswith("wrong: "))
    rest = data.training_set(config(mine, holdout=0, skip=1))
    assert len(rest.unlabelled) == 12 - (lost is not None)
    rest.rows.take(rest.unlabelled)  # nothing left that cannot be read
    settings = config(mine, holdout=0.99, skip=1)
    measured = [e.id for e in data.evaluation_set("folder", settings, split="test", data_dir="")]
    assert measured == [n for n in NAMES[:8] if n != lost]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"images": "/nowhere"}, ["images=/nowhere", "no such folder"]), ({"holdout": "1"}, ["holdout", "[0, 1)"]),
        ({"split": "dev"}, ["split=dev", "holdout"]), ({"masks": ""}, ["images and masks", "configs/folder.py"]),
        ({"skip": "2"}, ["skip", "0 or 1"]),
    ],
)
def test_a_wrong_key(mine, keys, words):
    with pytest.raises(UserError) as error:
        data.training_set(config(mine, **keys))
    for word in words:
        assert word in str(error.value)


def test_no_truth_no_report_on_it(mine, tiny_config):
    assert not configuration.outlined(config(mine)) and configuration.outlined(tiny_config())


def test_the_key_decides_only_where_it_names_a_folder(mine, tiny_config):
    """So that runs from before it go on, and results keep no path."""
    plain = tiny_config()
    old = ml_collections.FrozenConfigDict({k: v for k, v in plain.to_dict().items() if k != "files"})
    assert configuration.fingerprint(old) == configuration.fingerprint(plain)
    assert configuration.fingerprint(config(mine)) != configuration.fingerprint(config(mine, holdout=0))
    assert configuration.without_paths(plain.files.to_dict()) == configuration.without_paths({}) == {}
    kept = configuration.without_paths(config(mine).files.to_dict())
    assert kept == {"images": True, "masks": True, "extra": False, "init": False, "holdout": 0.2, "skip": 0}


# --- more images for ISIC ---------------------------------------------------------------------------------------------


DEV = "ISIC_0000008"  # a training image that split=dev is measured on


@pytest.fixture(scope="module")
def isic_dir(tmp_path_factory):
    """The set of tests/cli_test.py and a development image, built; with pictures of their own for what is measured on."""
    folder, mask = tmp_path_factory.mktemp("isic"), encoded(lesion(1)[1], "PNG")
    pictures = {id: (encoded(lesion(i)[0], "JPEG"), mask) for i, id in enumerate((*cli_test.TEST, DEV))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_test, "TRAIN", [*cli_test.TRAIN, DEV])
        zips(folder, **pictures)
    build.prepare("isic2016", config="128px", data_dir=folder)
    return folder


@pytest.mark.parametrize("split", ["test", "dev"])
def test_extra_images_hold_nothing_that_is_measured_on(isic_dir, tmp_path, split):
    assert common.is_dev("isic2016", DEV) and not any(common.is_dev("isic2016", id) for id in cli_test.TRAIN)
    (tmp_path / "renamed.jpg").write_bytes(encoded(lesion(0)[0], "JPEG"))  # the same bytes as a test image
    Image.open(tmp_path / "renamed.jpg").save(tmp_path / "as bitmap.bmp")  # the same pixels
    near = np.asarray(Image.open(tmp_path / "renamed.jpg")).copy()
    near[:, :, 0] += 1
    Image.fromarray(near).save(tmp_path / "near.png")  # no duplicate
    (tmp_path / "dev renamed.jpg").write_bytes(encoded(lesion(2)[0], "JPEG"))
    for i, name in enumerate(("ISIC_0000012", "ISIC_0000013", DEV, "new a", "new b")):  # 13: official, not in this copy
        Image.fromarray(lesion(6 + i)[0]).save(tmp_path / f"{name}.png")
    arg = f"preset=smoke,frac=1,split={split},extra={tmp_path},data_dir={isic_dir}"
    settings = configuration.check(isic.get_config(arg))
    assert not configuration.outlined(settings)
    found, dev = data.training_set(settings), split == "dev"
    own, more = 5 - dev, 3  # near, new a, new b
    assert len(found.labelled) == own and len(found.unlabelled) == own + more
    for how in ("equal to an image", "of a name"):  # of the development image each once
        assert f"left out: {2 + dev} {how} that is measured on" in found.summary
        assert (f"left out: 1 {how} that is in the pool already" in found.summary) == (not dev)
    rows = found.rows.take(found.unlabelled)
    assert len({image.tobytes() for image in rows["image"]}) == own + more
    assert sorted(found.images.files.values()) == ["near", "new a", "new b"] and len(found.images.ids) == own
    assert rows["mask"][:own].any((1, 2)).all() and not rows["mask"][own:].any()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_trains_is_measured_and_predicts(mine):
    """A path with a space; what is printed first; the held-out outlines in evaluation.json; no path in result.json."""
    run = mine / "run"
    arg = f"images={mine / 'images'},masks={mine / 'outlines'},holdout=0.4,preset=smoke,method=mean_teacher"
    status, out, err = main(f"--config=configs/folder.py:{arg}", f"--workdir={run}", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert status == 0, err
    held = [n for n in NAMES[:8] if files.held_out(n, 0.4)]
    assert f"folder: {8 - len(held)} labelled of {12 - len(held)} images" in out and "12 images, 40x30 to 64x48" in out
    assert f'"images": {len(held)}' in (run / "evaluation.json").read_text()
    assert "teacher_dice" not in (run / "metrics.jsonl").read_text() and '"sigma"' in (run / "metrics.jsonl").read_text()
    assert str(mine) not in (run / "result.json").read_text()
    assert list((run / "events" / "train").iterdir()) and list((run / "cases").glob("*/cases.json"))
    done = main(f"--workdir={run}", f"--input={mine / 'images'}", f"--output={mine / 'out'}", module="mira_u_jax.predict")
    assert done[0] == 0, done[2]
    assert {p.name for p in (mine / "out").glob("*_mask.png")} == {f"{n}_mask.png" for n in NAMES}


def test_the_command_names_a_folder_that_is_not_there(tmp_path):
    refused(main(f"--config=configs/folder.py:images={tmp_path}/x,masks={tmp_path}"), "images", f"{tmp_path}/x")
    refused(main("--config=configs/folder.py"), "images and masks")
