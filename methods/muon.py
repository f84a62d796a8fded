"""Muon: a momentum whose every matrix is replaced by the nearest orthogonal one.

Paper: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(kellerjordan.github.io/posts/muon); the scale of the step is Liu et al. 2025, "Muon is Scalable for
LLM Training" (arXiv 2502.16982).
Idea: The update of a weight matrix is dominated by few directions. Once it is orthogonal, all of
its directions are equally long, and rare ones are learnt, too. Five Newton-Schulz steps, matrix
products only, come close enough.

    B <- mu B + (1 - mu) g;    U = mu B + (1 - mu) g                   (Nesterov)
    X = U / |U|;    5 times: A = X X^T;    X <- a X + (b A + c A^2) X
    theta <- theta (1 - lr weight_decay) - lr 0.2 sqrt(max(rows, columns)) X

The factor makes a step as long as AdamW's (RMS 0.2 lr), so that AdamW's rate and decay serve. All
parameters but the layers' matrices are the baseline's.

Cost: at most 5 m / B of a matrix's own products, with m its smaller side and B an update's tokens:
2% of an update of BERT and 7% of T5's at base, but 125% at 256 x 256 and 1,024 tokens. One moment.
Finding: not in the study. Jordan: GPT-2 small to a given loss 1.35 times as fast. Wen et al. 2025
("Fantastic Pretraining Optimizers and Where to Find Them"), against tuned baselines: 1.4 times at
0.1 B parameters, 1.1 at 1.2 B.
Where we differ: T5's step is also scaled by the matrix's RMS, as its baseline's (queries start 8
times smaller than keys); that is untested elsewhere. BERT's d x d head is left to AdamW.
"""

import torch

from methods.baseline import Method, Option
from optimizers import JoinedOptimizer, hidden_matrices, parameter_groups, rms_scale

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c: singular values end between about 0.7 and 1.2
STEPS = 5
CHOICES = ("all", "attention", "feed_forward", "none")


def orthogonalise(matrices, dtype):
    """The nearest orthogonal matrices, nearly: (N, rows, columns) -> the same shape, in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def fast_dtype(device):
    """bf16; on a CPU, where that can be slower, fp32. (fp16's range is too small.)"""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class MuonOptimizer(torch.optim.Optimizer):
    """Muon for matrices; equal shapes are made orthogonal together."""

    def __init__(self, matrices, lr, weight_decay, momentum, rms_scaling):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.rms_scaling = rms_scaling

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        by_shape = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), matrices in by_shape.items():
            updates = torch.stack([self.nesterov(matrix, group["momentum"]) for matrix in matrices])
            updates = orthogonalise(updates, fast_dtype(updates.device)).to(updates.dtype)
            size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for matrix, update in zip(matrices, updates):
                scale = rms_scale(matrix) if self.rms_scaling else 1.0
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * (size * scale))

    def nesterov(self, matrix, momentum):
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["momentum"], momentum)


class Muon(Method):
    options = {
        "matrices": Option("all", "which matrices of the layers Muon updates", CHOICES),
        "momentum": Option(0.95, "mu, the momentum's decay", minimum=0.0, maximum=1.0),
    }
    defaults = {"t5": {"tiny": dict(lr=4e-2)}}
    turned_off = {model: dict(matrices="none") for model in ("bert", "t5")}

    def optimizer(self):
        config, part = self.config, self.config.options["matrices"]
        hidden = hidden_matrices(self.model).items()
        matrices = [matrix for name, matrix in hidden if part == "all" or part in name]
        others = self.adamw(parameter_groups(self.model, config.weight_decay, without=matrices))
        if not matrices:
            return others
        recipe = (config.lr, config.weight_decay, config.options["momentum"], config.rms_scaling)
        return JoinedOptimizer(MuonOptimizer(matrices, *recipe), others)
