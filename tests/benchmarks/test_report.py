import json
import subprocess
import sys

import pytest

from benchmarks import report
from benchmarks.reporting import figures, measures, quality, rows
from tests.benchmarks import synthetic

FACTORS = {
    "anchor": 1.0,
    "joint-1x": 0.80,
    "joint-2x": 0.70,
    "joint-frozen-2x": 0.74,
    "btm": 0.72,
    "flex": 0.78,
    "flex-paper": 0.9,
    "flex-tuned-sampled": 0.77,
    "flex-tuned-donated": 0.75,
    "flex-sequence": 0.725,
}
EXPERTS = synthetic.DOMAINS


def everything(seeds=(0, 1)):
    """Rows of every kind of method and with all that a row can carry; truth by construction."""
    second = {"btx": 0.85, "flex-rank8": 0.85, "flex-narrow16": 0.8}
    ablation = {"flex-no-bias": 0.79, "flex-k1": 0.85, "flex-k2": 0.8, "flex-k3": 0.79}
    found = synthetic.suite(FACTORS | second | ablation, seeds, noise=0.01)
    for row in found:
        name = row["method"]
        row["group"] = "second" if name in second else "ablation" if name in ablation else "core"
        row["ledger"] |= {"forwards": {"btm": 4.0, "flex-sequence": 4.2}.get(name, 1.0)}
        row["ledger"]["training_flops"] = {"anchor": 0.0, "joint-2x": 6e12}.get(name, 3e12)
        scores = row["scores"]
        scores["unseen"] = {"math": scores["report"]["math"], "code": scores["report"]["code"]}
        scores["mixed"] = {"interleaved": scores["report"]["public"], "real": scores["report"]["code"]}
        if name.startswith("flex") and row["group"] == "core" and "sequence" not in name:
            row["experts"] = list(EXPERTS)
            row["shares"] = {d: [[0.7 if e == d else 0.1 for e in EXPERTS]] * 2 for d in EXPERTS}
    for row in found:
        if row["method"] == "flex":
            row["confusion"] = {domain: [10.0, 20.0, 30.0, 40.0] for domain in EXPERTS}
            row["trials"] = [{"setting": f"temperature {t}", "tune": 2.0 + t / 100} for t in (1, 2, 3)]
            row["chosen"] = {"setting": "temperature 1"}
            row["learning_rates"] = {"joint": [{"learning_rate": 0.004, "tune": 2.1}, {"learning_rate": 0.002, "tune": 2.2}]}
            row["extra"] = {
                "tasks": {
                    "sums": {
                        "items": 100,
                        "too_long": 7,
                        "chance": 0.25,
                        "accuracy": 0.24,
                        "low": 0.17,
                        "high": 0.33,
                        "answer_bits": 2.11,
                        "informative": False,
                    }
                },
                "extraction": {"merged": {"100": {"attempted": 200, "extracted": 61, "low": 0.25, "high": 0.37}}},
                "examples": [{"domain": "math", "pieces": [["x ", "math"], ["= 1", "math"], [" so", "public"]]}],
            }
        sizes = {"flex": 1e6, "flex-rank8": 1e5, "flex-narrow16": 2e5}
        if row["method"] in sizes:
            row.setdefault("extra", {})["parameters"] = sizes[row["method"]]
    return [*found, *(without(row, expert) for row in found if row["method"] == "flex" for expert in ("code", "math"))]


def without(row, expert):
    """The same model, 20 % worse on one domain alone."""
    scores = json.loads(json.dumps(row["scores"]))
    scores["report"][expert]["nats"] = [1.2 * value for value in scores["report"][expert]["nats"]]
    return row | {"method": f"flex-without-{expert}", "title": f"without {expert}", "scores": scores, "extra": {}}


def written(found, directory):
    report.write(found, directory)
    return (directory / report.FILE).read_text()


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text, start):
    """The cells of the one line that starts like this."""
    lines = [line for line in text.splitlines() if line.startswith(start)]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    (directory / "attempts.md").write_text("# Log\n\n# Rows\nWhitening: predicted +3 points, -1 came.\n")
    found = [*everything(), synthetic.failed("soup", 0, "ValueError: a | b\nc")]
    return written(found, directory), directory


