"""LAWA: evaluate the average of the latest weights.

Paper: Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
Weight Averaging" (arXiv 2209.14981); on spacing and rates, Sanyal et al. 2023 (arXiv 2306.03241).
Idea: Late in training the weights circle around a better place. The mean of a few past copies is
nearer to it. Training is not touched.

    whenever another `interval` of the budget is spent: add a copy of the weights to a queue of k
    validate and save the mean of the queue; the current weights until it is full

Cost: 1.00, and k copies of the weights in memory and in every checkpoint (base: BERT 0.48 GB each,
T5 0.99 GB).
Finding: not in the study. Kaddour: RoBERTa-base on WikiText-103 reaches its intermediate losses
some 30 GPU hours earlier. With a rate that ends at 0 there is little left to average away: a fair
test has a higher rate or less decay (lawa+wsd --cool_down=0).
Where we differ: copies are spaced by the budget, not by epochs, over 1% of it by default (Ajroldi
et al. 2025 find that near the best). The queue is emptied when the model grows.
"""

import collections

import torch

from methods.baseline import Method, Option


class LAWA(Method):
    options = {
        "copies": Option(
            5, "copies of the weights to average (0: evaluate the current ones)", minimum=0
        ),
        "interval": Option(
            0.002, "share of the budget from one copy to the next", minimum=1e-6, maximum=1.0
        ),
    }
    turned_off = {model: dict(copies=0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.queue = collections.deque(maxlen=self.config.options["copies"])  # lists of tensors
        self.intervals, self.depth = 0, None  # that are over; layers of the queue's copies

    def begin_update(self):
        self.copy_when_due()

    def copy_when_due(self):
        if self.depth != len(self.model.present_layers):
            self.depth = len(self.model.present_layers)
            self.queue.clear()
        interval = self.config.options["interval"]
        intervals = int(self.clock.progress / interval + 1e-9)  # 0.3 / 0.1 is below 3
        if intervals > self.intervals and self.queue.maxlen:
            self.intervals = intervals
            self.queue.append([parameter.detach().clone() for parameter in self.model.parameters()])

    @torch.no_grad()
    def evaluation_weights(self):
        self.copy_when_due()  # the last one, too: no update begins after it
        if not self.queue or len(self.queue) < self.queue.maxlen:
            return {}
        # Summed anew each time: a running sum would drift, and a resumed run with it.
        means = (torch.stack(copies).mean(dim=0) for copies in zip(*self.queue))
        return dict(zip(self.model.parameters(), means))

    def state_dict(self):
        return {"queue": list(self.queue), "intervals": self.intervals, "depth": self.depth}

    def load_state_dict(self, state):
        self.queue.extend(state["queue"])
        self.intervals, self.depth = state["intervals"], state["depth"]
