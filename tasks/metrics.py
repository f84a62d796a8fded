"""Scores of predictions against the truth, from 0 (or -1) to 1.

Where a score is undefined, because all predictions or all truths are the same, it is 0: a model
that always answers the same has learnt nothing. (scikit-learn agrees for F1 and Matthews; scipy
gives nan for the correlations.)
"""

import numpy as np

from errors import UserError


def accuracy(predictions, truths):
    """Share of equal ones."""
    return float(np.mean(np.asarray(predictions) == np.asarray(truths)))


def f1(predictions, truths, positive=1):
    """2 TP / (2 TP + FP + FN) of the class `positive`; 0 if it is neither predicted nor there."""
    predicted, true = np.asarray(predictions) == positive, np.asarray(truths) == positive
    counted = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / counted) if counted else 0.0


def macro_f1(predictions, truths):
    """The mean F1 over the classes that occur, predicted or true."""
    classes = np.union1d(predictions, truths)
    return float(np.mean([f1(predictions, truths, label) for label in classes]))


def matthews(predictions, truths):
    """Matthews correlation of two classes (Matthews 1975): Pearson's of the two 0/1 vectors."""
    return pearson(predictions, truths)


def pearson(predictions, truths):
    """Pearson's correlation; 0 if one side is constant."""
    x, y = np.asarray(predictions, np.float64), np.asarray(truths, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def ranks(values):
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(predictions, truths):
    """Spearman's correlation: Pearson's of the ranks."""
    return pearson(ranks(predictions), ranks(truths))


def exact_match(predictions, truths, groups):
    """Share of the groups (MultiRC's questions) in which every prediction is right."""
    right = {}
    for prediction, truth, group in zip(predictions, truths, groups):
        right[group] = right.get(group, True) and prediction == truth
    return sum(right.values()) / len(right)


def rouge_l(predictions, references):
    """Rouge-L's F-measure of each text against its best reference (Lin 2004), after Porter's
    stemmer; the mean.

    Args:
        predictions: texts.
        references: for each a text, or several of which the best counts.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("Rouge-L needs one more package: pip install rouge-score") from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = []
    for text, several in zip(predictions, references):
        several = [several] if isinstance(several, str) else several
        best.append(max(scorer.score(one, text)["rougeL"].fmeasure for one in several))
    return float(np.mean(best))