def test_report_has_every_section_and_figure(full):
    text, directory = full
    assert text.splitlines()[2].startswith("Sanity holds: joint-2x is better than joint-1x in every seed")
    assert (
        "by sequence, nothing tuned 92 [" in text.splitlines()[4] and "(4.2 forwards, 1.00 x joint-1x)" in text.splitlines()[4]
    )
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    for title in titles:
        assert not section(text, title).strip().startswith(("Not ", "No ", "Empty")), title
    for name in report.DRAWINGS:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in text


def test_main_table_is_sorted_by_gap_and_shows_failures(full):
    text = section(full[0], "Methods")
    names = [line.split("|")[2].strip("` ") for line in text.splitlines() if line.startswith("|")][2:]
    expected = sorted(FACTORS, key=FACTORS.get)
    assert names == [*expected, "soup"]
    assert cells(text, "| flex |")[2:5] == ["3.00", "1.00", "1.0"]
    gap, seeds, paper = cells(text, "| flex-paper |")[-3:]
    assert gap.startswith("33 [") and seeds.startswith("2, ±") and paper == "45"
    assert cells(text, "| soup |")[-4:] == ["failed", "-", "0 of 2", "18"]
    failures = section(full[0], "What failed or was not run")
    assert cells(failures, "| `soup` | 0")[2:] == ["failed: ValueError: a \\", "b c"]
    assert cells(failures, "| `soup` | 1")[2] == "not run"


def test_paper_has_its_own_gap(full):
    text = section(full[0], "Beside the paper")
    tuned = cells(text, "| FlexOlmo, router tuned |")
    assert tuned[1] == "`flex-tuned-proxy`" and tuned[3:] == ["47.8", "75", "was not run"]
    assert cells(text, "| FlexOlmo, rows of a text encoder")[1:] == ["-", "no counterpart", "46.7", "67", "-"]
    assert cells(text, "| FlexOlmo, no bias, no domain rows |")[1:3] == ["-", "no counterpart"]
    assert cells(text, "| FlexOlmo, rows of hidden states")[1:5] == ["`flex-paper`", "", "43.5", "45"]
    assert cells(text, "| model soup |")[-1] == "failed"


def test_claims(full):
    text = section(full[0], "Quality to reach")
    untuned = cells(text, "| per-token routing, no tuning")
    assert untuned[3] == "`flex`" and untuned[4].startswith("73 [") and "yes" in untuned[6]
    assert cells(text, "| per-token routing, tuned")[3] == "`flex-tuned-sampled`"  # never on donated text
    masks = cells(text, "| sequence masks, no tuning")
    assert masks[3] == "`flex-sequence`" and masks[6].startswith("yes")
    assert masks[5] == "4.2 forwards, 1.00 x"
    assert cells(text, "| sequence masks against joint 1x, unseen")[4].startswith("-9.")
    joint = cells(text, "| best of these against joint 1x")
    assert joint[3] == "`flex-sequence`"
    assert joint[5] == "`flex-sequence` 4.2 forwards, 1.00 x; `joint-1x` 1.0 forwards, 1.00 x"
    against = cells(text, "| best of these against BTM or prompt routing at equal inference FLOPs, pure")
    assert against[5] == "`flex-sequence` 4.2 forwards, 1.00 x; `btm` 4.0 forwards, 1.00 x" and against[6].startswith("no")
    removal = cells(text, "| removing an expert")
    assert removal[4].startswith("of 6, 0 worse and 0 better") and removal[6] == "yes for these documents, 2 seeds"
    public = {line.split("|")[4].strip(): line for line in text.splitlines() if line.startswith("| public text")}
    assert set(public) == {"`flex`", "`flex-tuned-sampled`", "`flex-sequence`"}


