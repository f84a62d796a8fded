"""The baseline, and the only places where a method may differ from it.

Paper: Kaddour et al. 2023, "No Train No Gain" (arXiv 2307.06440), section 4; the recipe is that of crammed
BERT (Geiping and Goldstein 2023).
Idea: AdamW, every layer, every row once, and a learning rate that reaches zero exactly when the budget
is spent. That last part is what the study found to beat most speed-ups.
Cost: 1, by definition.
Where we differ from the release: norms, biases and the position scalar have no weight decay (there, only
the norms' biases had none).

A method is a file `methods/NAME.py` with one subclass of `Method`. It overrides a few of the places
below and sees the model, the corpus, the clock and the configuration, never the loop.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Option:
    """A flag of a method's own: its default (whose type the flag has), help, and the values it may have."""

    default: object
    help: str
    choices: tuple = ()


class Method:
    """The baseline. A method overrides what it changes, and inherits the rest.

    Class-level declarations:
        options: {flag name: Option}.
        defaults: {model: {size: {common flag: value}}}; a size that is not there has those of "base".
        draws_per_update: {model: groups of rows in an update that get their own `active_layers`}.
    """

    options = {}
    defaults = {
        "bert": {
            # METHODS 4.1: the study's recipe.
            "base": dict(
                batch=1536, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.01, clip=0.5, schedule="one_cycle"
            ),
            "small": dict(batch=32, lr=1e-3),
            "tiny": dict(batch=8, lr=2e-3),
        },
    }
    draws_per_update = {}

    def __init__(self, model, corpus, clock, config, prerequisites):
        """`config.options` holds the method's options; `prerequisites` the finished models, by name, of
        the runs that `prerequisites(config)` asked for."""
        self.model, self.corpus, self.clock, self.config = model, corpus, clock, config
        self.finished_models = prerequisites

    @classmethod
    def prerequisites(cls, config):
        """Runs that must exist first: {name: configuration, made by dataclasses.replace(config, ...)}."""
        return {}

    # The places. Each is served by the one method that overrides it.

    def optimizer(self):
        """Who updates the weights? Returns a torch optimizer; the loop sets its groups' "lr"."""
        config = self.config
        return torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def active_layers(self, draw):
        """Which layers train now? Asked at the start of an update, once for each of its groups of rows
        (`draw` counts them); the same on all processes. Growth happens in draw 0."""
        return self.evaluation_layers()

    def evaluation_layers(self):
        """Which layers does the model have now?"""
        return list(range(len(self.model.layers)))

    def next_batch(self):
        """Which rows are trained on now? Returns stream positions, any number, the same on all
        processes."""
        return self.corpus.draw(self.config.batch)

    # Not exclusive: in a combination every method's are called.

    def after_step(self):
        """What is refreshed now and then? Called after every update that was not skipped."""

    def state_dict(self):
        """What a checkpoint must hold: tensors, numbers, strings, lists and dictionaries of these."""
        return {}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave."""


def parameter_groups(model, weight_decay):
    """All parameters, once: matrices with weight decay; norms, biases and scalars without."""
    decay = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    no_decay = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def one_cycle(progress):
    """The study's BERT schedule: up to the peak at half of the budget, down to exactly 0 at its end."""
    return 2 * progress if progress < 0.5 else 2 * (1 - progress)


SCHEDULES = {"one_cycle": one_cycle}
