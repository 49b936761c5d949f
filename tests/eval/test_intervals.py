"""Wilson's interval against published values, its definition, and its edges."""

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from flexjax.eval import intervals


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        (0, 10, (0.0, 0.2775)),
        (1, 10, (0.0179, 0.4042)),
        (10, 100, (0.0552, 0.1744)),
        (81, 263, (0.2553, 0.3662)),  # Newcombe 1998, Table I
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (100, 100, (0.9630, 1.0)),
    ],
)
def test_known_values(successes, trials, expected):
    assert intervals.wilson(successes, trials) == pytest.approx(expected, abs=6e-5)


@hypothesis.given(st.integers(1, 500), st.data())
def test_bounds_are_the_rates_that_the_score_test_just_accepts(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = intervals.wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1 and low < high
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(successes / trials - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(
                1.959964, rel=1e-5
            )
    assert intervals.wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))
    wider = intervals.wilson(successes, trials, level=0.99)
    assert wider[0] <= low and high <= wider[1] and wider != (low, high)


def test_without_trials_nothing_is_known_and_nonsense_is_refused():
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    assert intervals.wilson(0, 7)[0] == 0.0 and intervals.wilson(7, 7)[1] == 1.0  # exactly
    for successes, trials in ((3, 2), (-1, 4)):
        with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
            intervals.wilson(successes, trials)