def test_equal_cost_is_part_of_the_claim():
    found = everything((0, 1, 2))
    for row in found:
        if row["method"] == "flex-sequence":
            row["ledger"]["forwards"] = 8.0
            for scores in row["scores"]["report"].values():
                scores["nats"] = [0.9 * value for value in scores["nats"]]
    against = [claim for claim in quality.claims(measures.Measures(found)) if "BTM" in claim.what and "pure" in claim.what]
    assert against[0].reached == "only at 2.0 times the cost"
    for row in found:
        if row["method"] == "flex-sequence":
            row["ledger"]["forwards"] = 4.0
    against = [claim for claim in quality.claims(measures.Measures(found)) if "BTM" in claim.what and "pure" in claim.what]
    assert against[0].reached == "**yes**"


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_few_seeds_speak_for_these_documents_only(seeds, tmp_path):
    found = synthetic.suite(FACTORS, range(seeds), noise=0.01)
    text = section(written(found, tmp_path), "Quality to reach")
    reached = cells(text, "| best of these against joint 1x")[-1]
    count = "1 seed" if seeds == 1 else f"{seeds} seeds"
    assert reached == ("**yes**" if seeds == 3 else f"yes for these documents, {count}")
    assert (quality.FEW_SEEDS in text) == (seeds < 3) and ("**yes**" in text) == (seeds == 3)


@pytest.mark.parametrize("other", ["btm-2", "btm-opening-1", "prompt-routing"])
def test_cheaper_rivals(other):
    """A rival within the cost of `flex` is taken instead of BTM, which is better but costs four times as much."""
    found = synthetic.suite(FACTORS | {other: 0.73})
    for row in found:
        row["ledger"]["forwards"] = {"btm": 4.0, other: 1.1}.get(row["method"], 1.0)
    made = measures.Measures(found)
    assert quality.rival(made, "flex") == other
    alone = measures.Measures([row for row in found if row["method"] != "btm"])
    assert quality.rivals(alone) == [other]
    for row in found:
        row["ledger"]["forwards"] = 4.0
    assert quality.rival(measures.Measures(found), "flex") == "btm"


@pytest.mark.parametrize(
    "method, kind",
    [
        ("flex", "token"),
        ("flex-calibrated", "token"),
        ("flex-tuned-proxy", "tuned"),
        ("flex-tuned-donated", "donated"),
        ("flex-sequence-hard", "sequence"),
        ("flex-tuned-sampled-sequence", ""),
    ],
)
def test_kinds_of_merged_models(method, kind):
    assert quality.kind(method) == kind


def test_the_best_of_a_kind_is_chosen_on_the_tuning_half():
    """`flex` is better on the reported half, `flex-paper` on the other: that one is measured."""
    found = everything()
    assert quality.chosen(measures.Measures(found))["token"] == "flex"
    for row in found:
        factor = 0.5 if row["method"] == "flex-paper" else 1.0
        half = row["scores"]["report"]["math"]
        row["scores"]["tune"] = {"math": {**half, "nats": [factor * value for value in half["nats"]]}}
    made = measures.Measures(found)
    assert quality.chosen(made)["token"] == "flex-paper"
    assert quality.claims(made)[0].measured.startswith("33 [")


def test_removal_without_a_seed_in_common(tmp_path):
    """Such a pair is kept out of table, claim and figure, and named; the others stay."""
    found = [row for row in everything() if (row["method"], row["seed"]) not in (("flex", 1), ("flex-without-math", 0))]
    text = written(found, tmp_path)
    removal = section(text, "Removing an expert")
    assert "| code |" in removal and "| math |" not in removal
    assert "No seed in common, so not compared: `flex-without-math` with `flex`." in removal
    assert cells(section(text, "Quality to reach"), "| removing an expert")[4].startswith("of 3, 0 worse")
    found = [row for row in found if row["method"] != "flex-without-code"]
    text = written(found, tmp_path)
    assert cells(section(text, "Quality to reach"), "| removing an expert")[4] == "no seed in common"
    assert "No seed in common" in section(text, "Removing an expert") and not (tmp_path / "removal.png").exists()


def test_removal_of_the_only_domain():
    found = synthetic.suite({"flex": 1.0, "flex-without-math": 1.1})
    for row in found:
        row["scores"]["report"] = {"math": row["scores"]["report"]["math"]}
    assert quality.claims(measures.Measures(found))[-1].measured == "there is no other domain"


