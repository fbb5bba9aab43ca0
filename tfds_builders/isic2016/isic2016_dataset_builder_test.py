"""Tests of the ISIC-2016 builder, of what the builders share, and of the command line, on tiny drawn data."""

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tfds_builders import build
from tfds_builders.common import DataError, binary_mask, is_dev, label_rank, squash, squash_mask
from tfds_builders.isic2016 import isic2016_dataset_builder as isic2016

ROOT = Path(__file__).resolve().parents[2]
TRAIN = isic2016.official_ids("train")[:900:180]  # 5 ids
TEST = isic2016.official_ids("test")[:379:150]  # 3 ids
SHAPES = {i: (150 + 7 * n, 201 + 9 * n) for n, i in enumerate(TRAIN + TEST)}


def draw(i: str) -> tuple[bytes, bytes]:
    """JPEG and mask PNG of one id: a dark ellipse on noisy skin."""
    h, w = SHAPES[i]
    y, x = np.mgrid[:h, :w]
    inside = ((y - h / 2) / (h / 3)) ** 2 + ((x - w / 2) / (w / 4)) ** 2 < 1
    rng = np.random.default_rng(int(i[-7:]))
    skin = rng.integers(150, 200, (h, w, 1)) + np.array([30, 0, -20])
    return encode(np.where(inside[..., None], 60, skin), "JPEG"), encode(inside * 255, "PNG")


def encode(pixels: np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=format, **options)
    return buffer.getvalue()


def files() -> dict[str, dict[str, bytes]]:
    """Official name -> {file name: bytes}."""
    out = {}
    for split, ids in (("train", TRAIN), ("test", TEST)):
        images, masks = isic2016.ZIPS[split]
        out[images] = {f"{i}.jpg": draw(i)[0] for i in ids}
        out[masks] = {f"{i}_Segmentation.png": draw(i)[1] for i in ids}
    return out


def write(folder: Path, content: dict[str, dict[str, bytes]], zipped: bool = True) -> Path:
    folder.mkdir(parents=True)
    for name, members in content.items():
        if zipped:
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as z:
                for member, data in members.items():
                    z.writestr(f"{name}/{member}", data)
                z.writestr(f"__MACOSX/{name}/._{next(iter(members), 'x')}", b"junk")
        else:
            (folder / name).mkdir()
            (folder / name / ".DS_Store").write_bytes(b"junk")
            for member, data in members.items():
                (folder / name / member).write_bytes(data)
    return folder


def examples(builder: tfds.core.DatasetBuilder) -> dict[str, list[dict]]:
    return {split: list(builder.as_data_source(split=split)) for split in builder.info.splits}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for split in a:
        assert len(a[split]) == len(b[split])
        for x, y in zip(a[split], b[split], strict=True):
            assert x.keys() == y.keys()
            for key in x:
                np.testing.assert_array_equal(x[key], y[key])


@pytest.fixture(scope="module")
def zips(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("isic") / "zips", files())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, zips) -> Path:
    """A data_dir with `original` and `128px` built."""
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("original", "128px"):
        build.prepare("isic2016", config=config, data_dir=folder, manual_dir=zips)
    return folder


# --- Label order ----------------------------------------------------------------------------------------------------


def test_label_rank_is_the_documented_hash():
    ids = isic2016.official_ids("train")
    ranks = label_rank(ids, "isic2016")
    for seed in range(8):
        pairs = sorted((hashlib.sha256(b"isic2016/v1/%d/%s" % (seed, i.encode())).hexdigest(), i) for i in ids)
        assert [i for _, i in pairs] == sorted(ids, key=lambda i: ranks[i][seed])  # noqa: B023
        assert sorted(ranks[i][seed] for i in ids) == list(range(900))
    assert not np.array_equal([ranks[i][0] for i in ids], [ranks[i][1] for i in ids])
    # Frozen: a published split must never move.
    assert ranks["ISIC_0000000"].tolist() == [634, 346, 268, 458, 184, 96, 314, 194]


def test_fractions_are_nested_and_dev_is_a_fifth():
    ids = isic2016.official_ids("train")
    ranks = label_rank(ids, "isic2016")
    labelled = [{i for i in ids if ranks[i][3] < int(900 * f + 0.5)} for f in (0.1, 0.25, 0.5, 1)]
    assert [len(s) for s in labelled] == [90, 225, 450, 900]
    assert all(a < b for a, b in zip(labelled, labelled[1:], strict=False))
    dev = {i for i in ids if hashlib.sha256(f"isic2016/dev/{i}".encode()).digest()[0] < 51}
    assert dev == {i for i in ids if is_dev("isic2016", i)}
    assert 0.15 < len(dev) / 900 < 0.25


