"""metrics.jsonl and TensorBoard: what is written, and what a resume does with the rows of a run that was cut off."""

import json
import struct

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from flexjax import errors
from flexjax.train import metrics

EXPERTS = ("public", "code", "math")


def values(step):
    return {
        "loss": np.float32(2 / step),
        "cross_entropy": np.float32(1.5 / step),
        "learning_rate": np.float32(1e-3),
        "gradient_norm": np.float32(0.5),
        "skipped": np.bool_(False),
        "share": np.full((2, 3), 1 / 3, np.float32),
        "entropy": np.array([0.5, 0.25], np.float32),
        "bias": np.array([[0, -1, -2], [0, -3, -4]], np.float32),
    }


def log(directory, start=0, steps=20):
    return metrics.Log(epath.Path(directory), "test", start, steps, tokens_per_step=64, flops_per_token=1000.0, devices=1)


def points(directory):
    """All (tag, step, value) of the event files, less those that a later session start told TensorBoard to drop."""
    found = []
    for file in sorted((directory / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack("<Q", data[place : place + 8])
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + size])
            place += size + 16
            if event.HasField("session_log"):
                found = [point for point in found if point[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)


def test_a_row_holds_the_metrics_the_speed_and_the_time_that_is_left(tmp_path):
    written = log(tmp_path)
    first, second = (written.write(step, values(step), EXPERTS) for step in (1, 11))
    written.close()
    assert metrics.read(epath.Path(tmp_path) / "metrics.jsonl") == [first, second]
    assert first["step"] == 1 and "mfu" not in first  # the first interval holds compilation
    assert second["mfu"] == pytest.approx(second["tokens_per_second"] * 1000 / 1e9)
    assert second["eta_seconds"] == pytest.approx(9 * 64 / second["tokens_per_second"])
    assert second["share"] == [[pytest.approx(1 / 3)] * 3] * 2 and second["bias"] == [[0, -1, -2], [0, -3, -4]]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_tensorboard_holds_a_curve_for_every_scalar_layer_and_expert(tmp_path):
    written = log(tmp_path)
    written.write(1, values(1), EXPERTS)
    written.write(11, values(11), EXPERTS)
    on_disk = points(tmp_path)  # before it is closed: a kill loses nothing
    written.close()
    assert points(tmp_path) == on_disk
    tags = {tag for tag, _, _ in on_disk}
    curves = {f"{name}/{expert}/layer0{layer}" for name in ("share", "bias") for expert in EXPERTS for layer in (0, 1)}
    scalars = {"loss", "cross_entropy", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "eta_seconds"}
    assert curves | scalars | {"entropy/layer00", "entropy/layer01"} <= tags
    assert ("bias/math/layer01", 11, -4.0) in on_disk and ("loss", 1, 2.0) in on_disk


def test_a_resume_drops_the_rows_and_points_beyond_its_start(tmp_path):
    written = log(tmp_path)
    for step in range(1, 8):
        written.write(step, values(step), EXPERTS)
    written.close()
    resumed = log(tmp_path, start=4)
    resumed.write(5, values(5), EXPERTS)
    resumed.close()
    rows = metrics.read(epath.Path(tmp_path) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [step for tag, step, _ in points(tmp_path) if tag == "loss"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
    written = log(tmp_path)
    for step in (1, 2, 3):
        written.write(step, values(step), EXPERTS)
    written.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut] if cut > 1 else path.read_bytes() + b"\xc3")
    log(tmp_path, start=3).close()
    expected = [1, 2, 3] if cut == 1 else [1, 2]
    assert [row["step"] for row in metrics.read(epath.Path(path))] == expected
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_step_that_was_skipped_is_written_with_its_values(tmp_path):
    written = log(tmp_path)
    row = written.write(3, values(3) | {"loss": np.float32(np.nan), "skipped": np.bool_(True)}, EXPERTS)
    written.close()
    assert np.isnan(row["loss"]) and row["skipped"] is True
    assert metrics.read(epath.Path(tmp_path) / "metrics.jsonl")[0]["loss"] is None, "JSON knows no NaN"


def test_a_directory_in_the_way_is_a_storage_error_naming_the_file(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(errors.StorageError, match=r"metrics\.jsonl"):
        log(tmp_path)


def test_peak_of_this_machine_is_measured_and_plausible(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < metrics.peak_flops() < 1e16
