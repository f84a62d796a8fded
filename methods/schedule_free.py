"""Schedule-free AdamW: an average of the weights in place of momentum and of a decaying rate.

Paper: Defazio et al. 2024, "The Road Less Scheduled" (NeurIPS, arXiv 2405.15682).
Idea: Gradients are taken at y, between fast weights z and their running average x; x is what is
evaluated. At any time the average does what a decaying rate would, so the run's length need not be
known.

    v <- beta2 v + (1 - beta2) g^2;    d = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y
    z <- z - lr d;    c = lr_max^2 / (sum of lr_max^2)
    x <- (1 - c) x + c z;    y <- (1 - beta1) z + beta1 x

y is the parameter and z its state; x = y + (1 - 1 / beta1) (z - y) is made when it is needed.

Cost: about AdamW's step, and its memory.
Finding: not in the study. It won the self-tuning track of AlgoPerf 2024. Its rate, decay and beta1
must be tuned to match a schedule, says its README: rates of 1 to 10 times AdamW's, beta1 0.9, 0.95
to 0.98 for very long runs.
Where we differ: the count of updates and the sum of weights are each parameter's own, because a
layer that stacking adds begins its average when it comes. With T5, lr d is scaled by the RMS of y.
beta2 of BERT and the rates of base are guesses from the baseline's.
"""

import functools

import torch

from errors import UserError
from methods.baseline import Method, Option
from optimizers import RuleOptimizer, parameter_groups


def schedule_free_update(y, gradient, state, lr, scale, weight_decay, beta1, beta2, eps):
    """One step, in place."""
    z, v, t = state["z"], state["v"], state["step"]
    t += 1
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    step = gradient / (v / (1 - beta2**t)).sqrt().add_(eps) + weight_decay * y
    step *= lr * scale
    state["lr_max"].clamp_(min=lr)
    weight = state["lr_max"] ** 2
    state["weight_sum"] += weight
    c = (weight / state["weight_sum"]).nan_to_num()  # 0 / 0 while the rate is 0
    # The docstring's new y, with x eliminated: y <- y + c (z - y) - (1 - beta1 (1 - c)) lr d.
    y.add_(c * (z - y)).add_((beta1 * (1 - c) - 1) * step)
    z.sub_(step)


def new_state(y):
    zeros = functools.partial(torch.zeros, (), device=y.device)
    return {
        "z": y.clone(),
        "v": torch.zeros_like(y),
        "step": zeros(dtype=torch.float64),
        "lr_max": zeros(),
        "weight_sum": zeros(),
    }


class ScheduleFree(Method):
    options = {
        "warm_up": Option(
            0.05, "share of the budget in which the rate rises", minimum=0.0, maximum=1.0
        )
    }
    defaults = {
        "bert": {"base": dict(lr=2e-3, beta1=0.9, beta2=0.98), "tiny": dict(lr=4e-3)},
        "t5": {"base": dict(lr=4e-2, beta1=0.9, beta2=0.999), "tiny": dict(lr=8e-2)},
    }

    def schedule(self, progress):
        warm_up = self.config.options["warm_up"]
        return progress / warm_up if progress < warm_up else 1.0

    def optimizer(self):
        config = self.config
        if not config.beta1:
            raise UserError("--beta1=0: schedule_free needs a value above 0")
        constants = dict(beta1=config.beta1, beta2=config.beta2, eps=config.eps)
        return RuleOptimizer(
            parameter_groups(self.model, config.weight_decay),
            config.lr,
            functools.partial(schedule_free_update, **constants),
            new_state,
            config.rms_scaling,
            config.compile,
        )

    @torch.no_grad()
    def evaluation_weights(self):
        """x, in a copy: going from y to x and back would change y by its rounding."""
        return {
            y: y + (1 - 1 / self.config.beta1) * (state["z"] - y)
            for y, state in self.combination.optimizer_in_use.state.items()
        }
