"""Mask scheduling: predict many tokens early, few late.

Paper: Ankner et al. 2024, "Dynamic Masking Rate Schedules for MLM Pretraining" (EACL, arXiv
2305.15096); on high rates, Wettig et al. 2023, "Should You Mask 15% in Masked Language Modeling?"
(arXiv 2202.08005).
Idea: Many masks give much signal per update and little context; few do the reverse. Start with the
one, end with the other.

    share of predicted tokens = mask_share (first + (1 - first) p)    p: share of the budget spent

Cost: BERT reads as much and decodes more tokens: 2% more over a run at base. T5 at 30% reads and
writes 9% more tokens.
Finding: not in the study. Ankner: GLUE up to 0.46 (base) and 0.25 points (large) better than fixed
shares, the same score up to 1.89 times as fast; a rising share does not help. For T5, Raffel et al.
2020 find 10% to 25% alike and 50% worse; no gain of a schedule is published.
Where we differ: the share changes in steps, because every number of predicted tokens is a shape
that is compiled before the run. Losses of different shares are not comparable; the validation rows
always have the share of the end.
"""

from data.corpus import MOST_MASKS
from errors import UserError
from methods.baseline import TRAINING_STREAM, Method, Option


class MaskSchedule(Method):
    options = {
        "first_multiple": Option(
            2.0,
            "share predicted at the start, in multiples of --mask_share",
            minimum=0.1,
            maximum=50.0,
        ),
        "steps": Option(6, "number of different shares (t5: 4)", minimum=2),
    }
    defaults = {
        "bert": {"tiny": dict(first_multiple=1.5)},
        "t5": {"base": dict(steps=4), "tiny": dict(first_multiple=1.5)},
    }
    turned_off = {model: dict(first_multiple=1.0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        first, share = self.config.options["first_multiple"], self.config.mask_share
        if first * share > MOST_MASKS:
            most = f"at most {MOST_MASKS:g} of a row's tokens can be predicted"
            raise UserError(f"--first_multiple={first:g} of --mask_share={share:g}: {most}")

    def mask_share(self):
        """Share of a row's tokens that is predicted now."""
        options = self.config.options
        first, steps = options["first_multiple"], options["steps"]
        step = min(steps - 1, int(self.clock.progress * steps))
        return (first + (1 - first) * step / (steps - 1)) * self.config.mask_share

    def inputs(self, positions, stream=TRAINING_STREAM):
        return self.corpus.batch(positions, stream, mask_share=self.mask_share())

    def report(self):
        return {"mask_share": self.mask_share()}
