"""The loop as a whole: what stage 1 hands to stage 2, what is compiled, where batches come from."""

import json
import logging

import chex
import jax
import numpy as np
import pytest

from mira_u_jax import steps, train


@pytest.fixture
def compiled(caplog):
    """Names of the functions XLA compiles while the test runs."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            words = record.getMessage().split()
            if words[:1] == ["Compiling"]:
                names.append(words[1].removeprefix("jit(").removesuffix(")"))

    handler, logger = Handler(), logging.getLogger("jax")
    caplog.set_level(logging.WARNING, logger="jax")  # a command run in this process before has set it to silence
    logger.addHandler(handler)
    jax.config.update("jax_log_compiles", True)
    yield names
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)


@pytest.mark.slow
def test_each_step_is_compiled_once_and_a_stream_ends_like_a_resident_run(
    tiny_config, synthetic_data_dir, tmp_path, compiled
):
    """Both stages, a plateau that changes the state between steps, pictures."""
    names = dict(dataset="synthetic_lesions", test="synthetic_lesions", data_dir=synthetic_data_dir, frac=0.1)
    keys = {"mim.steps": 4, "optim.schedule": "plateau", "optim.plateau.every": 2}
    losses = []
    for choice in ("false", "true"):
        config = tiny_config("method=mean_teacher", **names, **keys, **{"data.stream": choice})
        compiled.clear()
        state = train.run(config, tmp_path / choice)
        assert int(state.step) == config.train.steps
        assert compiled.count("train_step") == 1 and compiled.count("pretrain_step") == 1, compiled
        rows = [json.loads(line) for line in (tmp_path / choice / "metrics.jsonl").open()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        validated = [row for row in rows if row["split"] == "validation"]
        assert [row["step"] for row in validated] == [2, 4, 6] and all("lr_scale" in row for row in validated)
    assert len(losses[0]) == 3 + 4  # lines of both stages
    np.testing.assert_allclose(*losses, rtol=1e-4)  # two programs, so not the last bit


class Stop(Exception):
    pass


@pytest.mark.slow
def test_stage_2_starts_from_the_encoders_of_stage_1(tiny_config, synthetic_data_dir, tmp_path, monkeypatch):
    """Of both networks, and from nothing else of it: heads and decoders are the fresh ones."""
    config = tiny_config(dataset="synthetic_lesions", test="synthetic_lesions", data_dir=synthetic_data_dir)
    seen, pretrain = {}, train.Run.pretrain

    def watched(run, names, *args):
        seen["pretrained"] = pretrain(run, names, *args).params
        return steps.init_state(seen["pretrained"], steps.make_optimizer(config.optim, names, lambda _: 0.0), config.optim)

    def stop(run, names, params):
        seen["handed"] = params
        raise Stop

    monkeypatch.setattr(train.Run, "pretrain", watched)
    monkeypatch.setattr(train.Run, "train", stop)
    with pytest.raises(Stop):
        train.run(config, tmp_path)
    fresh = steps.init_params(("student", "vit"), "train", config, jax.random.key(config.seed))
    for name in ("student", "vit"):
        for part, handed in seen["handed"][name].items():
            wanted = seen["pretrained"][name][part] if part == "encoder" else fresh[name][part]
            chex.assert_trees_all_equal(handed, wanted)
        moved = jax.tree.map(lambda a, b: (a != b).any(), seen["handed"][name]["encoder"], fresh[name]["encoder"])
        assert all(jax.tree.leaves(moved)), name
