"""Sophia-G: momentum divided by a running estimate of the curvature, and clipped.

Paper: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training" (arXiv 2305.14342), algorithms 2 and 3.
Idea: Weights with little curvature can move further. The diagonal of the Gauss-Newton matrix is
estimated every few updates by a backward pass with labels drawn from the model's own predictions.
Where the estimate is small or out of date, the clipping makes the step that of a sign momentum.

    m <- beta1 m + (1 - beta1) g
    theta <- theta (1 - lr weight_decay) - lr clip(m / (rho h + eps), -1, 1)
    every `hessian_interval` updates:
        draw labels y ~ softmax(logits) for the B predicted tokens
        g^ = gradient of the mean cross-entropy to y, clipped to a norm of `hessian_clip`
        h <- beta2 h + (1 - beta2) B (g^)^2

Cost: a forward and backward pass of half a batch (BERT) or of a batch (T5) every ten updates: 5%
and 10%.
The study found: downstream about the baseline's scores, even with the Hessian passes free.
Where we differ from the release: its BERT draws labels from the encoder's hidden states, keeps only
the last of six Hessian micro-batches, does not clip g^, and refreshes before updates 0, 10, 20 etc.
Both its models have a constant in place of B: 196,608 for BERT, whose gradient is a mean over
16,384 positions, and 5,120 for T5, with 16,416 labels. Only rho B matters, so the study's rho of
0.01 is 0.01 x 196,608 / 16,384 = 0.12 here for BERT, and 0.0031 for T5; the default is the paper's
0.05. The log's win rate (the share of weights whose step is not clipped) should lie between 0.1 and
0.5. The passes take rows from a stream of their own. T5's step is scaled with each tensor's RMS,
its decay is not. fp16, in which the study's BERT runs ended in NaN, is refused.
"""

import functools

import numpy as np
import torch

from errors import UserError
from methods.baseline import FREE_EXTRA_PASSES, SECOND_STREAM, Method, Option
from optimizers import RuleOptimizer, parameter_groups

LABELS = 0x50F1A  # id of this random stream
ROWS_SHARE = {"bert": 0.5, "t5": 1.0}  # of the batch, in a Hessian pass (the study)


def sophia_update(weight, gradient, state, lr, scale, weight_decay, beta1, clip_threshold, eps):
    """One step, in place."""
    momentum, hessian = state["momentum"], state["hessian"]
    momentum.lerp_(gradient, 1 - beta1)
    step = (momentum / (hessian * clip_threshold).add_(eps)).clamp_(-1, 1)
    weight.mul_(1 - lr * weight_decay).sub_(step.mul_(lr * scale))


def new_state(weight):
    return {"momentum": torch.zeros_like(weight), "hessian": torch.zeros_like(weight)}


def sample_labels(logits, uniform):
    """A label from each softmax: logits (B, P, V), uniform numbers (B, P) in [0, 1) -> (B, P)."""
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    # The threshold is above 0: no label without probability.
    threshold = (1 - uniform).to(cumulative)[..., None] * cumulative[..., -1:]
    labels = torch.searchsorted(cumulative, threshold).squeeze(-1)
    return labels.clamp(max=logits.shape[-1] - 1)  # of NaN: the loss is NaN, too, and is noticed


def hessian_estimate(gradients, label_tokens, clip):
    """The Gauss-Newton-Bartlett estimate B g^2 of the mean gradient, clipped to a norm (0: not)."""
    factor = 1.0
    if clip:
        factor = (clip / (torch.nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
    return [(gradient * factor).square() * label_tokens for gradient in gradients]


class Sophia(Method):
    options = {
        "clip_threshold": Option(0.05, "rho: larger means fewer clipped steps", minimum=0.0),
        "hessian_interval": Option(10, "updates from one Hessian pass to the next", minimum=1),
        "hessian_batch": Option(
            0, "rows of a Hessian pass (0: bert half a batch, t5 a batch)", minimum=0
        ),
        "hessian_clip": Option(
            1.0, "norm its gradient is clipped to (0: no clipping)", minimum=0.0
        ),
        **FREE_EXTRA_PASSES,
    }
    dtypes = ("fp32", "bf16")
    recipe = dict(beta1=0.965, beta2=0.99, eps=1e-15)
    defaults = {
        "bert": {"base": dict(lr=4e-4, weight_decay=0.015, **recipe), "tiny": dict(lr=5e-4)},
        "t5": {"base": dict(lr=1e-3, weight_decay=0.0, **recipe), "tiny": dict(lr=5e-3)},
    }

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.win_rate = None  # of the last Hessian pass, in its update only
        rows = round(ROWS_SHARE[self.config.model] * self.config.batch)
        self.rows = self.config.options["hessian_batch"] or max(1, rows)

    def optimizer(self):
        config, clip_threshold = self.config, self.config.options["clip_threshold"]
        constants = dict(beta1=config.beta1, clip_threshold=clip_threshold, eps=config.eps)
        rule = functools.partial(sophia_update, **constants)
        groups = parameter_groups(self.model, config.weight_decay)
        return RuleOptimizer(groups, config.lr, rule, new_state, config.rms_scaling, config.compile)

    def warm_up(self):  # a whole pass: its last micro-batch may have a shape of its own
        self.mean_gradients(np.arange(self.rows), SECOND_STREAM, self.sampled_loss)

    def after_step(self):
        self.win_rate = None
        if (self.clock.updates + 1) % self.config.options["hessian_interval"] == 0:
            with self.extra_pass():
                self.refresh_hessian()

    def sampled_loss(self, batch, rows):
        """Mean cross-entropy to labels that are drawn from the model's own predictions."""
        logits = self.model.logits(batch)
        columns = torch.arange(logits.shape[1], device=logits.device)
        positions = self.corpus.to_device(rows)[:, None]
        labels = sample_labels(logits.detach(), self.corpus.uniform(LABELS, positions, columns))
        self.label_tokens = self.rows * labels.shape[1]
        return self.model.cross_entropy(logits, labels)

    @torch.no_grad()
    def refresh_hessian(self):
        """Moves h towards a new estimate, and counts the weights whose next step is not clipped."""
        options, state = self.config.options, self.combination.optimizer_in_use.state
        positions = self.corpus.draw(self.rows, SECOND_STREAM)
        with torch.enable_grad():
            gradients = self.mean_gradients(positions, SECOND_STREAM, self.sampled_loss)
        estimates = hessian_estimate(
            list(gradients.values()), self.label_tokens, options["hessian_clip"]
        )
        won, weights = 0, 0
        for parameter, estimate in zip(gradients, estimates):
            if parameter in state:  # else it was not updated yet
                hessian, momentum = state[parameter]["hessian"], state[parameter]["momentum"]
                hessian.lerp_(estimate, 1 - self.config.beta2)
                won += (momentum.abs() < options["clip_threshold"] * hessian).sum()
                weights += momentum.numel()
        finite = torch.stack([estimate.isfinite().all() for estimate in estimates]).all()
        won, finite = torch.stack([won, finite]).tolist()  # waits for the device, once
        self.win_rate = won / weights
        if not finite:
            update = self.clock.updates + 1
            raise UserError(f"the Hessian pass after update {update} is not finite; lower --lr")

    def report(self):
        return {} if self.win_rate is None else {"win_rate": self.win_rate}