def test_official_lists():
    train, test = isic2016.official_ids("train"), isic2016.official_ids("test")
    assert (len(set(train)), len(set(test)), set(train) & set(test)) == (900, 379, set())


# --- Built data -----------------------------------------------------------------------------------------------------


def test_original_keeps_the_bytes(data_dir):
    builder = tfds.builder_from_directory(data_dir / "isic2016" / "original" / "1.0.0")  # TFDS alone, not our class
    assert set(builder.info.splits) == {"train", "test"}
    assert builder.info.metadata["official"] == {"train": 900, "test": 379}
    assert len(builder.info.metadata["sources_sha256"]) == 64
    ranks = label_rank(isic2016.official_ids("train"), "isic2016")
    skip = {"image": tfds.decode.SkipDecoding()}
    for split, ids in (("train", TRAIN), ("test", TEST)):
        source = builder.as_data_source(split=split)
        raw = builder.as_data_source(split=split, decoders=skip)
        assert [e["id"].decode() for e in source] == sorted(ids)
        for e, r, i in zip(source, raw, sorted(ids), strict=True):
            jpeg, mask = draw(i)
            assert r["image"] == jpeg
            np.testing.assert_array_equal(e["image"], np.asarray(Image.open(io.BytesIO(jpeg))))
            np.testing.assert_array_equal(e["mask"][..., 0], np.asarray(Image.open(io.BytesIO(mask))))
            assert e["label_rank"].dtype == np.int32
            assert e["label_rank"].tolist() == (ranks[i].tolist() if split == "train" else [-1] * 8)
            assert bool(e["dev"]) == (split == "train" and is_dev("isic2016", i))


def test_128px_shrinks_images_and_training_masks_only(data_dir):
    source = tfds.data_source("isic2016/128px", data_dir=data_dir)
    for split, ids in (("train", TRAIN), ("test", TEST)):
        for e, i in zip(source[split], sorted(ids), strict=True):
            jpeg, mask = (np.asarray(Image.open(io.BytesIO(b))) for b in draw(i))
            np.testing.assert_array_equal(e["image"], squash(jpeg, 128))
            assert e["mask"].shape == ((128, 128, 1) if split == "train" else (*SHAPES[i], 1))
            np.testing.assert_array_equal(e["mask"][..., 0], squash_mask(mask, 128) if split == "train" else mask)
            assert set(np.unique(e["mask"])) == {0, 255}
            assert abs(np.mean(e["mask"] > 0) - np.mean(mask > 0)) < 0.01


def test_unpacked_folders_give_the_same(data_dir, tmp_path):
    folders = write(tmp_path / "folders", files(), zipped=False)
    builder = build.prepare("isic2016", config="original", data_dir=tmp_path / "data", manual_dir=folders)
    zipped = build.prepare("isic2016", config="original", data_dir=data_dir)
    assert_same(examples(builder), examples(zipped))
    assert builder.info.metadata["sources_sha256"] == zipped.info.metadata["sources_sha256"]
    build.prepare("isic2016", config="original", data_dir=data_dir, manual_dir=folders)  # so this is the same source


def test_mask_values():
    for values, expected in (([0, 1], [0, 255]), ([0, 255], [0, 255]), ([3, 127, 128, 250], [0, 0, 255, 255])):
        out = binary_mask(Image.fromarray(np.array([values], np.uint8)))
        assert out.dtype == np.uint8
        assert out.tolist() == [expected]
    assert binary_mask(Image.fromarray(np.array([[True, False]]))).tolist() == [[255, 0]]
    assert binary_mask(Image.fromarray(np.zeros((1, 2), np.uint8))).tolist() == [[0, 0]]


def test_squash_is_the_area_mean():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    mean = pixels.reshape(2, 12, 2, 8, 3).mean(axis=(1, 3))  # 24x16 -> 2x2: blocks of 12x8
    assert np.abs(squash(pixels, 2) - mean).max() <= 0.5
    assert squash(pixels, 32).shape == (32, 32, 3)
    mask = np.array([[0, 255, 0, 0], [255, 0, 0, 255]], np.uint8)  # halves and quarters
    assert squash_mask(np.repeat(mask, 2, axis=0), 2).tolist() == [[255, 0], [255, 255]]
    assert squash_mask(mask.reshape(2, 4)[:, 2:].repeat(2, 0).repeat(2, 1), 2).tolist() == [[0, 0], [0, 255]]


