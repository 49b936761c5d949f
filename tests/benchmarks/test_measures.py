import math

import numpy as np
import pytest

from benchmarks.reporting import measures, rows
from flexjax import errors
from tests.benchmarks import synthetic

FACTORS = {"anchor": 1.0, "joint-1x": 0.8, "joint-2x": 0.7, "flex": 0.75}


def bits(row, domain):
    found = row["scores"]["report"][domain]
    return sum(found["nats"]) / math.log(2) / sum(found["bytes"])


def macro(row):
    return np.mean([bits(row, domain) for domain in synthetic.DOMAINS])


def test_bits_per_byte_and_gap_are_what_the_definitions_say():
    found = synthetic.suite(FACTORS)
    by_name = {row["method"]: row for row in found}
    made = measures.Measures(found)
    assert made.bits_per_byte("flex", domain="math").value == pytest.approx(bits(by_name["flex"], "math"))
    assert made.bits_per_byte("flex").value == pytest.approx(macro(by_name["flex"]))
    anchor, mine = macro(by_name["anchor"]), macro(by_name["flex"])
    for reference in ("joint-2x", "joint-1x"):
        expected = (anchor - mine) / (anchor - macro(by_name[reference]))
        assert made.gap("flex", reference).value == pytest.approx(expected)
    assert made.difference("flex", "anchor", relative=True).value == pytest.approx(mine / anchor - 1)
    assert [made.gap(name).value for name in ("anchor", "joint-2x")] == pytest.approx([0, 1])


def test_macro_is_the_mean_of_domains_however_large_they_are():
    rng = np.random.default_rng(1)
    found = synthetic.texts(rng, ("public",), 5) | synthetic.texts(rng, ("math",), 500)
    made = measures.Measures([synthetic.row("anchor", 0, synthetic.scored(found, {"public": 1.0, "math": 2.0}))])
    parts = [made.bits_per_byte("anchor", domain=name).value for name in ("public", "math")]
    assert made.bits_per_byte("anchor").value == pytest.approx(np.mean(parts))


def test_resamples_are_the_same_for_all_methods():
    """A method whose bits per byte are the other's plus a constant differs from it by that constant in every resample."""
    rng = np.random.default_rng(0)
    found = synthetic.texts(rng, synthetic.DOMAINS)
    scores = synthetic.scored(found, dict.fromkeys(synthetic.DOMAINS, 1.0), rng, 0.1)
    shifted = {
        domain: {"nats": [n + 0.1 * b * math.log(2) for n, b in zip(s["nats"], s["bytes"], strict=True)], "bytes": s["bytes"]}
        for domain, s in scores.items()
    }
    made = measures.Measures([synthetic.row("one", 0, scores), synthetic.row("two", 0, shifted)])
    difference = made.difference("two", "one")
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert difference.excludes_zero
    alone = made.bits_per_byte("one")
    assert alone.high - alone.low > 0.05
    same = made.difference("one", "one")
    assert (same.low, same.high) == (0, 0) and not same.excludes_zero


def test_proportional_methods_have_an_exact_gap():
    """All methods are the anchor times a factor on each document: the ratio is the same in every resample."""
    gap = measures.Measures(synthetic.suite(FACTORS, noise=0.0)).gap("flex")
    assert (gap.value, gap.low, gap.high) == pytest.approx((5 / 6, 5 / 6, 5 / 6))


def test_intervals_are_reproducible():
    found = synthetic.suite(FACTORS, seeds=(0, 1))
    assert measures.Measures(found).gap("flex") == measures.Measures(found[::-1]).gap("flex")


def covered(seeds, noise, seed_noise, rounds=250):
    """Share of worlds in which the interval of the gap holds the truth."""
    held = 0
    for truth in range(rounds):
        found = synthetic.suite(FACTORS, seeds, noise, seed_noise, truth=truth)
        gap = measures.Measures(found, resamples=300).gap("flex")
        held += gap.low <= 5 / 6 <= gap.high
    return held / rounds


@pytest.mark.parametrize(
    "seeds, noise, seed_noise", [((0,), 0.05, 0.0), ((0, 1, 2), 0.02, 0.01)], ids=["documents", "documents and seeds"]
)
def test_coverage(seeds, noise, seed_noise):
    """Of 250 worlds, 95 % intervals hold the truth in 90 to 99 %."""
    assert 0.90 <= covered(seeds, noise, seed_noise) <= 0.99


def test_noise_of_seeds_widens_the_interval():
    within = measures.Measures(synthetic.suite(FACTORS, seed_noise=0.02)).gap("flex")
    over = measures.Measures(synthetic.suite(FACTORS, (0, 1, 2), seed_noise=0.02)).gap("flex")
    assert math.isnan(within.spread) and over.spread > 0.01
    assert over.spread == pytest.approx(np.std(list(over.seeds.values()), ddof=1))
    assert over.value == pytest.approx(np.mean(list(over.seeds.values())))
    assert over.high - over.low > 2 * (within.high - within.low)


def test_difference_excludes_zero_where_there_is_one():
    made = measures.Measures(synthetic.suite(FACTORS | {"twin": 0.75}, noise=0.02))
    assert made.difference("flex", "anchor").high < 0
    assert not made.difference("flex", "twin").excludes_zero


