"""Selective backprop: train on the rows that the model finds hard.

Paper: Jiang et al. 2019, "Accelerating Deep Learning by Focusing on the Biggest Losers" (arXiv
1910.00762).
Idea: A forward pass, a third of an update's cost, scores candidate rows. A row is trained on with a
probability that rises with its loss's rank among recent losses. The others are gone for good.

    for groups of candidates from the stream, until `batch` rows wait:
        losses of the group, without gradients; they join the history of the last `loss_history`
        P = percentile of a row's loss in the history (mean 1/2)
        the row waits for training, with the mask that it was scored with, with probability P^beta
    train on the oldest `batch` that wait; the others wait on

Cost: 1 + beta candidates for every row that is trained on: with beta 1 about 1 + 2/3 of an update.
The study found: no gain in validation loss on three data sets (beta 1, the best of 1, 2 and 3).
Where we differ from the release: the scoring pass predicts the masked positions only (there all of
them: 1.82 updates in place of 1.67), and T5 can use it, too. The original's history has 1,024
losses, its exponent is 3, and its first pass over the data trains on every row.
"""

import math

import numpy as np

from methods.baseline import FREE_EXTRA_PASSES, STUDY_MICRO_BATCH, Method, Option

ACCEPTANCE = 0x5E1EC7  # id of this random stream


def percentiles(losses, history):
    """The share of the history that lies at or below each loss, equal ones counted by their mean
    rank: (N,) in (0, 1]. The losses are part of the history."""
    history = np.sort(history)
    below = np.searchsorted(history, losses, "left")
    up_to = np.searchsorted(history, losses, "right")
    return (below + up_to + 1) / (2 * len(history))


class SelectiveBackprop(Method):
    options = {
        "beta": Option(1.0, "exponent of the percentile; 1 / (1 + beta) are accepted", minimum=0.0),
        "loss_history": Option(5000, "losses to rank among (smaller models: fewer)", minimum=1),
        "selection_batch": Option(
            STUDY_MICRO_BATCH["bert"], "rows ranked together, at most a batch (t5: 72)", minimum=1
        ),
        **FREE_EXTRA_PASSES,
    }
    # With small batches 5,000 losses would be hundreds of updates old. At every size the history
    # spans as many batches as at base (3.3 of BERT's, as in the study; 35 of T5's).
    defaults = {
        "bert": {size: dict(loss_history=104) for size in ("small", "tiny")},
        "t5": {
            "base": dict(selection_batch=STUDY_MICRO_BATCH["t5"]),
            **{size: dict(loss_history=555) for size in ("small", "tiny")},
        },
    }
    turned_off = {model: dict(beta=0.0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.history, self.waiting = np.empty(0), np.empty(0, np.int64)  # losses; stream positions
        self.candidates, self.accepted = 0, 0  # of the last update
        self.group = min(self.config.options["selection_batch"], self.config.batch)  # rows

    def warm_up(self):  # each number of groups may leave a last part of another size
        most = math.ceil(self.config.batch / self.group) if self.config.compile else 1
        for groups in range(1, most + 1):
            self.row_losses(np.arange(groups * self.group))

    def next_batch(self):
        self.candidates = self.accepted = 0
        while (missing := self.config.batch - len(self.waiting)) > 0:
            groups = math.ceil(missing / self.group)
            positions = self.corpus.draw(groups * self.group)
            with self.extra_pass():
                losses = self.row_losses(positions)
            for group in zip(np.split(positions, groups), np.split(losses, groups)):
                self.select(*group)
        chosen, self.waiting = np.split(self.waiting, [self.config.batch])
        return chosen

    def select(self, positions, losses):
        """Lets some rows of a group wait for training."""
        kept = max(self.config.options["loss_history"], len(losses))  # a group is ranked whole
        self.history = np.concatenate([self.history, losses])[-kept:]
        probability = percentiles(losses, self.history) ** self.config.options["beta"]
        accepted = positions[self.corpus.uniform(ACCEPTANCE, positions) < probability]
        self.waiting = np.concatenate([self.waiting, accepted])
        self.candidates += len(positions)
        self.accepted += len(accepted)

    def report(self):
        return dict(candidates=self.candidates, accepted=self.accepted, waiting=len(self.waiting))

    def state_dict(self):
        return {"history": self.history.tolist(), "waiting": self.waiting.tolist()}

    def load_state_dict(self, state):
        self.history = np.array(state["history"])
        self.waiting = np.array(state["waiting"], np.int64)
