"""Ranking metrics by enumeration, float64, straight from their definitions."""

import itertools
import math


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def auc(logits, labels, weights):
    """Share of (positive, negative) pairs in the right order, ties one half."""
    right = total = 0.0
    for x, y, w in zip(logits, labels, weights):
        for x2, y2, w2 in zip(logits, labels, weights):
            if y == 1 and y2 == 0:
                total += w * w2
                right += w * w2 * (1.0 if x > x2 else 0.5 if x == x2 else 0.0)
    return right / total


def rankings(logits, labels):
    """Labels from best to worst, in every order that the logits allow (ties permuted)."""
    for order in itertools.permutations(range(len(logits))):
        ranked = [logits[i] for i in order]
        if ranked == sorted(ranked, reverse=True):
            yield [labels[i] for i in order]


def mrr(logits, labels):
    """Mean over the allowed rankings of 1 / rank of the first positive."""
    values = [1 / (1 + ranked.index(1)) for ranked in rankings(logits, labels)]
    return sum(values) / len(values)


def ndcg(logits, labels, k):
    """Mean over the allowed rankings of DCG@k / ideal DCG@k."""

    def dcg(ranked):
        return sum(y / math.log2(rank + 2) for rank, y in enumerate(ranked[:k]))

    values = [dcg(ranked) for ranked in rankings(logits, labels)]
    return sum(values) / len(values) / dcg(sorted(labels, reverse=True))
