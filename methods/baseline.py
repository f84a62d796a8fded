"""The baseline, and the only places where a method may differ from it.

Paper: Kaddour et al. 2023, "No Train No Gain" (arXiv 2307.06440), section 4; the recipe is that of crammed
BERT (Geiping and Goldstein 2023).
Idea: AdamW (T5: its rate scaled by each tensor's RMS), every layer, every row once, and a learning rate
that has decayed, to zero (T5: to 1e-5 of its peak), exactly when the budget is spent. That last part is what
the study found to beat most speed-ups.
Cost: 1, by definition.
Where we differ from the release: norms, biases and the position scalar have no weight decay (there, only
the norms' biases had none).

A method is a file `methods/NAME.py` with one subclass of `Method`. It overrides a few of the places
below and sees the model, the corpus, the clock and the configuration, never the loop.
"""

import contextlib
import inspect
import math
from dataclasses import dataclass

import numpy as np
import torch

from errors import UserError
from parallel import cut, gather, processes, sum_over_processes


@dataclass(frozen=True)
class Option:
    """A flag of a method's own: its default (a bool, int, float or string, which decides what the flag takes; 1.0 for
    a number that may be 0.5), help, and the values it may have: one of `choices`, or from `minimum` to `maximum`."""

    default: object
    help: str
    choices: tuple = ()
    minimum: float = -math.inf
    maximum: float = math.inf


# What a method declares if it has forward or backward passes that train nothing.
FREE_EXTRA_PASSES = {"free_extra_passes": Option(False, "leave passes that train nothing uncharged (the study's ablation)")}