def test_exif_orientation_is_left_alone(tmp_path):
    content = files()
    exif = Image.Exif()
    exif[274] = 6  # "turn me"
    content[isic2016.ZIPS["train"][0]][f"{TRAIN[0]}.jpg"] = encode(np.zeros((*SHAPES[TRAIN[0]], 3)), "JPEG", exif=exif)
    builder = build.prepare("isic2016", config="original", data_dir=tmp_path, manual_dir=write(tmp_path / "m", content))
    first = builder.as_data_source(split="train")[0]
    assert first["image"].shape[:2] == first["mask"].shape[:2] == SHAPES[TRAIN[0]]


# --- What a caller gets wrong ---------------------------------------------------------------------------------------


def damage(content: dict, what: str) -> str:
    """Breaks `content` in place; returns what the error must name."""
    images, masks = isic2016.ZIPS["train"]
    first, mask = f"{TRAIN[1]}.jpg", f"{TRAIN[1]}_Segmentation.png"
    if what == "missing zip":
        del content[masks]
        return f"{masks}.zip"
    if what == "truncated":
        content[images][first] = content[images][first][:700]
        return f"{images}/{first}"
    if what == "not an image":
        content[masks][mask] = b"<html>moved</html>"
        return f"{masks}/{mask}"
    if what == "size":
        content[masks][mask] = encode(np.zeros((20, 30)), "PNG")
        return f"{masks}/{mask} is 30x20"
    if what == "orphan mask":
        del content[images][first]
        return f"{masks}/{mask} has no image"
    if what == "orphan image":
        del content[masks][mask]
        return f"{images}/{first} has no mask"
    if what == "unknown id":
        content[images][f"{TEST[0]}.jpg"] = content[images][first]
        return f"{images}/{TEST[0]}.jpg"
    if what == "two of one id":
        content[images][f"again/{first}"] = content[images][first]
        return "remove one"
    content[images].clear()
    content[masks].clear()
    return "no images"


WRONG = ["missing zip", "truncated", "not an image", "size", "orphan mask", "orphan image", "unknown id"]
WRONG += ["two of one id", "empty"]


