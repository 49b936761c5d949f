"""The mixture layer as one slow NumPy loop in float64: what every fast path is compared with."""

import numpy as np


def mixture(h, experts, rows, bias, top_k, allowed):
    """y [B, T, D] of h [B, T, D]; experts are (gate, up, down) in canonical order, allowed [B, E]."""
    y = np.zeros(h.shape)
    for b, t in np.ndindex(h.shape[:2]):
        x = h[b, t]
        logits = {e: x @ rows[e] + bias[e] for e in range(len(experts)) if allowed[b, e]}
        highest = max(logits.values())
        weights = {e: np.exp(logit - highest) for e, logit in logits.items()}
        total = sum(weights.values())
        for e in sorted(weights, key=lambda e: (-weights[e], e))[:top_k]:
            gate, up, down = experts[e]
            a = x @ gate
            y[b, t] += weights[e] / total * (a / (1 + np.exp(-a)) * (x @ up)) @ down
    return y


def gradients(loss, arrays, epsilon=1e-6):
    """Central differences of a scalar loss by every element of every array, in float64."""
    result = {}
    for name, array in arrays.items():
        slope = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            values = []
            for step in (epsilon, -epsilon):
                moved = array.copy()
                moved[place] += step
                values.append(loss({**arrays, name: moved}))
            slope[place] = (values[0] - values[1]) / (2 * epsilon)
        result[name] = slope
    return result
