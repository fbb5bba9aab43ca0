"""The benchmark for accelerators at its toy size, on a CPU."""

import json
import math

import pytest

pytest.importorskip("torch")

from benchmarks import accelerator, bench  # noqa: E402
from benchmarks.remote import RemoteError  # noqa: E402

# name -> fields that are finite and positive
STEP = ("seconds", "images_per_s", "mfu", "flops", "bytes", "bytes_share", "memory", "temporary_bytes")
PROMISED = {
    "compile_cold": ("seconds", "trace_s", "compile_s", "first_step_s"), "machine": ("peak", "bytes_per_s", "devices"),
    "step, bfloat16": STEP, "trace": (), "compile_warm": ("seconds",),
    "step_ours": ("seconds", "images_per_s"), "step_pytorch_eager": ("seconds", "images_per_s"),
    "vs_pytorch_eager": ("ratio", "low", "high"), "vs_pytorch": ("ratio", "low", "high"),
    **{f"part: {name}": ("seconds",) for name in bench.PARTS}, "step, float32": STEP,
    "replicates, R = 2": ("seconds", "images_per_s"), "batch 4": STEP,
}


@pytest.mark.slow
def test_every_promised_row_is_there(tmp_path, capsys):
    file, trace = tmp_path / "rows.json", tmp_path / "trace"
    assert accelerator.main(["--toy", "--minutes=20", f"--json={file}", f"--trace={trace}"]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(rows) == list(PROMISED), [(row["name"], row["note"]) for row in rows.values() if row["name"] not in PROMISED]
    for name, fields in PROMISED.items():
        for field in fields:
            assert math.isfinite(rows[name][field]) and rows[name][field] > 0, (name, field)
    assert rows["machine"]["peak_is"] == "a measured bfloat16 product"
    assert rows["step, bfloat16"]["images_per_s"] == pytest.approx(4 / rows["step, bfloat16"]["seconds"])
    assert any(path.is_file() for path in trace.rglob("*"))
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)


@pytest.fixture
def script(tmp_path):
    def make(minutes):
        args = type("Args", (), {"minutes": minutes, "toy": True, "trace": None})
        return accelerator.Script(bench.Table(None), args, str(tmp_path))

    return make


@pytest.mark.parametrize(
    ("text", "result"),
    [("jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying", "out of memory"),
     ("torch.OutOfMemoryError: CUDA out of memory", "out of memory"), ("ValueError: no", "failed")],
)
def test_what_fails_is_a_row(script, text, result):
    def body():
        raise RemoteError(f"Traceback\n{text}")

    one = script(8)
    assert one.row("batch 64", body) is None
    assert one.table.rows == [{"name": "batch 64", "result": result, "note": text}]


def test_what_there_is_no_time_for_is_a_row(script):
    one = script(0)
    assert one.row("batch 64", lambda: pytest.fail("begun")) is None
    assert one.table.rows[0]["result"] == "skipped"


@pytest.mark.slow
def test_operations_are_counted_where_the_device_does_not_say(script):
    """By a process on a CPU, without compiling; for each image pair, so that other batches scale."""
    one = script(20)
    one.count(one.setting("bfloat16"))
    (row,) = one.table.rows
    assert row["name"] == "operations" and row["flops"] > 1e8 and one.flops == row["flops"] / accelerator.TOY["batch"]


@pytest.mark.parametrize(("rates", "tried"), [((100, 190, 195), [32, 64, 128]), ((104,), [32]), ((150, None), [32, 64])])
def test_batches_double_until_nothing_is_gained(script, monkeypatch, rates, tried):
    one, asked, left = script(8), [], list(rates)
    one.toy = False
    monkeypatch.setattr(one, "row", lambda name, body: asked.append(int(name.split()[1])) or left.pop(0))
    one.batches(100.0 if len(rates) == 1 else 50.0)
    assert asked == tried


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v4", 275e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v5e", 197e12),
     ("TPU v6 lite", 918e12), ("TPU v6e", 918e12), ("cpu", None)],
)
def test_the_peak_of_a_device_by_its_name(kind, peak):
    assert accelerator.peak_of(kind) == peak