@pytest.mark.parametrize("what", WRONG)
def test_damaged_sources(what, tmp_path, capsys):
    content = files()
    named = damage(content, what)
    wrong = write(tmp_path / "wrong", content)
    args = ["isic2016", f"--data_dir={tmp_path / 'data'}", "--config=128px"]
    assert build.main([*args, f"--manual_dir={wrong}"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    # Nothing half-built is taken for whole: the same data_dir works as soon as the sources do.
    assert build.main([*args, f"--manual_dir={write(tmp_path / 'right', files())}"]) == 0
    out, err = capsys.readouterr()
    assert "5 of 900 train, 3 of 379 test" in out
    assert err == ""


def test_bad_zips(tmp_path):
    folder = write(tmp_path / "m", files())
    path = folder / f"{isic2016.NAMES[0]}.zip"
    whole = path.read_bytes()
    at = whole.index(b"\xff\xd8\xff") + 500  # inside the first JPEG: only the zip's CRC can tell
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(DataError, match=f"{TRAIN[0]}.jpg cannot be read"):
        build.prepare("isic2016", config="original", data_dir=tmp_path / "d", manual_dir=folder)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{path.name} is not a readable zip"):
        build.prepare("isic2016", config="original", data_dir=tmp_path / "d", manual_dir=folder)


def test_other_sources_are_refused(data_dir, zips, tmp_path):
    content = files()
    image, mask = isic2016.ZIPS["test"]
    del content[image][f"{TEST[-1]}.jpg"], content[mask][f"{TEST[-1]}_Segmentation.png"]
    other = write(tmp_path / "other", content)
    with pytest.raises(DataError, match="another --data_dir, or remove") as e:
        build.prepare("isic2016", config="128px", data_dir=data_dir, manual_dir=other)
    assert str(data_dir) in str(e.value)
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*.array_record*")}
    build.prepare("isic2016", config="128px", data_dir=data_dir, manual_dir=zips)
    build.prepare("isic2016", config="128px", data_dir=data_dir)
    assert before == {p: p.stat().st_mtime_ns for p in data_dir.rglob("*.array_record*")}


def test_download_is_tried_when_nothing_is_local(zips, tmp_path, monkeypatch):
    asked = []

    def download(self, urls):
        asked.append(urls)
        return {name: zips / f"{name}.zip" for name in urls}

    monkeypatch.setattr(isic2016.urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    builder = build.prepare("isic2016", config="128px", data_dir=tmp_path)
    assert builder.info.splits["train"].num_examples == len(TRAIN)
    assert asked == [{n: f"https://isic-challenge-data.s3.amazonaws.com/2016/{n}.zip" for n in isic2016.NAMES}]


def test_failed_download_is_one_line_with_both_remedies(tmp_path, monkeypatch, capsys):
    def download(self, urls):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(isic2016.urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    assert build.main(["isic2016", f"--data_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "downloads" / "manual") in err
    assert "isic-challenge-data.s3.amazonaws.com" in err
    assert all(f"{name}.zip" in err for name in isic2016.NAMES)


# --- The command line -----------------------------------------------------------------------------------------------


def test_command_line_process(tmp_path):
    run = [sys.executable, "-m", "tfds_builders.build", "isic2016", f"--data_dir={tmp_path}"]
    wrong = subprocess.run([*run, f"--manual_dir={tmp_path}/none"], cwd=ROOT, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith(f"error: manual_dir {tmp_path}/none")
    debug = subprocess.run([*run, f"--manual_dir={tmp_path}/none", "--debug"], cwd=ROOT, capture_output=True)
    assert b"Traceback" in debug.stderr


@pytest.mark.parametrize("args", [["isic2017"], ["isic2016", "--config=64px"], ["isic2016", "--what"], []])
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as e:
        build.main(args)
    assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_broke_is_one_line_and_status_1(zips, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(isic2016, "encode_pair", broken)
    assert build.main(["isic2016", f"--data_dir={tmp_path}", f"--manual_dir={zips}"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: the disk is full\n"


def test_wrong_names_and_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for kwargs in ({"config": "64px"}, {"config": "128px", "data_dir": tmp_path / "file"}):
        with pytest.raises(DataError):
            build.prepare("isic2016", **kwargs)
    with pytest.raises(DataError, match="one of isic2016, ph2, synthetic_lesions"):
        build.prepare("isic2018", config="128px")
    (tmp_path / "isic2016" / "128px" / "1.0.0").mkdir(parents=True)
    with pytest.raises(DataError, match="no complete data set"):
        build.prepare("isic2016", config="128px", data_dir=tmp_path)


def test_all_configs_and_an_incomplete_copy_is_announced(zips, tmp_path, capsys):
    assert build.main(["isic2016", f"--data_dir={tmp_path}", f"--manual_dir={zips}", "--config=all"]) == 0
    assert capsys.readouterr().out.count("5 of 900 train") == 3
    builder = isic2016.Builder(data_dir=tmp_path / "plain", config="128px")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=zips))
    assert "isic2016: 5 of 900 training images\nisic2016: 3 of 379 test images\n" in capsys.readouterr().out


def test_two_processes_at_once(zips, tmp_path):
    run = [sys.executable, "-m", "tfds_builders.build", "isic2016", f"--data_dir={tmp_path}", f"--manual_dir={zips}"]
    both = [subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in both] == [(b"", 0)] * 2
    info = json.loads(next(tmp_path.rglob("dataset_info.json")).read_text())
    assert [s["shardLengths"] for s in info["splits"]] == [["5"], ["3"]]


def test_overwriting_is_allowed_and_litter_of_a_killed_build_goes(zips, tmp_path):
    build.prepare("isic2016", config="128px", data_dir=tmp_path, manual_dir=zips)
    content = files()
    i = TRAIN[0]
    content[isic2016.ZIPS["train"][0]][f"{i}.jpg"] = encode(np.full((*SHAPES[i], 3), 9), "JPEG")
    other = write(tmp_path / "other", content)
    litter = tmp_path / "isic2016" / "128px" / "incomplete.ABC123_1.0.0"
    litter.mkdir()
    builder = isic2016.Builder(data_dir=tmp_path, config="128px")
    before = builder.info.metadata["sources_sha256"]
    mode = tfds.GenerateMode.REUSE_CACHE_IF_EXISTS
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=other, download_mode=mode))
    assert not litter.exists()
    again = build.prepare("isic2016", config="128px", data_dir=tmp_path, manual_dir=other)
    assert again.info.metadata["sources_sha256"] != before
    assert again.as_data_source(split="train")[0]["image"].max() == 9


@pytest.mark.slow
def test_the_real_copy(tmp_path):
    real = ROOT.parent / "shared" / "data" / "isic2016_256px"
    if not real.is_dir():
        pytest.skip("the real copy is not on this machine")
    builder = build.prepare("isic2016", config="128px", data_dir=tmp_path, manual_dir=real)
    train = builder.as_data_source(split="train")
    assert (len(train), builder.info.splits["test"].num_examples) == (783, 321)
    assert sum(e["label_rank"][0] < 90 for e in train) <= 90
    assert {e["image"].shape for e in train} == {(128, 128, 3)}