def test_sanity():
    assert measures.Measures(synthetic.suite(FACTORS, (0, 1))).sanity().holds
    wrong = measures.Measures(synthetic.suite(FACTORS | {"joint-2x": 0.9}, (0, 1))).sanity()
    assert not wrong.holds and "joint-2x is better than joint-1x NOT in seed 0, 1" in wrong.reasons[0]
    missing = measures.Measures([r for r in synthetic.suite(FACTORS) if r["method"] != "joint-1x"]).sanity()
    assert not missing.holds and missing.reasons == ("joint-1x was not run",)
    partly = [r for r in synthetic.suite(FACTORS, (0, 1)) if (r["method"], r["seed"]) != ("joint-2x", 1)]
    assert not measures.Measures(partly).sanity().holds


def test_gap_without_a_reference_is_no_number():
    undefined = measures.Measures(synthetic.suite(FACTORS | {"joint-2x": 1.1})).gap("flex")
    assert math.isnan(undefined.value)
    unsure = measures.Measures(synthetic.suite(FACTORS | {"joint-2x": 0.999}, noise=0.1, documents=100, truth=3)).gap("flex")
    assert (unsure.low, unsure.high) == (-math.inf, math.inf) and math.isfinite(unsure.value)
    assert measures.Measures(synthetic.suite({"flex": 1.0, "anchor": 1.0})).gap("flex") is None
    assert measures.Measures(synthetic.suite(FACTORS)).gap("flex", part=rows.UNSEEN) is None


def test_last_row_of_a_method_counts():
    found = [synthetic.failed("flex", 0, "out of memory"), *synthetic.suite(FACTORS)]
    assert measures.Measures(found).seeds_of("flex") == [0]
    found.append(synthetic.failed("flex", 0, "out of memory"))
    made = measures.Measures(found)
    assert made.seeds_of("flex") == [] and made.gap("flex") is None and made.absence("flex") == "failed"


def test_mixed_texts_need_no_domains():
    rng = np.random.default_rng(0)
    found = synthetic.texts(rng, synthetic.DOMAINS)
    mixed = synthetic.scored(synthetic.texts(rng, ("one",)), {"one": 1.0})["one"]
    row = synthetic.row("anchor", 0, synthetic.scored(found, dict.fromkeys(synthetic.DOMAINS, 1.0)))
    row["scores"]["mixed"] = {"interleaved": mixed, "real": {"a": mixed, "b": mixed}}
    made = measures.Measures([row])
    expected = sum(mixed["nats"]) / math.log(2) / sum(mixed["bytes"])
    assert made.bits_per_byte("anchor", rows.INTERLEAVED).value == pytest.approx(expected)
    assert made.bits_per_byte("anchor", rows.REAL).value == pytest.approx(expected)
    assert made.domains(rows.INTERLEAVED) == [""] and made.domains(rows.REAL) == ["a", "b"]


def test_other_documents_are_refused_by_name():
    found = synthetic.suite(FACTORS, (0, 1))
    for values in found[-1]["scores"]["report"]["math"].values():
        values[0], values[1] = values[1], values[0]
    with pytest.raises(errors.IntegrityError, match=r"'flex', seed 1: its documents of report/math are not those of 'anchor'"):
        measures.Measures(found)
    del found[-1]["scores"]["report"]["math"]
    with pytest.raises(errors.IntegrityError, match="'flex', seed 1: its documents of report/math"):
        measures.Measures(found)


@pytest.mark.parametrize("field", ["suite", "size", "corpus"])
def test_rows_of_two_suites_are_refused(field):
    found = synthetic.suite(FACTORS)
    found[2][field] = "other"
    with pytest.raises(errors.IntegrityError, match=f"rows differ in {field}: .*'joint-2x' of seed 0"):
        measures.Measures(found)


def test_nothing_to_report():
    with pytest.raises(errors.DataError, match="no row to report"):
        measures.Measures([])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": "0"}, "seed must be int, found '0'"),
        ({"status": "done"}, "status must be one of ok, failed, found 'done'"),
        ({"group": "third"}, "group must be one of core, second, ablation"),
        ({"scores": {}}, "no scores of the report half"),
        ({"scores": {"report": {"math": {"nats": [1.0]}}}}, "expected scores with nats and bytes"),
        ({"scores": {"report": {"math": {"nats": [1.0], "bytes": [1, 2]}}}}, r"report/math has \(1,\) nats and \(2,\) bytes"),
        ({"scores": {"report": {"math": {"nats": [math.nan], "bytes": [1]}}}}, "nats that are not finite"),
        ({"ledger": {}}, "a ledger with training_flops"),
    ],
)
def test_what_is_no_row_is_refused(change, said):
    found = synthetic.suite(FACTORS)
    found[1] |= change
    with pytest.raises(errors.DataError, match=said) as refused:
        measures.Measures(found)
    assert str(refused.value).startswith("row 2")
    assert str(refused.value).endswith("remove the line or run the method again")


@pytest.mark.parametrize("field", ["seed", "status", "group", "suite"])
def test_what_is_no_row_is_quoted_briefly(field):
    row = synthetic.suite(FACTORS)[0] | {field: ["long\n"] * 10_000}
    with pytest.raises(errors.DataError) as refused:
        rows.check(row, "rows.jsonl:1")
    said = str(refused.value)
    assert len(said) < 250 and "\n" not in said and field in said
