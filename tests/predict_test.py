"""Which files are inputs, what is written for each, and what a file that cannot be read does to the others."""

import csv
import io
import os
import pathlib
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mira_u_jax import inputs, predict, steps, trained
from mira_u_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes longest
PH2 = ROOT.parent / "shared" / "data" / "ph2_sample"


def draw(path, size=(40, 30), box=None):
    """An image of size (w, h), light with a dark box (left, top, right, bottom)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (220, 200, 190))
    if box:
        image.paste((60, 40, 30), box)
    image.save(path)
    return path


# --- inputs -----------------------------------------------------------------------------------------------------------


def ids(*names, **options):
    return list(inputs.find([str(name) for name in names], **options))


@pytest.fixture
def photos(tmp_path):
    for name in ("a.png", "sub/b.jpg", "sub/c.BMP", ".hidden/d.png", "__MACOSX/e.png"):
        draw(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_a_file_a_glob_a_zip_and_a_list(photos, monkeypatch):
    assert ids(photos) == ["a", "b", "c"]
    assert ids(photos / "sub" / "b.jpg", photos / "a.png") == ["b", "a"]  # in their order
    assert ids(f"{photos}/sub/*") == ["b", "c"]
    assert ids(f"{photos}/**/*.png") == ["a"]
    with zipfile.ZipFile(photos.parent / "z.zip", "w") as z:
        z.write(photos / "a.png", "deep/a.png")
        z.writestr("readme.txt", "x")
    assert ids(photos.parent / "z.zip") == ["a"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos}/a.png\n\n{photos}/gone.png\n{photos}/sub\n"))
    assert ids("-") == ["a", "gone", "b", "c"]  # a line that does not exist is reported with the files that are bad
    assert ids(photos, photos / "a.png", photos / "sub") == ["a", "b", "c"]  # once each


def test_outlines_of_ph2_and_isic_are_no_inputs(tmp_path):
    for name in (
        "IMD002/IMD002_Dermoscopic_Image/IMD002.bmp", "IMD002/IMD002_lesion/IMD002_lesion.bmp",
        "IMD002/IMD002_roi/IMD002_R1_Label3.bmp", "ISIC_1.jpg", "ISIC_1_Segmentation.png", "loose/IMD003_lesion.bmp",
    ):
        draw(tmp_path / name)
    assert ids(tmp_path) == ids(f"{tmp_path}/**/*") == ["IMD002", "ISIC_1"]


@pytest.mark.skipif(not PH2.is_dir(), reason="no PH2 images here")
def test_the_ph2_sample_is_20_images():
    assert len(ids(PH2)) == 20


def test_two_files_of_one_name_keep_apart(tmp_path):
    for name in ("x/1.png", "y/1.png", "y/2.png", "y/2.jpg", "x_1.png"):
        draw(tmp_path / name)
    found = inputs.find([str(tmp_path)])
    assert len(found) == 5 and len({i.lower() for i in found}) == 5
    assert found["x_1"].name == "x_1.png" and found["y_1"].name == "y/1.png"
    assert {found[i].name for i in found} == {"x/1.png", "y/1.png", "y/2.png", "y/2.jpg", "x_1.png"}


def test_the_output_is_no_input(photos):
    draw(photos / "out" / "a_mask.png")
    assert ids(photos, ignore=photos / "out") == ["a", "b", "c"]


def test_images_may_lie_where_the_output_goes(photos):
    for what in ("mask", "overlay", "sigma", "probability"):
        draw(photos / f"a_{what}.png")
    assert ids(photos, ignore=photos) == ids(photos, ignore=photos.parent) == ["a", "b", "c"]
    assert ids(photos / "a.png", ignore=photos) == ["a"]


def test_a_table_of_somebody_elses_is_not_overwritten(tmp_path, darkness):
    """What predict wrote itself it writes again."""
    draw(tmp_path / "a.png")
    output = tmp_path / "out"
    run([tmp_path / "a.png"], output)
    written = (table := output / "predictions.csv").read_text()
    run([tmp_path / "a.png"], output)
    table.write_text("")  # of a call that was killed while it compiled
    run([tmp_path / "a.png"], output)
    assert table.read_text().split(",")[:3] == written.split(",")[:3]
    table.write_text("id,diagnosis\na,naevus\n")
    with pytest.raises(UserError, match="predictions.csv is not of predict's making.*another --output"):
        run([tmp_path / "a.png"], output)
    assert table.read_text() == "id,diagnosis\na,naevus\n"


def test_a_list_of_failures_of_somebody_elses_is_not_overwritten(tmp_path, darkness):
    draw(tmp_path / "a.png")
    (note := tmp_path / "out" / "failed.txt").parent.mkdir()
    note.write_text("patients who did not come\n")
    with pytest.raises(UserError, match="failed.txt is not of predict's making.*another --output"):
        run([tmp_path / "a.png"], tmp_path / "out")
    assert note.read_text() == "patients who did not come\n"


def test_a_call_adds_to_what_earlier_calls_found(tmp_path, darkness):
    """The lines of other images stay, those of these are written anew; a line that was cut off goes."""
    for name, size in (("a", (64, 64)), ("b, the other", (48, 48)), ("c", (64, 32))):
        draw(tmp_path / f"{name}.png", size, (8, 8, 24, 24))
    output = tmp_path / "out"
    table = output / "predictions.csv"
    run([tmp_path / "a.png", tmp_path / "b, the other.png"], output)
    first = table.read_text().splitlines()
    table.write_text("\n".join([*first, "c,0.1"]))
    draw(tmp_path / "a.png", (64, 64))  # no lesion now
    run([tmp_path / "a.png", tmp_path / "c.png"], output)
    with table.open(newline="") as f:
        rows = {row["id"]: row for row in csv.DictReader(f)}
    assert list(rows) == ["b, the other", "a", "c"] and table.read_text().splitlines()[:2] == [first[0], first[2]]
    assert float(rows["a"]["area_share"]) == 0 < float(rows["c"]["area_share"]) and float(rows["c"]["seconds"]) > 0


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_an_outline_drawn_by_hand_is_not_overwritten(tmp_path, darkness, content):
    """a_mask.png beside a.png is what files.py takes for an outline; predict's own may be written again."""
    draw(tmp_path / "b.png")
    run([tmp_path], tmp_path)
    drawn = draw(tmp_path / "a.png").with_name("a_mask.png")
    if content:
        drawn.write_bytes(content)
    else:
        draw(drawn)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="a_mask.png is not of predict's making.*another --output"):
        run([tmp_path], tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    drawn.unlink()
    assert run([tmp_path], tmp_path) == {} and drawn.exists()


@pytest.mark.parametrize("name", ["nothing", "empty", "*.tiff"])
def test_nothing_to_predict_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--input.*{name[-4:]}"):
        ids(tmp_path / name)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture
def darkness(monkeypatch, tiny_config):
    """A "network" whose lesion is what is dark, sigma .25 on the left half; counts what is compiled and the batches."""
    traced = []

    def look(params, image, *, network, passes):
        traced.append(image.shape)
        dark = 0.5 - image.astype(jnp.float32).mean(-1) / 255
        left = jnp.broadcast_to(jnp.arange(image.shape[2]) < image.shape[2] // 2, dark.shape)
        return {"logits": 20 * dark, "mean_logits": 22.5 * dark, "sigma": jnp.where(left, 0.25, 0.0)}

    fake = types.SimpleNamespace(settings=tiny_config(), params=None, network=None, batch=2, passes=2, temperature=1.5)
    monkeypatch.setattr(trained, "look", look)
    monkeypatch.setattr(
        trained, "Predictor",
        lambda workdir, network, flips, largest: types.SimpleNamespace(**vars(fake), largest=bool(largest)),
    )
    return traced


def run(files, output, **options):
    files = inputs.find([str(file) for file in files], ignore=output)
    return predict.predict("run", files, output, threads=2, **options)


def test_masks_lie_on_the_lesion_at_the_size_of_the_image(tmp_path, darkness):
    shapes = {"wide": (160, 96), "tall": (64, 200), "large": (640, 480)}
    for name, (w, h) in shapes.items():
        draw(tmp_path / "in" / f"{name}.png", (w, h), (w // 2, h // 4, w // 8 * 7, h // 4 * 3))
    draw(tmp_path / "in" / "edge.png", (64, 64), (40, 20, 64, 50))
    draw(tmp_path / "in" / "none.png", (64, 64))
    assert run([tmp_path / "in"], tmp_path / "out") == {}
    assert len(darkness) == 1 and darkness[0] == (2, 32, 32, 3)  # one compilation, though 5 images are no whole batches

    for name, (w, h) in shapes.items():
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png"))
        assert mask.shape == (h, w) and set(np.unique(mask)) == {0, 255}
        truth = np.zeros((h, w), bool)
        truth[h // 4 : h // 4 * 3, w // 2 : w // 8 * 7] = True
        assert 2 * (truth & (mask > 0)).sum() / (truth.sum() + (mask > 0).sum()) > 0.93, name
        sigma = np.asarray(Image.open(tmp_path / "out" / f"{name}_sigma.png"))
        assert sigma.shape == (h, w) and (sigma[:, : w // 3] == 128).all() and (sigma[:, -w // 3 :] == 0).all()
        overlay = np.asarray(Image.open(tmp_path / "out" / f"{name}_overlay.png")).astype(int)
        image = np.asarray(Image.open(tmp_path / "in" / f"{name}.png")).astype(int)
        assert overlay.shape == (h, w, 3)
        assert (overlay[h // 2, w - 2] == image[h // 2, w - 2]).all()  # untouched where all is sure
        assert (overlay == [255, 255, 0]).all(-1).any()
        assert overlay[1, 1, 0] > overlay[1, 1, 1] + 60  # red where the passes disagree

    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "out" / "predictions.csv").open())}
    assert list(rows) == ["edge", "large", "none", "tall", "wide"] and tuple(rows["edge"]) == predict.COLUMNS
    assert float(rows["large"]["area_share"]) == pytest.approx(3 / 16, abs=0.01) and float(rows["none"]["area_share"]) == 0
    assert float(rows["large"]["doubt"]) == pytest.approx(0.125 * 16 / 3, rel=0.05) and float(rows["none"]["doubt"]) > 1_000
    assert [rows[i]["border_touched"] for i in ("edge", "large", "none")] == ["1", "0", "0"]
    assert float(rows["wide"]["mean_sigma"]) == pytest.approx(0.125, abs=1e-6) and float(rows["wide"]["seconds"]) > 0
    assert len(list((tmp_path / "out").iterdir())) == 3 * 5 + 1  # and nothing unfinished


def test_probabilities_are_written_when_asked_for(tmp_path, darkness):
    """Of the mean of the passes after the temperature, as evaluation measures what it calls calibrated."""
    draw(tmp_path / "in.png", (64, 48), (32, 0, 64, 48))
    run([tmp_path / "in.png"], tmp_path / "out", probability=True)
    found, mask = (np.asarray(Image.open(tmp_path / "out" / f"in_{name}.png")) for name in ("probability", "mask"))
    np.testing.assert_array_equal(found >= 128, mask > 0)
    logit = 22.5 / 1.5 * (0.5 - np.mean([60, 40, 30]) / 255)  # of the dark side
    assert found.shape == (48, 64) and found[24, 60] == round(255 / (1 + np.exp(-logit))) and found[24, 4] < 10


def test_the_largest_part_is_kept_when_asked_for(tmp_path, darkness):
    path = draw(tmp_path / "in.png", (64, 64), (8, 8, 40, 40))
    image = Image.open(path)
    image.paste((60, 40, 30), (54, 54, 62, 62))
    image.save(path)
    for name, options in (("all", {}), ("one", {"largest": True})):
        run([path], tmp_path / name, **options)
    both, one = (np.asarray(Image.open(tmp_path / name / "in_mask.png")) for name in ("all", "one"))
    assert both[58, 58] == 255 and one[58, 58] == 0
    np.testing.assert_array_equal(both[:48, :48], one[:48, :48])
    shares = [float(next(csv.DictReader((tmp_path / n / "predictions.csv").open()))["area_share"]) for n in ("all", "one")]
    assert shares[0] > shares[1] == pytest.approx((one > 0).mean(), abs=1e-5)


def test_a_bad_file_is_left_out_and_named(tmp_path, darkness):
    """At the start, in the middle and at the end of batches; the others do not shift."""
    for i in range(6):
        draw(tmp_path / "in" / f"{i}.png", (64, 64), (8 * i, 8, 8 * i + 16, 40))
    whole = (tmp_path / "in" / "1.png").read_bytes()
    for name, data in (("0", b"no image"), ("3", whole[:60]), ("5", b"")):
        (tmp_path / "in" / f"{name}.png").write_bytes(data)
    failed = run([tmp_path / "in"], tmp_path / "out")
    assert list(failed) == ["0", "3", "5"] and all(f"{i}.png" in why for i, why in failed.items())
    assert [line.split("\t")[0][-5:] for line in (tmp_path / "out" / "failed.txt").open()] == ["0.png", "3.png", "5.png"]
    for i in (1, 2, 4):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{i}_mask.png"))
        assert mask[24, 8 * i + 8] == 255 and mask[:, : 8 * i - 4].sum() == 0
    assert not list((tmp_path / "out").glob("[035]_*"))
    for i in (0, 3, 5):
        (tmp_path / "in" / f"{i}.png").unlink()
    assert run([tmp_path / "in"], tmp_path / "out") == {} and not (tmp_path / "out" / "failed.txt").exists()


def test_few_items_are_under_way_at_once(tmp_path, darkness, monkeypatch):
    """What bounds the memory: items that were read and not yet written."""
    alive, most, read, write = 0, 0, predict.read_item, predict.write_item

    def reading(*args, **kwargs):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return read(*args, **kwargs)

    def writing(*args, **kwargs):
        nonlocal alive
        row = write(*args, **kwargs)
        alive -= 1
        return row

    monkeypatch.setattr(predict, "read_item", reading)
    monkeypatch.setattr(predict, "write_item", writing)
    for i in range(60):
        draw(tmp_path / "in" / f"{i}.png", (8, 8))
    run([tmp_path / "in"], tmp_path / "out")
    assert most <= 12, most  # a few batches of 2


def test_orientation_tags_turn_nothing(tmp_path, darkness):
    """Masks must lie on the pixels that are stored: those of training carry no tag."""
    image = Image.new("RGB", (64, 32), (220, 200, 190))
    image.paste((60, 40, 30), (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    run([tmp_path / "turned.jpg"], tmp_path / "out")
    mask = np.asarray(Image.open(tmp_path / "out" / "turned_mask.png"))
    assert mask.shape == (32, 64) and mask[:, :12].all() and not mask[:, 24:].any()


# --- the network ------------------------------------------------------------------------------------------------------


def test_what_an_image_gets_is_eval_step_and_the_passes_whatever_the_batch(networks, tiny_data):
    functions, params = networks
    network, image = functions["student"], tiny_data["image"][:3]
    look = jax.jit(lambda image: trained.look(params["student"], image, network=network, passes=2))
    found, logits = look(image), jax.jit(lambda image: steps.eval_step(params["student"], image, network=network))(image)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    assert found["sigma"].shape == (3, 32, 32) and (found["sigma"] > 0).mean() > 0.5
    for name, values in look(image[::-1]).items():
        np.testing.assert_allclose(values[::-1], found[name], atol=1e-4)
    assert np.abs(jax.nn.sigmoid(found["mean_logits"]) - jax.nn.sigmoid(logits)).max() > 1e-4  # dropout is on


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(smoke_run, tmp_path):
    """In a process of its own: 20 images, PH2's where they are, one of them twice bad; the list comes on standard input."""
    if PH2.is_dir():
        files = list(PH2.rglob("*.bmp"))
        assert len(files) > 20  # outlines among them
    else:
        files = [draw(tmp_path / "in" / f"{i}.bmp", (76, 56), (20, 20, 40, 40)) for i in range(20)]

    def call(lines):
        command = [sys.executable, "-m", "mira_u_jax.predict", f"--workdir={smoke_run}", "--input=-"]
        command.append(f"--output={tmp_path / 'out'}")
        text = "\n".join(map(str, lines))
        return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, env=QUICK)

    done = call(files)
    assert done.returncode == 0, done.stderr
    assert "20 masks" in done.stdout and not done.stderr
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 20
    (tmp_path / "bad.jpg").write_bytes(b"no")
    done = call([*files, tmp_path / "bad.jpg", tmp_path / "gone.jpg"])
    assert done.returncode == 2 and "20 masks" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 2 of 22 files") and "bad.jpg" in line and "gone.jpg" in line
