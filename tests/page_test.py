"""What is kept of the worst cases, the page made of runs, and the events for TensorBoard."""

import html.parser
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from mira_u_jax import page, worst
from mira_u_jax.errors import UserError
from mira_u_jax.events import Events

ROOT = pathlib.Path(__file__).parent.parent


def make_run(folder, *, name="one", dice=0.9, cases=True):
    """A run folder as main leaves it, without its checkpoints."""
    run = folder / name
    (run / "figures").mkdir(parents=True)
    config = {"method": "mira_u", "frac": 0.1, "seed": 0, "label_seed": 1, "preset": "<cpu>", "size": 64, "split": "dev"}
    (run / "config.json").write_text(json.dumps({"config": config}))
    (run / "evaluation.json").write_text(json.dumps(
        {"dataset": "isic2016", "images": 6, "missed": 0, "dice": dice, "iou": 0.8, "ci95": {"dice": [0.85, 0.95]}}
    ))
    rows = [{"step": 1, "split": "pretrain", "loss": 1.0}]
    rows += [{"step": s, "split": "train", "loss_sup": 1 / s, "sigma": 0.01 * s, "keep": 0.5} for s in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (60, 40), (9, 9, 200)).save(run / "figures" / "train_000006.png")
    if cases:
        rng = np.random.default_rng(0)
        maps = {
            "image": rng.integers(0, 255, (3, 32, 32, 3), np.uint8), "truth": np.ones((3, 32, 32)),
            "prediction": np.zeros((3, 32, 32)), "sigma": np.full((3, 32, 32), 0.15),
        }
        ids = ["a", "b & <b>", "c", "d", "e", "f"]
        scores = {"dice": np.array([0.5, 0.1, 0.3, 0.9, 0.8, 0.7]), "hd95": np.arange(6.0), "sigma": np.full(6, 0.15)}
        worst.write(run / "cases" / "isic2016_dev_student", ids, scores, [1, 2, 0], maps)
    return run


class Tags(html.parser.HTMLParser):
    """All tags with their attributes; void ones need no end, all others must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def test_worst_cases_are_kept_with_their_maps(tmp_path):
    folder = make_run(tmp_path) / "cases" / "isic2016_dev_student"
    kept = json.loads((folder / "cases.json").read_text())
    assert kept["parts"] == ["image", "truth", "prediction", "sigma"] and len(kept["cases"]) == 6
    assert [(r["id"], r.get("picture"), r["sigma"]) for r in kept["cases"][:4]] == [
        ("a", "02.jpg", 0.15), ("b & <b>", "00.jpg", 0.15), ("c", "01.jpg", 0.15), ("d", None, 0.15)
    ]
    picture = np.asarray(Image.open(folder / "00.jpg")).astype(int)
    assert picture.shape == (160, 640, 3)
    grey = [picture[20:-20, t * 160 + 20 : t * 160 + 140].mean() for t in (1, 2, 3)]
    assert np.allclose(grey, [255, 0, 127], atol=4)  # truth, prediction, sigma .15 of .3


def test_the_page_holds_everything_and_fetches_nothing(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, name="two", dice=0.7, cases=False)]
    text = page.write(runs, tmp_path / "out" / "page.html").read_text()
    tags = Tags(text).tags
    links = [value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in text and "@import" not in text and "url(" not in text
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 2 + 3 and all(attrs["alt"] for attrs in images)
    assert text.count("<polyline") == 2 * 3  # loss_sup, sigma, keep; masked image modelling is another stage
    assert "&lt;cpu&gt;" in text and "<cpu>" not in text and "b &amp; &lt;b&gt;" in text and "& <b>" not in text
    assert 'data-value="0.9"' in text and "[0.85, 0.95]" in text
    cards = [attrs for tag, attrs in tags if tag == "figure" and "data-dice" in attrs]
    assert [card["data-dice"] for card in cards] == ["0.1", "0.3", "0.5"] and cards[0]["data-hd95"] == "1.0"
    assert [attrs["data-key"] for tag, attrs in tags if "data-key" in attrs] == ["id", "dice", "hd95", "sigma"]


def test_a_run_that_lacks_things_and_none(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError, match="bare.*config.json"):
        page.write([bare], tmp_path / "page.html")
    (bare / "config.json").write_text('{"config": {"method": "supervised"}}')
    Tags(page.write([bare], tmp_path / "page.html").read_text())
    with pytest.raises(UserError, match="no runs"):
        page.write([], tmp_path / "page.html")


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder):
    """The events of the files in a folder, by their framing: length, its check sum, data, their check sum."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16


def test_events_hold_curves_and_pictures(tmp_path):
    Image.new("RGB", (30, 20), (0, 200, 0)).save(tmp_path / "p.png")
    written = Events(tmp_path, "train", step=4)
    written.scalars(5, "train", {"loss": 0.25, "sigma": 0.1})
    written.scalars(5, "validation", {"validation_dice": 0.5})
    written.picture(6, "train", tmp_path / "p.png")
    found = list(events(tmp_path / "events" / "train"))
    values = [(e.step, v) for e in found for v in e.summary.value]
    assert [(s, v.tag, round(v.simple_value, 4)) for s, v in values if v.HasField("simple_value")] == [
        (5, "train/loss", 0.25), (5, "train/sigma", 0.1), (5, "validation/validation_dice", 0.5)
    ]
    ((step, image),) = [(s, v.image) for s, v in values if v.HasField("image")]
    assert step == 6 and (image.width, image.height) == (30, 20) and image.encoded_image_string[:4] == b"\x89PNG"
    assert any(e.session_log.status == event_pb2.SessionLog.START and e.step == 5 for e in found)  # forget from step 5 on


def test_events_need_no_tensorflow(tmp_path):
    code = "import sys; sys.modules['tensorflow'] = None; from mira_u_jax.events import Events"
    code += "; Events(sys.argv[1], 'train', step=0)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
