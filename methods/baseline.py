"""The baseline, and the only places where a method may differ from it.

Paper: Kaddour et al. 2023, "No Train No Gain" (arXiv 2307.06440), section 4; the recipe is that of
crammed BERT (Geiping and Goldstein 2023).
Idea: AdamW (T5: its rate scaled by each tensor's RMS), every layer, every row as it comes, and a
learning rate that has decayed, to zero (T5: to 1e-5 of its peak), exactly when the budget is spent.
That last part is what the study found to beat most speed-ups.
Cost: 1, by definition.
Where we differ from the release: norms, biases and the position scalar have no weight decay (there,
only the norms' biases had none).

A method is a file `methods/NAME.py` with one subclass of `Method`. It overrides a few hooks and
sees the model, the corpus, the clock and the configuration, never the loop.
"""

import contextlib
import dataclasses
import math

import numpy as np
import torch

from data.corpus import SECOND_STREAM, TRAINING_STREAM  # noqa: F401 (methods use it)
from errors import UserError
from flags import Option
from optimizers import AdamWScale, parameter_groups
from parallel import gather, in_parts, micro_batches, processes, sum_over_processes

STUDY_MICRO_BATCH = {"bert": 128, "t5": 72}  # rows
# What a method declares if it has forward or backward passes that train nothing.
FREE_PASSES = "leave passes that train nothing uncharged (the study's ablation)"
FREE_EXTRA_PASSES = {"free_extra_passes": Option(False, FREE_PASSES)}


