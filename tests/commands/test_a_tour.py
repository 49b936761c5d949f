"""The README is a promise: every command of its tour runs, in order, as printed.

The default test runs them with fewer steps and less text; `pytest -m slow` runs them at full length and holds the first
command to its figures.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SHORT = {
    "flexjax.main": ["--config.anchor.train.steps=24", "--config.train.steps=12", "--config.evaluation.max_kilobytes=20"],
    "flexjax.evaluate": ["--max_kilobytes=20", "--batch_size=8"],
    "flexjax.convert": [],
    "flexjax.generate": [],
    "flexjax.merge": [],
}


def blocks(marker: str) -> list[str]:
    """The command lines of every fenced block behind `<!-- marker -->`."""
    text = (ROOT / "README.md").read_text()
    fenced = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in fenced for line in block.splitlines() if line.strip()]


def run(line: str, home: pathlib.Path, short: bool) -> str:
    """Runs one command line of the README in `home`; returns its standard output."""
    words = shlex.split(line)
    if words[0] in ("mkdir", "cp"):
        return subprocess.run(words, cwd=home, check=True, capture_output=True, text=True).stdout
    assert words[:2] == ["python", "-m"], f"the tour speaks python -m only: {line}"
    extra = SHORT[words[2]] if short else []
    if words[3] in ("calibrate", "compress") and short:
        extra = ["--max_kilobytes=5"]
    if "config.anchor.path" in line:
        extra = [word for word in extra if "anchor" not in word]
    if words[2:4] == ["flexjax.convert", "import"]:
        extra = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, *words[1:], *extra], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def tour(home: pathlib.Path, short: bool) -> dict[str, str]:
    (home / "configs").symlink_to(ROOT / "configs")
    first = [line.split(" && ")[-1] for line in blocks("command 1")]
    return {line: run(line, home, short) for line in first + blocks("tour") + blocks("coordinator")}


def check(printed: dict[str, str]) -> None:
    create = "merge create --model=runs/merged"
    digests = [re.search(r"tree digest (\w{64})", out) for line, out in printed.items() if create in line]
    assert len(digests) == 2
    assert digests[0] and digests[1] and digests[0][1] == digests[1][1], "the order of --expert must not matter"
    merged_by_main = [out for line, out in printed.items() if "merge show --model=runs/math_expert" in line]
    removed = [out for line, out in printed.items() if "merge remove" in line]
    assert re.findall(r"tree digest (\w{64})", removed[0]) == re.findall(r"tree digest (\w{64})", merged_by_main[0])
    shown = next(out for line, out in printed.items() if "merge show" in line)
    assert "math" in shown and "code" not in shown
    off = next(out for line, out in printed.items() if "--experts=public,math" in line)
    assert "code 0%" in off
    certificate = next(out for line, out in printed.items() if "merge certify" in line)
    assert "answers equal to the last bit" in certificate and "signed by" in certificate
    generated = [out for line, out in printed.items() if "flexjax.generate" in line]
    assert all(out.startswith("Returns the eigenvalues of") for out in generated)
    table = next(out for line, out in printed.items() if "math_expert.py" in line and "main" in line)
    assert "bits per byte" in table and "Next:" in table


def test_every_command_of_the_tour_runs(tmp_path: pathlib.Path) -> None:
    check(tour(tmp_path, short=True))


@pytest.mark.slow
def test_the_main_job_keeps_its_figures_and_is_skipped_when_started_again(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    printed = tour(tmp_path, short=False)
    print(f"the whole tour took {time.monotonic() - start:.0f} s")
    check(printed)
    home = tmp_path / "runs" / "math_expert-quickstart"
    scores = json.loads((home / "evaluation.json").read_text())["scores"]
    change = {d: scores["model"][d]["bits_per_byte"] / scores["anchor"][d]["bits_per_byte"] for d in ("public", "math")}
    assert change["math"] <= 0.90, change
    assert change["public"] <= 1.02, change
    assert (home / "report.png").stat().st_size > 10_000
    first = blocks("command 1")[0].split(" && ")[-1]
    again = time.monotonic()
    run(first, tmp_path, short=False)
    assert time.monotonic() - again < 60


def test_the_first_command_sets_up_and_runs_the_main_job() -> None:
    assert blocks("command 1") == [
        "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt "
        "&& python -m flexjax.main --config=configs/math_expert.py"
    ]
    assert (ROOT / ".python-version").read_text().split() == ["3.12", "3.11"]
