"""Layer stacking: train a shallow model, copy its layers on top of themselves, go on.

Paper: Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking" (ICML).
Idea: Layers of a trained Transformer resemble each other, so a model of twice the depth that starts
from two copies of a shallow one begins ahead of one with random weights. Early updates of a shallow
model are also cheaper. Here the depth doubles twice: 4, 8, 16 layers of BERT, 3, 6, 12 of T5's two
stacks.

    depth = L / 2^(growths to come)
    when the share of the budget that is spent reaches the next of `growth_times`:
        for i < depth: the weights of layer depth + i become those of layer i
        depth = 2 depth

Cost: an update costs what its depth costs, so a budget buys more updates; the copying itself is
charged and small.
The study found: the lowest pre-training losses of all methods at short budgets, for both models;
the gap to the baseline is nearly closed at 24 hours, and downstream it is ahead at some budgets
only.
Where we differ from the release: growth happens before an update's first pass, never between its
micro-batches, and is charged. `--optimizer_state`:
    keep    the old layers' moments stay, the new ones start without any; what the release does
    reset   all moments start anew; the paper's, and what the release's configuration asks for
    copy    the new layers also get the moments of the layers that they copy
"""

import copy

import torch

from errors import UserError
from methods.baseline import Method, Option


class Stacking(Method):
    options = {
        "growth_times": Option(
            "0.125,0.3", "shares of the budget at which the depth doubles; empty: never"
        ),
        "optimizer_state": Option("keep", "what growth does to it", ("keep", "reset", "copy")),
    }
    defaults = {"t5": {"tiny": dict(lr=4e-2)}}
    turned_off = {model: dict(growth_times="") for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        text, layers = self.config.options["growth_times"], len(self.model.layers)
        try:
            self.times = [float(part) for part in text.split(",")] if text else []
        except ValueError:
            raise UserError(
                f"--growth_times={text}: expected shares of the budget, as 0.125,0.3"
            ) from None
        if any(not 0 < time < 1 for time in self.times) or sorted(set(self.times)) != self.times:
            raise UserError(f"--growth_times={text}: expected rising numbers between 0 and 1")
        if layers % 2 ** len(self.times):
            raise UserError(
                f"--growth_times={text}: {layers} layers cannot be halved {len(self.times)} time(s)"
            )
        self.grown = 0  # how often

    @property
    def depth(self):
        return len(self.model.layers) // 2 ** (len(self.times) - self.grown)

    def layers(self):
        return list(range(self.depth))

    def begin_update(self):
        while self.grown < len(self.times) and self.clock.progress >= self.times[self.grown]:
            self.grow()

    @torch.no_grad()
    def grow(self):
        """Doubles the depth."""
        state, depth = self.combination.optimizer_in_use.state, self.depth
        if self.config.options["optimizer_state"] == "reset":
            state.clear()
        for index in range(depth):
            old, new = self.model.layers[index], self.model.layers[depth + index]
            for source, target in zip(old.parameters(), new.parameters()):
                target.copy_(source)
                if self.config.options["optimizer_state"] == "copy" and source in state:
                    state[target] = copy.deepcopy(state[source])
        self.grown += 1

    def report(self):
        return {"layers": self.depth}

    def state_dict(self):
        return {"grown": self.grown}

    def load_state_dict(self, state):
        self.grown = state["grown"]
