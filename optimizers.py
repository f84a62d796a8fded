"""Optimizers as update rules: a formula for one tensor, and the class that makes it an optimizer.

What the project requires of any optimizer that a method returns:
- A parameter whose `grad` is None did not train: no momentum, no decay, no step.
- Its state may be cleared, or copied from one layer's parameters to another's (stacking), so it is
  made when a parameter is first updated, and keeps its own count of updates. It consists of
  tensors; those that are not called "step" are stored with the parameter's dtype.
- Weights and gradients are fp32 in every --dtype. In fp16 gradients are unscaled before
  `before_step`, and `step` is not called where one overflowed.
- --rms_scaling (T5) asks for steps in proportion to each tensor's RMS (`rms_scale`).
- --compile requires nothing; with it a `RuleOptimizer` compiles its rule.
"""

import functools

import torch


def parameter_groups(model, weight_decay, without=()):
    """All parameters, once: of what is outside the layers and of each layer, the matrices with
    weight decay, and the norms, biases and scalars without. `without`: parameters to leave out.

    A layer's parameters have groups of their own because layers come and go: a compiled update
    serves all.
    """
    left_out, groups = set(without), []
    layers = [list(layer.parameters()) for layer in model.layers]
    inside = {parameter for layer in layers for parameter in layer}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    for part in (outside, *layers):
        part = [parameter for parameter in part if parameter not in left_out]
        matrices = [parameter for parameter in part if parameter.dim() >= 2]
        others = [parameter for parameter in part if parameter.dim() < 2]
        groups.append({"params": matrices, "weight_decay": weight_decay})
        groups.append({"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def hidden_matrices(model):
    """{name: parameter} of the matrices inside the layers. The other matrices are BERT's
    `embedding` (its output, too) and `head.weight`, T5's `embedding`, `head.weight` and its two
    tables of relative positions; what is left are norms and BERT's position scale."""
    named = model.layers.named_parameters(prefix="layers")
    return {name: parameter for name, parameter in named if parameter.dim() == 2}


def rms_scale(weight):
    """max(1e-3, root mean square) of a tensor, 0-dim: what T5's optimizers multiply the rate with
    (nanoT5; Adafactor's relative step, Shazeer and Stern 2018)."""
    return (weight.norm() / weight.numel() ** 0.5).clamp(min=1e-3)


class RuleOptimizer(torch.optim.Optimizer):
    """A torch optimizer made of an update rule for one tensor.

        rule(weight, gradient, state, lr, scale, weight_decay)        all in place

    Args:
        groups: parameter groups, as `parameter_groups` makes them.
        lr: the peak rate; the loop sets what is in force.
        rule: the function. Its `scale` is `rms_scale(weight)` with RMS scaling, else 1.
        new_state: weight -> the dictionary of tensors that its state begins with.
        rms_scaling: whether steps are in proportion to each tensor's RMS (T5).
        compile: compile the rule, here and now, a graph for a group: in it the rule is one pass
            over memory.
    """

    def __init__(self, groups, lr, rule, new_state, rms_scaling=False, compile=False):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))
        self.rule, self.new_state = rule, new_state
        self.rms_scaling, self.compile = rms_scaling, compile
        if compile:
            self.update = torch.compile(self.update, dynamic=False)
            for group in self.param_groups:
                weights = [torch.zeros_like(parameter) for parameter in group["params"]]
                gradients = [torch.zeros_like(weight) for weight in weights]
                states = [new_state(weight) for weight in weights]
                self.call_update(weights, gradients, states, 0.0, group["weight_decay"])

    def update(self, weights, gradients, states, lr, weight_decay):
        """Applies the rule to tensors of one group."""
        for weight, gradient, state in zip(weights, gradients, states):
            scale = rms_scale(weight) if self.rms_scaling else 1.0
            self.rule(weight, gradient, state, lr, scale, weight_decay)

    @torch.no_grad()
    def call_update(self, weights, gradients, states, lr, weight_decay):
        if self.compile:  # a number would be a constant of the graph
            lr = torch.full((), lr, dtype=torch.float32, device=weights[0].device)
        self.update(weights, gradients, states, lr, weight_decay)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in used:
                if not self.state[parameter]:
                    self.state[parameter] = self.new_state(parameter.detach())
            if used:
                weights = [parameter.detach() for parameter in used]
                gradients = [parameter.grad for parameter in used]
                states = [self.state[parameter] for parameter in used]
                self.call_update(weights, gradients, states, group["lr"], group["weight_decay"])


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: their groups in a row, one
    state."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self.share()

    def share(self):
        """Gives the parts the groups and the state that this optimizer has."""
        groups = iter(self.param_groups)
        for part in self.optimizers:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state):
        super().load_state_dict(state)  # makes new groups and a new state
        self.share()

    def step(self):
        for part in self.optimizers:
            part.step()


def adamw_scale_update(weight, gradient, state, lr, scale, weight_decay, beta1, beta2, eps):
    """AdamW's step, scaled, and its decay, which is not.

    m <- beta1 m + (1 - beta1) g;    v <- beta2 v + (1 - beta2) g^2
    theta <- theta - lr scale sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)
    theta <- theta - lr weight_decay theta

    1 - beta^t is the moving average of a gradient that is always 1, and is kept as one: a compiled
    rule would compute the power again for every weight.
    """
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m_of_ones, v_of_ones = state["exp_avg_of_ones"], state["exp_avg_sq_of_ones"]
    m.lerp_(gradient, 1 - beta1)
    m_of_ones.lerp_(torch.ones_like(m_of_ones), 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    v_of_ones.lerp_(torch.ones_like(v_of_ones), 1 - beta2)
    size = lr * scale * v_of_ones.sqrt() / m_of_ones
    weight.addcdiv_(m * size, v.sqrt().add_(eps), value=-1)
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)


def new_moments(weight):
    """State of AdamWScale: two moments, and both of ones."""
    return {
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "exp_avg_of_ones": weight.new_zeros(()),
        "exp_avg_sq_of_ones": weight.new_zeros(()),
    }


class AdamWScale(RuleOptimizer):
    """T5's baseline (nanoT5): AdamW whose step is scaled by every tensor's RMS before the
    update."""

    def __init__(self, groups, lr, betas, eps, compile=False):
        rule = functools.partial(adamw_scale_update, beta1=betas[0], beta2=betas[1], eps=eps)
        super().__init__(groups, lr, rule, new_moments, rms_scaling=True, compile=compile)
