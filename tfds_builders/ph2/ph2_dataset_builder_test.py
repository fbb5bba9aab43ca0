"""Tests of the PH2 builder on tiny drawn data."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tfds_builders import build
from tfds_builders.common import DataError, squash
from tfds_builders.ph2 import ph2_dataset_builder as ph2

IDS = ["IMD002", "IMD003", "IMD019", "IMD020", "IMD427"]


def draw(i: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 image (h, w, 3) and bool mask (h, w)."""
    n = int(i[3:]) % 17
    h, w = 140 + n, 190 + n
    image = np.random.default_rng(n).integers(0, 255, (h, w, 3), dtype=np.uint8)
    return image, np.mgrid[:h, :w].sum(0) < h


def write(root: Path) -> Path:
    """The official layout in root/PH2Dataset, with files that are not for us; returns root."""
    for i in IDS:
        folder = root / "PH2Dataset" / "PH2 Dataset images" / i
        for part in ("Dermoscopic_Image", "lesion", "roi"):
            (folder / f"{i}_{part}").mkdir(parents=True)
        image, mask = draw(i)
        Image.fromarray(image).save(folder / f"{i}_Dermoscopic_Image" / f"{i}.bmp")
        # The real masks are 1 bit deep, some 24.
        deep = Image.fromarray(mask) if i != IDS[0] else Image.fromarray(mask).convert("RGB")
        deep.save(folder / f"{i}_lesion" / f"{i}_lesion.bmp")
        Image.fromarray(mask).save(folder / f"{i}_roi" / f"{i}_R1_Label3.bmp")
    (root / "PH2Dataset" / "PH2_dataset.txt").write_text("a table")
    return root


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("ph2"))


def file_of(manual_dir: Path, i: str, part: str) -> Path:
    return next((manual_dir / "PH2Dataset" / "PH2 Dataset images" / i / f"{i}_{part}").iterdir())


@pytest.mark.parametrize("config", ["original", "128px"])
def test_builds(config, manual_dir, tmp_path):
    build.prepare("ph2", config=config, data_dir=tmp_path, manual_dir=manual_dir)
    builder = tfds.builder_from_directory(tmp_path / "ph2" / config / "1.0.0")
    assert builder.info.metadata["official"] == {"test": 200}
    assert list(builder.info.splits) == ["test"]
    source = builder.as_data_source(split="test")
    assert [e["id"].decode() for e in source] == IDS
    orders = [sorted(IDS, key=lambda i: hashlib.sha256(f"ph2/v1/{s}/{i}".encode()).hexdigest()) for s in range(8)]  # noqa: B023
    for e, i in zip(source, IDS, strict=True):
        image, mask = draw(i)
        np.testing.assert_array_equal(e["image"], squash(image, 128) if config == "128px" else image)
        np.testing.assert_array_equal(e["mask"][..., 0], mask * 255)  # at its own size in every config
        assert e["label_rank"].tolist() == [order.index(i) for order in orders]
        assert e["label_rank"].dtype == np.int32
        assert e["fold"] == int.from_bytes(hashlib.sha256(b"ph2/fold/" + i.encode()).digest(), "big") % 5


def test_folds_are_even_enough():
    counts = np.bincount([ph2.fold(f"IMD{n:03d}") for n in range(200)], minlength=5)
    assert counts.sum() == 200
    assert counts.min() > 20


def test_zip_folder_and_the_dataset_itself_are_one_source(manual_dir, tmp_path):
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "PH2Dataset.zip", "w") as z:
        for path in sorted(manual_dir.rglob("*.bmp")):
            z.write(path, path.relative_to(manual_dir))
    for manual in (manual_dir, tmp_path / "zip", manual_dir / "PH2Dataset"):  # one built, two accepted as the same
        builder = build.prepare("ph2", config="128px", data_dir=tmp_path / "data", manual_dir=manual)
    other = build.prepare("ph2", config="128px", data_dir=tmp_path / "other", manual_dir=tmp_path / "zip")
    for a, b in zip(builder.as_data_source(split="test"), other.as_data_source(split="test"), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_errors(tmp_path, capsys):
    def fails_with(*named: str) -> None:
        args = ["ph2", f"--data_dir={tmp_path / 'data'}", f"--manual_dir={tmp_path / 'm'}", "--config=original"]
        assert build.main(args) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert all(n in err for n in named), err

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "PH2Dataset.rar").write_bytes(b"Rar!")
    fails_with("www.fc.up.pt/addi", "unpack")
    write(tmp_path / "m")
    mask, image = file_of(tmp_path / "m", IDS[1], "lesion"), file_of(tmp_path / "m", IDS[2], "Dermoscopic_Image")
    whole_mask, whole_image = mask.read_bytes(), image.read_bytes()
    mask.unlink()
    fails_with(f"{IDS[1]}.bmp has no mask", "www.fc.up.pt/addi")
    Image.fromarray(np.zeros((10, 20), bool)).save(mask)
    fails_with(f"{IDS[1]}_lesion.bmp is 20x10")
    mask.write_bytes(whole_mask)
    image.write_bytes(whole_image[:5000])
    fails_with(f"{IDS[2]}.bmp cannot be decoded")
    image.write_bytes(whole_image)
    build.prepare("ph2", config="original", data_dir=tmp_path / "data", manual_dir=tmp_path / "m")
    Image.fromarray(255 - draw(IDS[2])[0]).save(image)
    fails_with("built from other sources")
    with pytest.raises(DataError, match="downloads/manual"):
        build.prepare("ph2", config="original", data_dir=tmp_path / "new")


@pytest.mark.slow
def test_the_real_sample(tmp_path):
    real = Path(__file__).resolve().parents[3] / "shared" / "data" / "ph2_sample"
    if not real.is_dir():
        pytest.skip("the real sample is not on this machine")
    builder = build.prepare("ph2", config="256px", data_dir=tmp_path, manual_dir=real)
    for e in builder.as_data_source(split="test"):
        assert e["image"].shape == (256, 256, 3)
        assert min(e["mask"].shape[:2]) > 500
        assert 0 < np.mean(e["mask"] > 0) < 1