def test_removal_matrix(full):
    text = section(full[0], "Removing an expert")
    line = cells(text, "| code |")
    assert line[2] == "**+20.0 [+20.0, +20.0]**" and line[1] == line[3] == line[4] == "+0.0 [+0.0, +0.0]"


def test_routing(full):
    text = section(full[0], "Routing")
    assert "| math | 10 | 10 | 10 | 70 |" in text  # shares
    assert "| math | 10 | 20 | 30 | 40 |" in text  # confusion
    assert '    math: [math: "x = 1"] [public: " so"]' in text


def test_series(full):
    active = section(full[0], "Number of active experts")
    assert [line.split("|")[2].strip() for line in active.splitlines() if line.startswith("| `")] == ["1", "2", "3", "4"]
    assert cells(active, "| `flex` | 4")[-1] == "-"  # our recipe has all active
    sizes = section(full[0], "Size of experts")
    found = [line.split("|")[3].strip() for line in sizes.splitlines() if line.startswith("| flex")]
    assert found == ["100,000", "200,000", "1,000,000"]
    assert "flex-k1" not in section(full[0], "Ablations") and "flex-rank8" not in section(full[0], "Second suite")


def test_tasks_extraction_tuning_ledger_attempts(full):
    text = full[0]
    assert "| sums | uninformative: nothing beats chance | 100 | 7 | 25 |" in text
    assert "| `flex` | 2 | 24 [17, 33] |" in text and "| `flex` | 2 | 2.11 |" in text
    assert "61 of 200: 30.5 [25.0, 37.0]" in section(text, "Extraction")
    tuning = section(text, "Tuning")
    assert "Numbers of trials DIFFER: 0, 2, 5." in tuning and "All that is listed" not in tuning
    assert cells(tuning, "| joint |")[3] == "learning rate 0.004, best at the edge of the grid"
    assert cells(tuning, "| `flex` |")[1:4] == ["5", "3", "joint 2"]
    assert cells(tuning, "| `btm` |")[1:] == ["0", "0", "0", "", ""]
    assert cells(section(text, "Ledger of FLOPs"), "| expert-math |")[2:7] == ["0.80", "400", "1.00", "60", "17"]
    assert section(text, "What was tried").strip() == "### Rows\nWhitening: predicted +3 points, -1 came."


def test_equal_trials(tmp_path):
    """The same number in all, though one method has settings of its own and the others only learning rates."""
    found = synthetic.suite(FACTORS)
    rates = [{"learning_rate": rate, "tune": 2 + (rate - 0.004) ** 2} for rate in (0.008, 0.002, 0.004)]
    for row in found:
        row |= {"trials": rates} if row["method"] == "btm" else {"learning_rates": {"joint": rates}}
    tuning = section(written(found, tmp_path), "Tuning")
    assert "All that is listed had 3 trials" in tuning and "at the edge" not in tuning
    del found[0]["learning_rates"]
    assert "Numbers of trials DIFFER: 0, 3." in section(written(found, tmp_path), "Tuning")


def test_a_seed_that_was_run_beside_two_anchors_is_named_near_the_top(tmp_path):
    """Seeds differ in their anchors; within one, a gap is measured from one."""
    found = synthetic.suite(FACTORS, (0, 1))
    for row in found:
        row["anchor"] = ("a" if row["seed"] else "b") * 64
    assert "anchors" not in written(found, tmp_path).split("\n## ")[0]
    next(row for row in found if (row["method"], row["seed"]) == ("flex", 1))["anchor"] = "c" * 64
    top = written(found, tmp_path).split("\n## ")[0]
    odd = f"**Not comparable: seed 1 has several anchors.** Most of `{'a' * 12}`, but `{'c' * 12}`: `flex` (seed 1)."
    assert odd in top.splitlines()


