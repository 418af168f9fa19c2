"""The area under the ROC curve: how well a number tells two classes apart; 0.5 is not at all."""

from __future__ import annotations

from collections.abc import Sequence


def area(negatives: Sequence[float], positives: Sequence[float]) -> float:
    """Of one of each class, the probability that the positive's number is larger; ties half."""
    pairs = sorted([(x, 0) for x in negatives] + [(x, 1) for x in positives])
    rank_sum, i = 0.0, 0
    while i < len(pairs):
        j = i
        while j < len(pairs) and pairs[j][0] == pairs[i][0]:
            j += 1
        rank_sum += (i + j + 1) / 2 * sum(kind for _, kind in pairs[i:j])
        i = j
    n = len(positives)
    return (rank_sum - n * (n + 1) / 2) / (n * len(negatives))
