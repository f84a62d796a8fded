"""Progressive layer dropping: skip layers at random, more of them as training goes on.

Paper: Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with Progressive Layer
Dropping" (NeurIPS).
Idea: A pre-norm layer only adds to its input, so a model can train without it for an update. Deep layers are
dropped more often than early ones, and the rate rises quickly from none to its final value. Evaluation uses all
layers.

    theta(s) = theta_bar + (1 - theta_bar) exp(-gamma s)          s: share of the budget that is spent
    layer i of 1 ... L is dropped with probability (i / L) (1 - theta(s))

Cost: with theta at 0.5, 11.75 of BERT's 16 layers and 8.75 of T5's 12 run on average; embedding, head and optimizer
cost as before.
The study found: the worst pre-training loss of all methods in both models, and the worst downstream scores of T5;
on GLUE it is slightly ahead of the baseline at 6 and 12 hours. It helps when the baseline overfits.
Where we differ from the release: an empty draw is drawn again (there it means all layers), and a layer that no draw
of an update kept gets no update at all (there momentum and decay go on). The paper never drops the first layer and
multiplies what a kept layer adds by 1 / its keep probability; the study does neither, `--rescale` does the second.
"""

import itertools
import math

import numpy as np
import torch

from methods.baseline import Method, Option

DRAWS = 0x1A7E5  # of the hash: these numbers are nobody else's


class LayerDrop(Method):
    options = {
        "theta_bar": Option(0.5, "final keep rate: the top layer's keep probability", minimum=0.0, maximum=1.0),
        "gamma": Option(100.0, "how fast it is reached (t5: 20)", minimum=0.0),
        "rescale": Option(False, "multiply what a kept layer adds by 1 / its keep probability"),
    }
    defaults = {"t5": {"base": dict(gamma=20.0, lr=1e-2), "tiny": dict(lr=2e-2, theta_bar=0.9)}}
    # BERT draws anew for each of the study's micro-batches, 12 an update; T5 once an update.
    rows_per_draw = {"bert": 128}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.branches = []  # of all layers: lists of the modules that add to the residual stream
        if self.config.options["rescale"]:
            for layer in self.model.layers:
                named = [(name.split(".")[-1], part) for name, part in layer.named_modules()]
                self.branches.append([part for name, part in named if name in ("attention", "cross_attention", "feed_forward")])
            for part in itertools.chain(*self.branches):
                # A buffer, and the same hook everywhere, so that one compiled graph serves all layers and updates.
                part.register_buffer("keep_prob", torch.ones((), device=self.config.device), persistent=False)
                part.register_forward_hook(rescale)

    def keep_probs(self):
        """Of all layers, now: (L,) float64."""
        theta_bar, gamma = self.config.options["theta_bar"], self.config.options["gamma"]
        theta = theta_bar + (1 - theta_bar) * math.exp(-gamma * self.clock.progress)
        layers = len(self.model.layers)
        return 1 - np.arange(1, layers + 1) / layers * (1 - theta)

    def active_layers(self, draw):
        keep_probs = self.keep_probs()
        if draw == 0:
            self.set_branches(keep_probs)
        layers, attempt = np.arange(len(keep_probs)), 0
        while True:
            kept = self.corpus.uniform(DRAWS, self.clock.updates, draw, attempt, layers) < keep_probs
            if kept.any():
                return layers[kept].tolist()
            attempt += 1

    def after_step(self):
        self.set_branches(np.ones(len(self.model.layers)))  # other passes see the model as it is

    def set_branches(self, keep_probs):
        for keep_prob, parts in zip(keep_probs, self.branches):
            for part in parts:
                part.keep_prob.fill_(keep_prob)


def rescale(branch, inputs, output):
    """A forward hook. Passes without gradients, which validate and score rows, see the model as it is."""
    return output / branch.keep_prob if torch.is_grad_enabled() else output