class Method:
    """The baseline. A method overrides what it changes, and inherits the rest.

    Class-level declarations:
        options: {flag name: Option}.
        defaults: {model: {size: {flag: value}}}, of common flags and its own options; a size has those of
            "base" and over them its own. All of them go over all of the baseline's.
        rows_per_draw: {model: rows of a batch that get `active_layers` of their own}; without, all of them
            have the same.
    """

    options = {}
    defaults = {
        "bert": {
            # METHODS 4.1: the study's recipe.
            "base": dict(
                batch=1536, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.01, clip=0.5, schedule="one_cycle",
                rms_scaling=False,
            ),
            "small": dict(batch=32, lr=1e-3),
            "tiny": dict(batch=8, lr=1e-3),
        },
        "t5": {
            # METHODS 4.2: the study's recipe.
            "base": dict(
                batch=144, lr=2e-2, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0, clip=1.0, schedule="cosine",
                rms_scaling=True,
            ),
            "small": dict(batch=16),
            "tiny": dict(batch=8),
        },
    }
    rows_per_draw = {}

    def __init__(self, model, corpus, clock, config, prerequisites):
        """`config.options` holds the method's options; `prerequisites` the finished models, by name, of
        the runs that `prerequisites(config)` asked for."""
        self.model, self.corpus, self.clock, self.config = model, corpus, clock, config
        self.finished_models = prerequisites
        self.shared_optimizer = None  # what `optimizer()` returned, of whichever method; set before the first update

    @classmethod
    def prerequisites(cls, config):
        """Runs that must exist first: {name: configuration, made by dataclasses.replace(config, ...)}."""
        return {}

    # The places. Each is served by the one method that overrides it.

    def optimizer(self):
        """Who updates the weights? Returns a torch optimizer; the loop sets its groups' "lr"."""
        config = self.config
        return (AdamWScale if config.rms_scaling else torch.optim.AdamW)(
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
        """Which layers does the model have now? (The answer in force, whoever's it is: `self.model.present_layers`.)"""
        return list(range(len(self.model.layers)))

    def next_batch(self):
        """Which rows are trained on now? Returns stream positions, any number, the same on all
        processes."""
        return self.corpus.draw(self.config.batch)

    def evaluation_weights(self):
        """With which weights is the model validated, and saved at the end? {parameter: tensor} of those that are not
        the trained ones; the keys are the model's parameters themselves."""
        return {}

    # Not exclusive: in a combination every method's are called.

    def after_step(self):
        """What is refreshed now and then? Called after every update that was not skipped."""

    def report(self):
        """What the log should say of this update: {name: number}."""
        return {}

    def state_dict(self):
        """What a checkpoint must hold: tensors, numbers, strings, lists and dictionaries of these."""
        return {}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave."""

    # Tools for methods that look at rows which they do not train on. All processes call them together.

    def extra_pass(self):
        """The context of a pass that trains nothing: charged, unless --free_extra_passes (of a method that has
        FREE_EXTRA_PASSES among its options)."""
        return self.clock.free() if self.config.options.get("free_extra_passes") else contextlib.nullcontext()

    def row_losses(self, positions, model=None):
        """The mean loss of each row at these stream positions, from a forward pass of the training model (or
        another) with all the layers that it has: a float64 array, the same on all processes."""
        model = model or self.model
        with torch.no_grad():
            parts = [model.loss(self.corpus.batch(rows), per_example=True) for _, rows in cut(positions, 1, self.config.micro_batch)]
        mine = torch.cat(parts).tolist()
        shares = [len(share) for share in np.array_split(positions, processes())]
        padded = mine + [0.0] * (max(shares) - len(mine))
        losses = np.concatenate([row[:share] for row, share in zip(gather(padded, self.config.device), shares)])
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise UserError(f"the loss of stream position {positions[first]} is {losses[first]} before update {self.clock.updates + 1}; lower --lr or --clip")
        return losses

    def mean_gradients(self, positions, loss, stream):
        """The gradients, over the rows at these positions of a stream, of the mean of `loss(batch, rows)`:
        {parameter: tensor}. Takes `parameter.grad` meanwhile, which is None between updates."""
        for _, rows in cut(positions, 1, self.config.micro_batch):
            (loss(self.corpus.batch(rows, stream), rows) * (len(rows) / len(positions))).backward()
        gradients = {parameter: parameter.grad for parameter in self.model.parameters() if parameter.grad is not None}
        self.model.zero_grad(set_to_none=True)
        sum_over_processes(list(gradients.values()))
        return gradients


def parameter_groups(model, weight_decay):
    """All parameters, once: matrices with weight decay; norms, biases and scalars without."""
    decay = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    no_decay = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def one_cycle(progress):
    """The study's BERT schedule: up to the peak at half of the budget, down to exactly 0 at its end."""
    return 2 * progress if progress < 0.5 else 2 * (1 - progress)


WARM_UP = 10_000 / 65_536  # share of the budget (the study's updates, at any budget)


def cosine(progress):
    """The study's T5 schedule: from half the peak up to it in the first 15.26% of the budget, then down half
    a cosine, to 1e-5 of the peak at its end."""
    if progress < WARM_UP:
        return 0.5 + 0.5 * progress / WARM_UP
    return max(1e-5, 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))))


SCHEDULES = {"one_cycle": one_cycle, "cosine": cosine}


def rms_scales(parameters):
    """max(1e-3, root mean square) of each tensor, as 0-dim tensors on its device: what T5's optimizers
    multiply the rate with (nanoT5; Adafactor's "relative step", Shazeer and Stern 2018)."""
    norms = torch._foreach_norm(parameters)
    return torch._foreach_clamp_min(torch._foreach_div(norms, [parameter.numel() ** 0.5 for parameter in parameters]), 1e-3)


