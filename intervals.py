"""Intervals and paired differences of eval.py's numbers.

Shapes: n rows of a task, M models, S bootstrap samples. Rows are {row: (sum, weight, cluster)}: a
number is Σ sums / Σ weights, and rows of one cluster (the turns of a dialogue) stay together.
"""

from __future__ import annotations

import math

import numpy as np

import data

SAMPLES = 2000  # of the bootstrap
Z = 1.959964  # 95 % of a normal distribution lie within ± Z


def perplexity_reduction(nll: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """100 · (1 - exp(nll - base_nll)): by how many % the perplexity is below the base model's.
    nll, base_nll: mean loss per token in nats, of one shape. DynaMiCS' metric."""
    return 100 * (1 - np.exp(np.asarray(nll, dtype=np.float64) - base_nll))


def bootstrap_ratios(sums: list, weights: list, clusters: list, seed: int = 0) -> np.ndarray:
    """Bootstrap of Σ sums / Σ weights, rows drawn with replacement by cluster -> (S, M) float64.
    sums, weights (M, n): numerator and weight of a row (loss and tokens; correct and 1). clusters
    (n,): labels; the turns of a dialogue stay together. All models see the same draws, so
    differences of columns are paired. Not in the papers."""
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    rng, groups = data.data_rng(seed, "bootstrap"), cluster.max() + 1
    totals = np.array([np.bincount(cluster, row, groups) for row in (*sums, *weights)])
    totals = totals.reshape(2, len(sums), groups)
    draws = (rng.integers(0, groups, groups) for _ in range(SAMPLES))
    return np.array([np.divide(*totals[:, :, drawn].sum(-1)) for drawn in draws])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap values (S,) -> (low, high)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was seen in `count` independent cases -> (low, high):
    0 of 4 is [0, 0.49], where the bootstrap says [0, 0]."""
    shrink = 1 / (1 + Z**2 / count)
    middle = (share + Z**2 / (2 * count)) * shrink
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) * shrink
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def counts_rights(rows: dict) -> bool:
    """Whether all that rows hold was right or wrong."""
    return all(total == int(total) and 0 <= total <= most for total, most, _ in rows.values())


def confidence(rows: dict, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a number -> (low, high). Wilson's where rows are right or wrong (a row that
    was asked in several rounds is still one case), and where all rows are; the bootstrap else."""
    sums, weights, clusters = zip(*rows.values())
    share = sum(sums) / sum(weights)
    if counts_rights(rows) and (len(set(weights)) == 1 or share in (0, 1)):
        return wilson(share, len(set(clusters)))
    return interval(bootstrap_ratios([sums], [weights], clusters, seed=seed)[:, 0])


def difference(metric: str, rows: dict, other: dict, seed: int) -> dict[str, float]:
    """metric_diff with its paired interval over the rows that both models have; for nll also
    ppl_reduction in %. Losses per token under different tokenizers are not compared: -> {}."""
    keys = [key for key in rows if key in other]
    if not keys or (metric == "nll" and any(rows[key][1] != other[key][1] for key in keys)):
        return {}
    pairs = np.array([(rows[key][:2], other[key][:2]) for key in keys], dtype=np.float64)
    sums, weights = pairs.T.copy()  # (2, n) each
    clusters = [rows[key][2] for key in keys]
    own, base = bootstrap_ratios(sums, weights, clusters, seed=seed).T
    value, base_value = sums.sum(-1) / weights.sum(-1)
    low, high = interval(own - base)
    if low == high and counts_rights(rows) and counts_rights(other):
        # no row differs from the others: as many as Wilson allows for 0 of n still may
        room = wilson(0.0, len(set(clusters)))[1]
        low, high = max(-1.0, low - room), min(1.0, high + room)
    result = {f"{metric}_diff": float(value - base_value)}
    result |= {f"{metric}_diff_low": low, f"{metric}_diff_high": high}
    if metric == "nll":
        result["ppl_reduction"] = float(perplexity_reduction(value, base_value))
        low, high = interval(perplexity_reduction(own, base))
        result |= {"ppl_reduction_low": low, "ppl_reduction_high": high}
    return result


def add_intervals(results: dict, by_row: dict, reference: str, seed: int) -> None:
    """Add 95 % intervals (<metric>_low, _high) and differences to results {model: {task: metrics}}.
    by_row: {model: {task: {metric: {row: (sum, weight, cluster)}}}}."""
    for name, tasks in by_row.items():
        for task, metrics in tasks.items():
            out, others = results[name][task], by_row.get(reference, {}).get(task, {})
            for metric, rows in metrics.items():
                out[f"{metric}_low"], out[f"{metric}_high"] = confidence(rows, seed)
                compared = difference(metric, rows, others.get(metric, {}), seed)
                if name != reference and compared:
                    out |= {"versus": reference, **compared}
