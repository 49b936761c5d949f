"""Three steps of two tiny runs give the numbers they always gave."""

import jax
import numpy as np
import pytest

from tests.train import tiny

# loss, gradient norm and cross-entropy after 1, 2 and 3 steps
GOLDEN = {
    "dense": [
        [5.772754, 3.989728, 5.77241],
        [5.938613, 3.023923, 5.938274],
        [5.844886, 3.327991, 5.844554],
    ],
    "pair": [
        [5.766145, 0.8468736, 5.765799],
        [5.988293, 0.833433, 5.987948],
        [5.887372, 0.8897638, 5.887028],
    ],
}
RENEW = (
    "\n{name}: the numbers of a training step have changed. That is right only when the model, a loss, the optimizer, the "
    "schedule or the initialisation was changed on purpose; then say so in the commit and put these rows into GOLDEN:\n{rows}"
)


@pytest.mark.parametrize("name", GOLDEN)
def test_metrics_of_the_first_steps_are_the_golden_ones(name):
    run, rows = tiny.run(name), []
    state = run.state
    for index in range(3):
        state, metrics = run(tiny.batch(index), state)
        rows.append([float(metrics[key]) for key in ("loss", "gradient_norm", "cross_entropy")])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    shown = "\n".join(f"        {[float(f'{value:.7g}') for value in row]}," for row in rows)
    same = np.shape(rows) == np.shape(GOLDEN[name]) and np.allclose(rows, GOLDEN[name], rtol=2e-5)
    assert same, RENEW.format(name=name, rows=shown)
