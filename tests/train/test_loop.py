"""The loop: interrupted and resumed it ends where it would have ended; what it must not continue, it refuses."""

import dataclasses
import functools
import os
import re
import signal

import numpy as np
import pytest
from etils import epath

from flexjax import checkpoint, config, errors, sharding, tree, workdir
from flexjax.train import loop, metrics, program
from tests.train import tiny

SETTINGS = {"steps": 24, "save_every": 5, "keep": 10, "log_every": 1}
SPEED = ("tokens_per_second", "mfu", "eta_seconds", "goodput")
pytestmark = pytest.mark.usefixtures("compile_once")


def sigterm(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def rows(directory):
    """metrics.jsonl without what the clock decides."""
    found = metrics.read(epath.Path(directory) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in SPEED} for row in found]


def arrays(directory, step):
    """{file: digest} of the array files of a committed step."""
    files = checkpoint.Checkpoints(epath.Path(directory) / "checkpoints", 10)._commit(step)["files"]
    return {name: digest for name, digest in files.items() if re.search("/c(/|$)", name)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compile_once):
    """A run that nothing disturbed: its directory, trained leaves and facts."""
    directory = tmp_path_factory.mktemp("reference")
    given = tiny.digest(tiny.params_of("pair"))
    trained, facts = tiny.train("pair", directory, **SETTINGS)
    assert tiny.digest(tiny.params_of("pair")) == given  # what the caller gave is never written
    return directory, trained, facts


def test_a_run_returns_exactly_the_expert_with_effective_biases_and_its_facts(reference):
    directory, trained, facts = reference
    paths = set(tree.flatten(trained))
    assert paths == {path for path in tree.flatten(tiny.params_of("pair")) if path.startswith("experts/math/")}
    assert (trained["experts"]["math"]["router"]["bias"] < 0).all()
    assert all(leaf.dtype == np.float32 for leaf in tree.flatten(trained).values())
    assert facts["steps"] == 24 and facts["tokens"] == 24 * 4 * 16 and facts["flops"] > 0
    assert [row["step"] for row in rows(directory)] == list(range(1, 25))
    assert checkpoint.Checkpoints(directory / "checkpoints", 10).steps() == [5, 10, 15, 20, 24]
    saved = checkpoint.Checkpoints(directory / "checkpoints", 10)._commit(24)["arrays"]
    leaves = {re.split("/c(?:/|$)", name)[0] for name in arrays(directory, 24)}  # a file per layer each
    assert len(leaves) == len(saved) == 20
    assert [name for name in saved if "public" in name or "embed" in name or "attention" in name] == []


def recording(seen, stop=0, pipe=None):
    """A pipeline that keeps what the loop was given, {step: [rows of token bytes]}, and is sent SIGTERM at a step."""

    def keep(step):
        def action(batch):
            assert step not in seen, f"the batch of step {step} was used twice"
            seen[step] = [row.tobytes() for row in _rows(batch)]
            return sigterm(batch) if step == stop else batch

        return action

    return tiny.Tampered(pipe or tiny.stream(), {step: keep(step) for step in range(1, SETTINGS["steps"] + 1)})


def interrupted(directory, stop, pipe=None):
    """SIGTERM while the batch of a step is made, then the same command again; returns leaves, facts and batches."""
    seen = {}
    with pytest.raises(errors.Preempted, match=f"saved step {stop}") as preempted:
        tiny.train("pair", directory, recording(seen, stop, pipe), **SETTINGS)
    assert preempted.value.exit_code == 75
    assert checkpoint.Checkpoints(directory / "checkpoints", 10).steps()[-1] == stop
    assert [row["step"] for row in rows(directory)] == list(range(1, stop + 1))
    return *tiny.train("pair", directory, recording(seen, pipe=pipe), **SETTINGS), seen


@functools.cache
def undisturbed_batches():
    return {step: [row.tobytes() for row in _rows(tiny.stream().batch(step - 1))] for step in range(1, 25)}


def _rows(batch):
    return np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)


def resumed_like(reference, directory, stop):
    """Whether parameters, moments, counters, metrics, facts and data of an interrupted run are those of one that was not."""
    kept, trained, facts = reference
    again, facts_again, seen = interrupted(directory, stop)
    return (
        tiny.same_bytes(again, trained)
        and facts_again == facts
        and rows(directory) == rows(kept)
        and arrays(directory, 24) == arrays(kept, 24)
        and seen == undisturbed_batches()
    )


@pytest.mark.parametrize("stop", [7])
def test_a_run_stopped_by_sigterm_and_resumed_is_bit_identical(reference, tmp_path, stop):
    assert resumed_like(reference, tmp_path, stop)