def test_rows_made_of_different_things_are_named_near_the_top(tmp_path):
    found = synthetic.suite(FACTORS, (0, 1))
    for row in found:
        row["inputs"] = "b" * 64 if (row["method"], row["seed"]) in (("flex", 1), ("btm", 0)) else "a" * 64
    top = written(found, tmp_path).split("\n## ")[0]
    odd = f"**Not comparable: rows were made of different `inputs`.** Most of `{'a' * 12}`, but `{'b' * 12}`: "
    assert f"{odd}`btm` (seed 0), `flex` (seed 1)." in top.splitlines() and "commit" not in top
    for row in found:
        row["inputs"] = "a" * 64
    found[0]["commit"] = "def5678+changes"
    top = written(found, tmp_path).split("\n## ")[0]
    assert "inputs" not in top
    assert "Rows are of several commits: most of `abc1234`; `def5678+changes`: `anchor` (seed 0)." in top
    assert "Code that is in no commit, `+changes`: `def5678+changes`." in top
    found[0] = synthetic.failed("anchor", 0, "x") | {"commit": "def5678"}  # nothing was measured by it
    assert "commit" not in written(found, tmp_path).split("\n## ")[0]


def test_origin(full):
    text = section(full[0], "What was run")
    assert "- methods began: 2026-01-01 00:00 to 2026-01-01 00:00 UTC" in text
    assert "- what seeds share: corpus, split, tokenizer, learning rates; they differ in" in text


def test_nothing_may_be_claimed_where_sanity_fails(tmp_path):
    found = synthetic.suite(FACTORS | {"joint-2x": 0.85}, noise=0.01)
    text = written(found, tmp_path)
    assert text.splitlines()[2].startswith("**Nothing may be claimed from this report: joint-2x is better than joint-1x NOT")
    assert "none of this may be claimed" in section(text, "Quality to reach")


def test_little_is_reported_as_little(tmp_path):
    """With the anchor alone, each section says what is missing, and no figure is written or left behind."""
    for name in report.DRAWINGS:
        (tmp_path / name).write_bytes(b"old")
    text = written(synthetic.suite({"anchor": 1.0}), tmp_path)
    assert text.splitlines()[2] == "**Nothing may be claimed from this report: joint-1x was not run; joint-2x was not run.**"
    assert [path.name for path in tmp_path.iterdir()] == [report.FILE]
    assert cells(section(text, "Quality to reach"), "| per-token routing, no tuning")[4:] == ["not run", "-", "not measured"]
    for title in ("Second suite", "Ablations", "Tasks", "Extraction"):
        assert section(text, title).strip() == "Not run."


@pytest.mark.parametrize("name", list(report.DRAWINGS))
def test_figures_need_their_rows(name, tmp_path):
    draw, _ = report.DRAWINGS[name]
    assert draw(measures.Measures([synthetic.failed("flex", 0, "x")]), tmp_path / name) is False
    assert not (tmp_path / name).exists()


def test_gap_figure_without_bounds_and_far_away(tmp_path):
    found = synthetic.suite({"anchor": 1.0, "joint-2x": 0.999, "flex": 0.9, "btm": 1.5}, noise=0.1, documents=100, truth=3)
    made = measures.Measures(found)
    assert made.gap("flex").low == float("-inf") and made.gap("btm").value < -10
    assert figures.gap(made, tmp_path / "gap.png")


def test_command_rebuilds_the_report_from_rows_alone(tmp_path):
    found = synthetic.suite(FACTORS)
    (tmp_path / rows.FILE).write_text("".join(json.dumps(row) + "\n" for row in found))
    done = run(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / report.FILE))
    first = (tmp_path / report.FILE).read_bytes()
    report.write(rows.read(tmp_path / rows.FILE), tmp_path)
    assert (tmp_path / report.FILE).read_bytes() == first


def run(directory):
    return subprocess.run([sys.executable, "-m", "benchmarks.report", directory], capture_output=True, text=True, check=False)


def test_command_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    for content, said in (
        (None, "rows.jsonl is missing; run the suite first"),
        ('{"suite": 1', "rows.jsonl:1 is no JSON"),
        ("[]", "rows.jsonl:1 is no result row: expected an object, found list"),
        ("{}", "rows.jsonl:1 is no result row: suite must be str, found None"),
    ):
        if content is not None:
            (tmp_path / rows.FILE).write_text(content + "\n")
        with pytest.raises(SystemExit) as ended:
            report.main()
        error = capsys.readouterr().err
        assert ended.value.code == 3 and said in error and error.count("\n") == 1