class Method:
    """The baseline. A method overrides what it changes, and inherits the rest.

    Declarations:
        options: {flag: Option}, flags of its own, named as variables are.
        defaults: {model: {size: {flag: value}}}, of common flags and its own options. A size has
            those of "base" and over them its own; all of them go over the baseline's.
        models, dtypes: the models that it is for, and the precisions that it trains in.
        turned_off: {model: {option: value}}, if it can be turned off: options that, all set so,
            make it the baseline, with the same weights after as many updates, bit for bit.
    What it may use:
        self.model: its `layers` (T5: pairs of an encoder's and a decoder's), `present_layers`
            (those that it has now), `loss`, `token_losses` and `logits`;
            `optimizers.parameter_groups` and `hidden_matrices` list its parameters.
        self.corpus: `draw(count)`, the next stream positions (rows that are drawn and not trained
            on are gone; `draw(count, SECOND_STREAM)` is for passes that train nothing: the same
            rows in another order, under other masks); `batch(positions, stream)`, their rows;
            `uniform(*integers)`, a number in [0, 1), 0 included, always the same for the same
            integers (an array or tensor of them gives one), so on all processes and after a
            resume. Begin with an integer of your own.
            A batch has int64 tensors: "tokens" (B, T) are read, "labels" (B, P) are predicted, for
            BERT in the columns "positions" (B, P). In training no label is missing.
        self.clock: `progress`, the share of the budget that was spent before this update;
            `updates`, made before it, skipped ones too; `free()`, a block of work that is not
            charged, in which weights may not change. All else from `begin_update` to `report` is
            charged.
        self.config: every flag of `train.py --help`; `self.config.options` are the methods' own.
        self.combination: the hooks of all methods of this run, and the `optimizer_in_use`.
            `super().HOOK()` is the baseline's, of no other method: two that override one hook do
            not combine.
        sum_over_processes(tensors), of `parallel`: in place. Every hook is called on all processes
            and must answer the same; only `inputs` and `loss` see a process's part of the rows.
        self.finished_models: what `prerequisites` asked for.
    """

    options = {}
    # fmt: off
    defaults = {
        "bert": {  # base is crammed BERT's recipe, as in the study
            "base": dict(batch=1536, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-12, weight_decay=0.01,
                         clip=0.5, schedule="one_cycle", rms_scaling=False),
            "small": dict(batch=32, lr=1e-3),
            "tiny": dict(batch=32, lr=4e-3),
        },
        "t5": {  # base is nanoT5's, as in the study
            "base": dict(batch=144, lr=2e-2, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0,
                         clip=1.0, schedule="cosine", rms_scaling=True),
            "small": dict(batch=16),
            "tiny": dict(batch=16),
        },
    }
    # fmt: on
    models, dtypes = ("bert", "t5"), ("fp32", "bf16", "fp16")
    turned_off = {}

    def __init__(self, model, corpus, clock, config, finished_models):
        self.model, self.corpus, self.clock, self.config = model, corpus, clock, config
        self.finished_models = finished_models
        self.combination = None  # set before any hook is called

    @classmethod
    def prerequisites(cls, config):
        """Runs that must be finished first: {name: configuration}, by dataclasses.replace."""
        return {}

    # -- Hooks: each is served by the one method that overrides it ---------------------------------

    def optimizer(self):
        """Who updates the weights? A torch optimizer; its groups' "lr" are peaks, which the loop
        multiplies with `schedule`. (`optimizers.py` lists what it must support.)"""
        return self.adamw(parameter_groups(self.model, self.config.weight_decay))

    def schedule(self, progress):
        """What share of its peak is every learning rate, with this share of the budget spent? In an
        update `progress` is `clock.progress`, which moves on when the update ends."""
        return SCHEDULES[self.config.schedule](progress)

    def layers(self):
        """Which layers does the model have now? A list of indices; asked before the first update,
        and in each after `begin_update`. The others hold their initial weights."""
        return list(range(len(self.model.layers)))

    def next_batch(self):
        """Which rows are trained on? An array of stream positions, `--batch` of them or another
        number, at least one a process. (A number that comes later is compiled when it comes, and
        that is charged: on a GPU let it take few values.)"""
        return self.corpus.draw(self.config.batch)

    def groups(self, positions):
        """Which rows train which layers? [(positions, layers)], every row once. Layers that are in
        none are not updated."""
        return [(positions, self.model.present_layers)]

    def inputs(self, positions, stream=TRAINING_STREAM):
        """What does the model read of these rows (all that this process trains on in an update)? A
        batch: a dictionary of tensors, each with its rows first. (Its shapes are compiled before
        the run; one in use for less than 1% of the budget may be missed.)"""
        return self.corpus.batch(positions, stream)

    def loss(self, batch, layers):
        """The mean loss of a micro-batch. It counts by its share of the update's rows, so every row
        of an update must have the same weight in it. The log has this loss; validation,
        `row_losses` and Sophia's Hessian passes have the model's own. (`groups`, `inputs` and
        `loss` are also called before the first `begin_update`, to warm up; a method that counts in
        them starts from 0 there.)"""
        return self.model.loss(batch, layers)

    def before_step(self, gradient_norm):
        """The gradients are ready, and this is their norm, a 0-dim tensor: clip or change every
        `parameter.grad` in place. They are fp32, summed over the processes, unscaled, and None for
        what did not train. A change that differs between processes corrupts the run; after one
        `super().before_step` needs the new norm. (In fp16 the norm is not finite where a gradient
        overflowed, and no step follows.)"""
        parameters = self.model.parameters()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, gradient_norm)

    def evaluation_weights(self):
        """With which weights is the model validated and saved? {parameter: tensor}, of those that
        are not the trained ones; {} in the baseline. Not charged; it may be asked before a step,
        and must not change later updates."""
        return {}

    # -- Called for every method of a combination --------------------------------------------------

    def warm_up(self):
        """Makes one of each pass that the method makes beside `loss`, on throw-away rows, so
        that its compilation is not charged; by itself it does so for `row_losses`. (Called before
        the first update, more than once.)"""
        if type(self).next_batch is not Method.next_batch:  # it may score rows
            positions = np.arange(rows_at_once(self.config) * processes())
            for model in (self.model, *self.finished_models.values()):
                self.row_losses(positions, model)

    def begin_update(self):
        """An update begins. The only place where a model may grow."""

    def after_step(self):
        """The weights were updated (in fp16: unless a gradient overflowed)."""

    def report(self):
        """What should this update's line in the log say? {name: number}, of Python's own types and
        finite; of every update, those that fp16 skipped too, which call no `after_step`. What was
        added up in `loss` is one process's: `sum_over_processes` first."""
        return {}

    def state_dict(self):
        """What must a checkpoint hold? Tensors, numbers, strings, None, and lists and dictionaries
        of these, the same on all processes: one of them saves."""
        return {}

    def load_state_dict(self, state):
        """Takes back what `state_dict` gave."""

    # -- Tools -------------------------------------------------------------------------------------

    def adamw(self, groups):
        """The baseline's optimizer for some groups of parameters."""
        config = self.config
        options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
        if config.rms_scaling:
            return AdamWScale(groups, **options, compile=config.compile)
        return torch.optim.AdamW(groups, **options, fused=True)

    def extra_pass(self):
        """The context of a pass of the model that trains nothing: charged, unless
        --free_extra_passes says otherwise."""
        is_free = self.config.options.get("free_extra_passes")
        return self.clock.free() if is_free else contextlib.nullcontext()

    def batches(self, positions, stream, rows_of_each):
        """This process's share of these rows of a stream: [(positions, batch)]."""
        parts = [rows for rows, _ in micro_batches([(positions, None)], rows_of_each)]
        inputs = self.combination.inputs(np.concatenate(parts), stream)
        return list(zip(parts, in_parts(inputs, list(map(len, parts)))))

    def row_losses(self, positions, model=None):
        """The mean loss of each row, by the model's loss (not the hook `loss`) and as `inputs`
        makes it, with all the layers that the model (or another one) has: a float64 array, the same
        on all processes. All of them must call it."""
        model = model or self.model
        with torch.no_grad():
            batches = self.batches(positions, TRAINING_STREAM, rows_at_once(self.config))
            mine = torch.cat([model.loss(batch, per_example=True) for _, batch in batches]).tolist()
        shares = [len(share) for share in np.array_split(positions, processes())]
        padded = mine + [0.0] * (max(shares) - len(mine))
        everyone = gather(padded, self.config.device)
        losses = np.concatenate([row[:share] for row, share in zip(everyone, shares)])
        if not np.isfinite(losses).all():
            update = self.clock.updates + 1
            raise UserError(
                f"a row's loss is not finite before update {update}; lower --lr or --clip"
            )
        return losses

    def mean_gradients(self, positions, stream, loss):
        """{parameter: gradient}, over these rows of a stream, of the mean of `loss(batch, rows)`.
        Takes `parameter.grad` meanwhile, which is None between updates. All processes must call
        it."""
        for rows, batch in self.batches(positions, stream, self.config.micro_batch):
            (loss(batch, rows) * (len(rows) / len(positions))).backward()
        used = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        gradients = {parameter: parameter.grad for parameter in used}
        self.model.zero_grad(set_to_none=True)
        sum_over_processes(list(gradients.values()))
        return gradients