@pytest.mark.reliability
def test_twenty_resumes_are_bit_identical(reference, tmp_path):
    """G6 and G15, one compiled program on one backend; `tests/reliability` resumes in new processes."""
    assert sum(resumed_like(reference, tmp_path / str(stop), stop) for stop in range(2, 22)) == 20


def test_each_window_is_trained_on_once_per_epoch_across_an_interruption(reference, tmp_path):
    source = tiny.Letters(documents=20, period=40)  # 52 windows: an epoch ends inside step 13
    windows = -(-(source.num_tokens - 1) // tiny.SEQ_LEN)
    _, _, seen = interrupted(tmp_path, 9, tiny.stream(source=source))
    order = [row for step in sorted(seen) for row in seen[step]]
    assert windows < len(order) == 96
    assert len(set(order[:windows])) == windows and len(set(order[windows:])) == 96 - windows
    assert order[windows:] != order[: 96 - windows]


def test_a_sigterm_in_the_last_step_finishes_the_run(reference, tmp_path):
    trained, _ = tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {24: sigterm}), **SETTINGS)
    assert tiny.same_bytes(trained, reference[1])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_metrics_of_a_step_are_read_only_after_the_next_step_was_dispatched(reference, tmp_path, monkeypatch):
    events = []
    write = metrics.Log.write

    def spy(log, step, values, experts):
        events.append(("read", step))
        return write(log, step, values, experts)

    def asked(step):
        return lambda batch: events.append(("batch", step)) or batch

    monkeypatch.setattr(metrics.Log, "write", spy)
    pipe = tiny.Tampered(tiny.stream(), {step: asked(step) for step in range(1, 25)})
    tiny.train("pair", tmp_path, pipe, **SETTINGS | {"save_every": 100})
    assert events[:6] == [("batch", 1), ("batch", 2), ("read", 1), ("batch", 3), ("read", 2), ("batch", 4)]
    assert sorted(step for kind, step in events if kind == "read") == list(range(1, 25))


def test_a_resume_asks_only_for_the_space_that_it_does_not_hold_already(reference, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(workdir, "need_space", lambda directory, needed, purpose: asked.append((needed, purpose)))
    few = SETTINGS | {"keep": 2}
    with pytest.raises(errors.Preempted):
        tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {12: sigterm}), **few)
    tiny.train("pair", tmp_path, **few)
    state = tiny.run("pair").state
    assert asked == [(3 * checkpoint.size(state), "3 checkpoints"), (checkpoint.size(state), "1 checkpoints")]


def test_rows_of_steps_that_were_lost_are_dropped_on_resume(reference, tmp_path):
    class Crash(Exception):
        pass

    def crash(_):
        raise Crash

    with pytest.raises(Crash):
        tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {9: crash}), **SETTINGS)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 8))
    trained, _ = tiny.train("pair", tmp_path, **SETTINGS)
    assert tiny.same_bytes(trained, reference[1]) and rows(tmp_path) == rows(reference[0])


def poison(batch):
    return batch | {"weights": np.full_like(batch["weights"], np.nan)}


def test_one_poisoned_batch_is_skipped_and_said(reference, tmp_path, capfd):
    trained, _ = tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {4: poison}), **SETTINGS)
    assert [row["step"] for row in rows(tmp_path) if row["skipped"]] == [4]
    assert "warning: step 4 skipped" in capfd.readouterr().err
    assert all(np.isfinite(leaf).all() for leaf in tree.flatten(trained).values())
    assert not tiny.same_bytes(trained, reference[1])


def test_ten_bad_steps_in_a_row_stop_the_run_before_the_next_save(compile_once, tmp_path):
    pipe = tiny.Tampered(tiny.stream(), {step: poison for step in (3, 4, 6, *range(8, 25))})
    with pytest.raises(errors.NumericError, match="10 steps in a row gave no usable gradient, the last was 17") as error:
        tiny.train("pair", tmp_path, pipe, **SETTINGS | {"save_every": 7, "log_every": 100})
    assert error.value.exit_code == 7 and str(tmp_path) in str(error.value)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints", 10).steps() == [7, 14]


