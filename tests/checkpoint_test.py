"""What a disk can do to a checkpoint, and what the run makes of it. Kills and full disks: kills.py, resume_test.py."""

import contextlib
import errno
import pathlib
import pickle
import resource

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mira_u_jax import checkpoint
from mira_u_jax.errors import UserError


def state_at(step):
    """A state of a few kinds of leaves that differ at every step."""
    values = jax.random.normal(jax.random.key(step), (64, 33))
    network = {"kernel": values, "bias": values[0], "half": values.astype(jnp.bfloat16)}
    return {"step": jnp.asarray(step), "ema": {"student": network}, "on": values > 0}


@pytest.fixture
def saved(tmp_path):
    """A workdir whose stage "train" holds steps 1, 2, 3, of which two stay."""
    with checkpoint.open_manager(tmp_path, "train") as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, state_at(step))
    assert steps_in(tmp_path) == [2, 3]
    return tmp_path


def steps_in(workdir):
    return sorted(int(p.name) for p in checkpoint.folder(workdir, "train").glob("*") if p.name.isdigit())


def restore(workdir):
    with checkpoint.open_manager(workdir, "train") as manager:
        return checkpoint.restore(manager, state_at(0))


def files(workdir, step):
    """The files of a checkpoint, largest first."""
    found = [p for p in (checkpoint.folder(workdir, "train") / str(step)).rglob("*") if p.is_file()]
    return sorted(found, key=lambda p: p.stat().st_size, reverse=True)


def is_step(state, step):
    chex.assert_trees_all_equal(state, state_at(step))


def test_the_newest_of_the_two_that_stay_is_restored_and_an_empty_folder_has_none(saved, tmp_path):
    is_step(restore(saved), 3)
    assert restore(tmp_path / "other") is None


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def removed(path):
    path.unlink()


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [truncated, removed, zeroed])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_with_a_line(saved, damage, capsys):
    damage(files(saved, 3)[0])
    is_step(restore(saved), 2)
    out = capsys.readouterr().out
    assert "train/3 is damaged" in out and out.count("\n") == 1
    assert steps_in(saved) == [2]  # so that step 3 can be saved again
    with checkpoint.open_manager(saved, "train") as manager:
        checkpoint.save(manager, 3, state_at(3))
    is_step(restore(saved), 3)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "no answer"), PermissionError(13, "no"), MemoryError(), ValueError("RESOURCE_EXHAUSTED: x")]
)
def test_what_the_machine_is_to_blame_for_costs_no_checkpoint(saved, monkeypatch, error):
    load = checkpoint.Manager.restore

    def restore_but(manager, step, args):
        if step == 3:
            raise error
        return load(manager, step, args=args)

    monkeypatch.setattr(checkpoint.Manager, "restore", restore_but)
    with pytest.raises(type(error)):
        restore(saved)
    monkeypatch.undo()
    is_step(restore(saved), 3)


def test_no_flipped_bit_reaches_a_run(saved):
    """One at a time, anywhere in any file of the newest checkpoint: what comes back is a state that was saved."""
    rng, went_back = np.random.default_rng(0), 0
    for path in files(saved, 3):
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 6) if whole else ():
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            with checkpoint.open_manager(saved, "train") as manager:
                step, state = checkpoint.newest_intact(manager, lambda step: restore_step(manager, step))
            is_step(state, step)
            went_back += step == 2
        path.write_bytes(whole)
    assert went_back > 5


def restore_step(manager, step):
    import orbax.checkpoint as ocp

    like = jax.tree.map(checkpoint.abstract, state_at(0))
    return manager.restore(step, args=ocp.args.StandardRestore(like))


def test_values_that_decode_but_are_others_are_found(saved, monkeypatch):
    """What no decoder can see: the bytes are a good checkpoint, only not of this step."""
    two, three = (checkpoint.folder(saved, "train") / step / "_CHECKPOINT_METADATA" for step in ("2", "3"))
    three.write_text(two.read_text())
    is_step(restore(saved), 2)


def test_what_one_process_cannot_read_all_pass_over_and_none_asks_the_others_alone(saved, monkeypatch, capsys):
    """Two processes of one run: this one reads all, the other fails at step 3. Checksums are a question to all, too."""
    asked = []

    def anywhere(wrong):
        asked.append("anywhere")
        return bool(wrong) or len(asked) == 1

    monkeypatch.setattr(checkpoint.cluster, "anywhere", anywhere)
    checksums = checkpoint.checksums
    monkeypatch.setattr(checkpoint, "checksums", lambda tree: asked.append("checksums") or checksums(tree))
    is_step(restore(saved), 2)
    assert asked == ["anywhere", "anywhere", "checksums"]
    assert "train/3 is damaged (another process cannot read it)" in capsys.readouterr().out
    assert steps_in(saved) == [2]


def test_when_none_is_intact_the_run_ends_and_nothing_is_removed(saved):
    for step in (2, 3):
        truncated(files(saved, step)[0])
    with pytest.raises(OSError, match="none of the checkpoints .* is intact; remove it"):
        restore(saved)
    assert steps_in(saved) == [2, 3]


def test_evaluation_takes_the_newest_intact_average_and_removes_nothing(saved, capsys):
    like = jax.eval_shape(lambda: state_at(0))["ema"]
    chex.assert_trees_all_equal(checkpoint.load_ema(saved, like), state_at(3)["ema"])
    truncated(files(saved, 3)[0])
    chex.assert_trees_all_equal(checkpoint.load_ema(saved, like), state_at(2)["ema"])
    assert "train/3 is damaged" in capsys.readouterr().out and steps_in(saved) == [2, 3]
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load_ema(saved / "other", like)


def test_a_disk_that_fills_up_is_an_error_and_costs_no_older_checkpoint(saved):
    """The kernel refuses to let any file grow beyond a kilobyte, which is what a full disk or a quota looks like."""
    refused = pytest.raises(Exception, match="(?i)too large|no space|resource")  # of orbax's own kinds
    with refused, checkpoint.open_manager(saved, "train") as manager, files_of_at_most(1024):
        checkpoint.save(manager, 4, state_at(4))
        manager.wait_until_finished()
    assert 3 in steps_in(saved) and 4 not in steps_in(saved)
    is_step(restore(saved), 3)
    assert not list(checkpoint.folder(saved, "train").glob("*tmp*"))  # the half of step 4 is cleaned away


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("unpickled"),)


def test_nothing_is_ever_unpickled(saved, tmp_path, monkeypatch):
    """A payload in the place of each file of the newest checkpoint."""
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(Bomb())
    pickle.loads(payload)
    assert pathlib.Path("unpickled").exists()  # so the trap does spring
    pathlib.Path("unpickled").unlink()
    for path in files(saved, 3):
        whole = path.read_bytes()
        path.write_bytes(payload)
        with checkpoint.open_manager(saved, "train") as manager:
            step, state = checkpoint.newest_intact(manager, lambda step: restore_step(manager, step))
        is_step(state, step)
        assert not pathlib.Path("unpickled").exists(), path
        path.write_bytes(whole)


def test_checksums_see_every_word_and_its_place():
    state = state_at(1)
    before = checkpoint.checksums(state)
    assert set(before) == {"step", "on", "ema/student/kernel", "ema/student/bias", "ema/student/half"}
    kernel = state["ema"]["student"]["kernel"]
    swapped = kernel.at[jnp.array([0, 1])].set(kernel[jnp.array([1, 0])])
    for changed in (kernel.at[5, 7].multiply(-1), kernel.at[0, 0].add(1e-6), swapped):
        assert checkpoint.checksums({"kernel": changed})["kernel"] != before["ema/student/kernel"]