def rows_at_once(config):
    """Rows of a pass without gradients: a micro-batch, but not more than the study's, which fills a
    GPU. (Each remainder is a shape of its own, and compiled; small parts leave fewer.)"""
    return min(config.micro_batch, STUDY_MICRO_BATCH[config.model])


def one_cycle(progress):
    """The study's BERT schedule: up to the peak at half of the budget, down to exactly 0 at its
    end."""
    return 2 * progress if progress < 0.5 else 2 * (1 - progress)


WARM_UP = 10_000 / 65_536  # share of the budget (the study's updates, at any budget)


def cosine(progress):
    """The study's T5 schedule: from half the peak up to it in the first 15.26% of the budget, then
    down half a cosine, to 1e-5 of the peak at its end."""
    if progress < WARM_UP:
        return 0.5 + 0.5 * progress / WARM_UP
    return max(1e-5, 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))))


SCHEDULES = {"one_cycle": one_cycle, "cosine": cosine}


def baseline_on_holdout(config, **changes):
    """The configuration of the baseline on the held-out rows, with `changes`: what RHO-loss and
    Rho-1 compare losses with. Its recipe is the baseline's own, whatever the run's is, so that all
    runs of a budget share it."""
    recipe = Method.defaults[config.model]
    recipe = recipe["base"] | recipe.get(config.size, {})
    if not config.holdout:
        raise UserError(
            f"--holdout=0: {config.method} needs a model of the holdout; the study's share is 0.2"
        )
    if config.train_on != "training":
        raise UserError(
            f"--train_on={config.train_on}: {config.method} compares with a model of the holdout"
        )
    common = dict(method="baseline", options={}, train_on="holdout", seed=0, validations=4)
    common |= dict(out=None, micro_batch=min(config.micro_batch, recipe["batch"]))
    return dataclasses.replace(config, **common, **recipe, **changes)