def damage(directory, step):
    files = [path for path in (directory / "checkpoints" / str(step)).rglob("*") if path.is_file() and "/c/" in str(path)]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def test_a_damaged_checkpoint_is_named_and_passed_over_only_by_a_flag(reference, tmp_path, capfd):
    with pytest.raises(errors.Preempted):
        tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {12: sigterm}), **SETTINGS)
    files = [damage(tmp_path, step) for step in (10, 12)]
    with pytest.raises(errors.IntegrityError, match=re.escape(str(files[1]))):
        tiny.train("pair", tmp_path, **SETTINGS)
    trained, _ = tiny.train("pair", tmp_path, options=loop.Options(fall_back=True), **SETTINGS)
    said = capfd.readouterr().err
    assert all(str(file) in said for file in files) and "resumed at step 5" in said
    assert tiny.same_bytes(trained, reference[1])
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints", 10)
    assert kept.steps() == [5, 10, 15, 20, 24]
    for step in kept.steps():  # the damaged ones are out of the way: later steps were written anew
        kept.verify(step)
    assert arrays(tmp_path, 10) == arrays(reference[0], 10)


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(reference, tmp_path):
    with pytest.raises(errors.Preempted):
        tiny.train("pair", tmp_path, tiny.Tampered(tiny.stream(), {7: sigterm}), **SETTINGS)
    for step in (5, 7):
        damage(tmp_path, step)
    with pytest.raises(errors.IntegrityError, match="no committed step is intact"):
        tiny.train("pair", tmp_path, options=loop.Options(fall_back=True), **SETTINGS)


def test_another_data_stream_is_refused(reference):
    other = tiny.stream(source=tiny.Letters(seed=5))
    with pytest.raises(errors.ConfigError, match="another data stream: source/public"):
        tiny.train("pair", reference[0], other, **SETTINGS)


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "other")
    return value + "x" if isinstance(value, str) else value + 1


@functools.cache
def flat_config():
    return config.to_dict(config.Config())


@pytest.mark.parametrize(("path", "kind"), config.classes().items())
def test_each_changed_field_is_refused_asked_for_or_free(path, kind):
    assert kind in ("identity", "schedule", "operations")
    job = config.Config()
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, job)
    setattr(owner, name, changed(getattr(owner, name)))
    current = config.to_dict(job)
    named = re.escape(f"{path}: {flat_config().get(path, '(absent)')} -> {current[path]}")
    if path.startswith(config.UNREAD["expert"]):
        kind = "operations"  # an expert run never reads it
    free = {"identity": (), "schedule": (True,), "operations": (False, True)}[kind]
    for allow in (False, True):
        if allow in free:
            accepted = config.check_same_run(flat_config(), current, allow)
            assert bool(accepted) == (kind == "schedule")
        else:
            with pytest.raises(errors.ConfigError, match=named):
                config.check_same_run(flat_config(), current, allow)


def test_a_field_that_only_another_version_of_the_code_knows_is_refused():
    other = flat_config() | {"train.momentum": 0.9}
    with pytest.raises(errors.ConfigError, match=r"train\.momentum: 0\.9 -> \(absent\)"):
        config.check_same_run(other, flat_config(), True)


@pytest.mark.reliability
def test_a_finished_run_is_prolonged_by_request(compile_once, tmp_path, capfd):
    tiny.train("pair", tmp_path, **SETTINGS)
    longer = SETTINGS | {"steps": 30}
    with pytest.raises(errors.ConfigError, match=r"the schedule changed: train\.steps: 24 -> 30"):
        tiny.train("pair", tmp_path, **longer)
    tiny.train("pair", tmp_path, options=loop.Options(allow_schedule_change=True), **longer)
    assert "warning: schedule changed by request: train.steps: 24 -> 30" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 31))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, rf"train\.{name} is 0") for name in ("steps", "batch_size", "accumulation", "save_every", "keep")),
        *(({name: 0}, rf"train\.{name} is 0") for name in ("log_every", "max_bad_steps")),
        ({"accumulation": 3}, "must divide"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
        ({"frozen_dtype": "int8"}, "frozen_dtype is 'int8'"),
        ({"remat": "some"}, "remat is 'some'"),
        ({"decay": "linear"}, "decay is 'linear'"),
        ({"trainable": "experts/("}, "'experts/\\(' is not a regular expression"),
        ({"decayed": "["}, "'\\[' is not a regular expression"),
        ({"trainable": "experts/physics/.*"}, "matches no parameter"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(errors.ConfigError, match=message):
        tiny.train("pair", tmp_path, tiny.stream(), **change)
    assert list(tmp_path.iterdir()) == []


def test_frozen_leaves_are_cast_once_but_norms_and_routers_stay_exact():
    settings = tiny.settings("pair", frozen_dtype="bfloat16")
    mesh = sharding.one_device()
    job = program.Program(tiny.ARCHITECTURES["pair"], settings, mesh, config.MeshConfig(), tiny.SEQ_LEN)
    frozen = job.place(tiny.params_of("pair"))[1]
    kept = {path for path, leaf in tree.flatten(frozen).items() if leaf.dtype == np.float32}
    assert {path.rsplit("/", 1)[1] for path in kept} == {"q_norm", "k_norm", "attention", "ffn", "norm", "row"}
    assert dataclasses.asdict(config.TrainConfig())["frozen_dtype"] == "float32"
