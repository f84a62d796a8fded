"""Lion: the sign of a momentum, and nothing else.

Paper: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675),
algorithm 2.
Idea: A search over programs found an optimizer that keeps one moment in place of AdamW's two. Every
weight moves by the same amount, up or down. So its rate is smaller than AdamW's and its weight
decay larger.

    u = sign(beta1 m + (1 - beta1) g)
    theta <- theta (1 - lr weight_decay) - lr u
    m <- beta2 m + (1 - beta2) g

Cost: about AdamW's step, with half of its state.
The study found: downstream about the baseline's scores, neither better nor worse.
Where we differ from the release: nowhere. With T5 the rate is scaled with each tensor's RMS, for
the decay, too. `--eps` has no meaning here and is refused.
"""

import functools

import torch

from errors import UserError
from methods.baseline import Method
from optimizers import RuleOptimizer, parameter_groups


def lion_update(weight, gradient, state, lr, scale, weight_decay, beta1, beta2):
    """One step, in place."""
    momentum, lr = state["momentum"], lr * scale
    update = torch.lerp(momentum, gradient, 1 - beta1).sign_()
    weight.mul_(1 - lr * weight_decay).sub_(update.mul_(lr))
    momentum.lerp_(gradient, 1 - beta2)


class Lion(Method):
    defaults = {
        "bert": {
            "base": dict(lr=7e-4, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=0.0),
            "tiny": dict(lr=6e-4),
        },
        "t5": {
            "base": dict(lr=7.5e-4, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=0.0),
            "tiny": dict(lr=3e-3),
        },
    }

    def optimizer(self):
        config = self.config
        if config.eps:
            raise UserError(f"--eps={config.eps}: lion divides by nothing, it has no eps")
        return RuleOptimizer(
            parameter_groups(self.model, config.weight_decay),
            config.lr,
            functools.partial(lion_update, beta1=config.beta1, beta2=config.beta2),
            lambda weight: {"momentum": torch.zeros_like(weight)},
            config.rms_scaling,
            config.compile,
        )
