"""Progressive layer dropping: skip layers at random, more of them as training goes on.

Paper: Zhang and He 2020, "Accelerating Training of Transformer-Based Language Models with
Progressive Layer Dropping" (NeurIPS).
Idea: A pre-norm layer only adds to its input, so a model can train without it for an update. Deep
layers are dropped more often than early ones, and the rate rises quickly from none to its final
value. Evaluation uses all layers.

    theta(s) = theta_bar + (1 - theta_bar) exp(-gamma s)        s: share of the budget that is spent
    layer i of 1 ... L is dropped with probability (i / L) (1 - theta(s))

Cost: with theta at 0.5, 11.75 of BERT's 16 layers and 8.75 of T5's 12 run on average; embedding
and head cost as before, and with BERT's large batches the optimizer, too.
The study found: the worst pre-training loss of all methods in both models, and the worst downstream
scores of T5; on GLUE it is slightly ahead of the baseline at 6 and 12 hours. It helps when the
baseline overfits.
Where we differ from the release: an empty draw is drawn again (there it means all layers), and a
layer that no draw of an update kept gets no update at all (there momentum and decay go on). The
paper never drops the first layer and multiplies what a kept layer adds by 1 / its keep probability;
the study does neither, `--rescale` does the second. Where an update is one draw (T5; BERT's sizes
tiny and small) the top layer misses half of the updates.
"""

import itertools
import math

import numpy as np
import torch

from methods.baseline import STUDY_MICRO_BATCH, Method, Option

DRAWS = 0x1A7E5  # id of this random stream
# BERT draws anew for each of the study's micro-batches, T5 once an update.
ROWS_PER_DRAW = {"bert": STUDY_MICRO_BATCH["bert"]}
BRANCHES = ("attention", "cross_attention", "feed_forward")  # what a layer adds


class LayerDrop(Method):
    options = {
        "theta_bar": Option(
            0.5, "final keep rate: the top layer's keep probability", minimum=0.01, maximum=1.0
        ),
        "gamma": Option(100.0, "how fast the keep rate gets there (t5: 20)", minimum=0.0),
        "rescale": Option(False, "multiply what a kept layer adds by 1 / its keep probability"),
    }
    defaults = {"t5": {"base": dict(gamma=20.0, lr=1e-2), "tiny": dict(lr=4e-2)}}
    turned_off = {model: dict(theta_bar=1.0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.branches = []  # of all layers: lists of the modules that add to the residual stream
        for layer in self.model.layers if self.config.options["rescale"] else ():
            parts = [p for name, p in layer.named_modules() if name.split(".")[-1] in BRANCHES]
            for part in parts:  # a buffer and one hook: one compiled graph serves all layers
                keep_prob = torch.ones((), device=self.config.device)
                part.register_buffer("keep_prob", keep_prob, persistent=False)
                part.register_forward_hook(rescale)
            self.branches.append(parts)

    def keep_probs(self):
        """Of all layers that the model has, now: (L,) float64."""
        theta_bar, gamma = self.config.options["theta_bar"], self.config.options["gamma"]
        theta = theta_bar + (1 - theta_bar) * math.exp(-gamma * self.clock.progress)
        layers = len(self.model.present_layers)
        return 1 - np.arange(1, layers + 1) / layers * (1 - theta)

    def groups(self, positions):
        keep_probs = self.keep_probs()
        self.set_branches(keep_probs)
        draws = math.ceil(len(positions) / ROWS_PER_DRAW.get(self.config.model, len(positions)))
        layers = [self.draw(number, keep_probs) for number in range(draws)]
        self.mean_layers = sum(map(len, layers)) / draws
        return list(zip(np.array_split(positions, draws), layers))

    def draw(self, number, keep_probs):
        """The layers that one group of rows trains. An empty draw is drawn again."""
        places = np.arange(len(keep_probs))
        for attempt in itertools.count():
            uniform = self.corpus.uniform(DRAWS, self.clock.updates, number, attempt, places)
            if (kept := uniform < keep_probs).any():
                return [self.model.present_layers[place] for place in places[kept]]

    def after_step(self):
        self.set_branches(np.ones(len(self.model.layers)))  # other passes see the model as it is

    def set_branches(self, keep_probs):
        for keep_prob, parts in zip(keep_probs, self.branches):
            for part in parts:
                part.keep_prob.fill_(keep_prob)

    def report(self):
        return {"layers": self.mean_layers}


def rescale(branch, inputs, output):
    """A forward hook. Passes without gradients, which validate and score rows, see the model as it
    is."""
    return output / branch.keep_prob if torch.is_grad_enabled() else output
