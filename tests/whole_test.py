"""A file is whole or what it was before."""

import os

import pytest

from mira_u_jax import whole


def test_what_is_cut_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "figures.json"
    whole.write(path, "first")
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["figures.json"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        whole.write(path, b"second")
    assert path.read_text() == "first"
    monkeypatch.undo()
    whole.write(path, b"second")
    assert path.read_bytes() == b"second" and len(list(path.parent.iterdir())) == 1
