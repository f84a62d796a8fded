"""Mask scheduling: predict many tokens early, few late.

Paper: Ankner et al. 2024, "Dynamic Masking Rate Schedules for MLM Pretraining" (EACL, arXiv
2305.15096); on high rates, Wettig et al. 2023, "Should You Mask 15% in Masked Language Modeling?"
(arXiv 2202.08005).
Idea: Many masks are much signal an update and little context; few are the reverse. Start with the
one, end with the other.

    share of predicted tokens = first + (last - first) p        p: share of the budget, in steps

Cost: BERT reads as much and decodes more tokens: 2% more over a run at base. T5 at 30% reads and
writes 9% more tokens.
Finding: not in the study. Ankner: GLUE 0.46 (base) and 0.25 points (large) better than 15%, the
same score up to 1.89 times as fast; a rising share does not help. For T5, Raffel et al. 2020 find
10% to 25% alike and 50% worse; no schedule is published.
Where we differ: the share changes in steps, because every number of predicted tokens is a shape
that is compiled before the run. Losses of different shares are not comparable; the validation rows
always have the study's 15%.
"""

from methods.baseline import TRAINING_STREAM, Method, Option


class MaskSchedule(Method):
    options = {
        "first_share": Option(
            0.3, "share of tokens predicted at the start", minimum=0.01, maximum=0.5
        ),
        "last_share": Option(0.15, "and at the end", minimum=0.01, maximum=0.5),
        "steps": Option(6, "shares that a run has (t5: 4)", minimum=2),
    }
    defaults = {"t5": {"base": dict(steps=4)}}
    turned_off = {model: dict(first_share=0.15, last_share=0.15) for model in ("bert", "t5")}

    def mask_share(self):
        """Share of a row's tokens that is predicted now."""
        options = self.config.options
        first, last, steps = options["first_share"], options["last_share"], options["steps"]
        step = min(steps - 1, int(self.clock.progress * steps))
        return first + (last - first) * step / (steps - 1)

    def inputs(self, positions, stream=TRAINING_STREAM):
        return self.corpus.batch(positions, stream, mask_share=self.mask_share())

    def report(self):
        return {"mask_share": self.mask_share()}