class AdamWScale(torch.optim.AdamW):
    """AdamW whose rate is scaled by every tensor's RMS before the update (METHODS 4.2):

        theta <- theta - lr * max(1e-3, RMS(theta)) * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        theta <- theta - lr * weight_decay * theta

    It runs on the fused kernel of AdamW: a group for every tensor carries its rate, and eps is divided by
    sqrt(1 - beta2^t), because that kernel adds eps to the corrected sqrt(v).
    """

    def __init__(self, groups, **options):
        groups = [group | {"params": [parameter]} for group in groups for parameter in group["params"]]
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # in fp16 the scaler calls `step` only where nothing overflowed

    @torch.no_grad()
    def step(self):
        used = [group for group in self.param_groups if group["params"][0].grad is not None]
        if not used:
            return
        scales = rms_scales([group["params"][0] for group in used])
        if used[0]["params"][0].device.type == "cpu":
            scales = torch.stack(scales).tolist()  # nothing to wait for
        plain = [(group["lr"], group["eps"], group["weight_decay"]) for group in used]
        updates = [self.state[group["params"][0]].get("updates", 0) + 1 for group in used]  # a layer may come later
        for group, scale, count, (lr, eps, weight_decay) in zip(used, scales, updates, plain):
            group["lr"], group["eps"], group["weight_decay"] = lr * scale, eps / (1 - group["betas"][1] ** count) ** 0.5, 0.0
        super().step()
        for group, count, (lr, eps, weight_decay) in zip(used, updates, plain):
            self.state[group["params"][0]]["updates"] = count
            group["lr"], group["eps"], group["weight_decay"] = lr, eps, weight_decay
            if weight_decay:
                group["params"][0].mul_(1 - lr * weight_decay)


TOGETHER = 8  # tensors that TensorOptimizer updates in one call


class TensorOptimizer(torch.optim.Optimizer):
    """An optimizer made of a function that updates one tensor.

        rule(parameter, gradient, *state, rate, weight_decay, **constants)     all in place

    `state` are tensors that start at zero; `rate` and `weight_decay` are 0-dim tensors. Compiled once, for eight flat
    tensors of any sizes above 1: layers that come and go need no other code, and a CPU's threads are woken once for eight.

    Args:
        groups: as torch.optim's, with "weight_decay".
        rule: the function; its positional arguments after the first two name the state.
        lr: the rate, until the loop sets another.
        rms_scaling: scale the rate of every tensor with its RMS (T5).
        compile: compile the rule, here and now.
        constants: further arguments of the rule.
    """

    def __init__(self, groups, rule, lr, rms_scaling=False, compile=False, **constants):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))
        names = list(inspect.signature(rule).parameters)
        self.state_names = names[2 : names.index("rate")]

        def update(rows, rate, weight_decay):
            scales = rms_scales([row[0] for row in rows]) if rms_scaling else [1.0] * len(rows)
            for row, scale in zip(rows, scales):
                rule(*row, rate * scale, weight_decay, **constants)

        self.eager_update = self.update = update
        self.spare_rows = []
        if compile:
            self.update = torch.compile(update, dynamic=True)
            device = self.param_groups[0]["params"][0].device

            def rows(sizes):
                return [[torch.zeros(size, device=device) for _ in range(2 + len(self.state_names))] for size in sizes]

            # Sizes that are equal here would be taken to be equal for ever, and small ones to be for one thread.
            with torch.no_grad():
                self.update(rows(range(2**17, 2**17 + TOGETHER)), *(torch.zeros((), device=device) for _ in range(2)))
            self.spare_rows = rows([2] * TOGETHER)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not used:
                continue
            rate, weight_decay = (torch.tensor(group[name], dtype=torch.float32, device=used[0].device) for name in ("lr", "weight_decay"))
            rows = []
            for parameter in used:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in self.state_names}
                state = [self.state[parameter][name] for name in self.state_names]
                rows.append([tensor.detach().view(-1) for tensor in (parameter, *state)])
                rows[-1].insert(1, parameter.grad.reshape(-1))
                if parameter.numel() == 1:  # torch.compile takes a size of 1 for a constant and would make another graph
                    self.eager_update([rows.pop()], rate, weight_decay)
            for start in range(0, len(rows), TOGETHER):
                together = rows[start : start + TOGETHER]
                self.update(together + self.spare_rows[len(together) :], rate, weight_decay)
