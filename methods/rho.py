"""RHO-loss: train on the rows that are learnable and not yet learnt.

Paper: Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth Learning,
and Not Yet Learnt" (ICML).
Idea: A second model, trained on other data (the holdout), knows how hard a row is for whoever has
learnt the language: its irreducible loss. The training model's loss in excess of that is what the
row can still teach. The rows of a mega-batch of candidates with the largest difference are trained
on.

    candidates: the next mega_batch_factor x batch rows of the stream
    score = loss of the training model - loss of the irreducible-loss model, on the same masked row
    train on the `batch` rows with the largest scores; the others are gone

Cost: with two candidates for every row about 1 + 2/3 of an update, with ten about 1 + 10/3, for the
losses of the training model. As in the study, training the irreducible-loss model before the run is
not charged, and neither are the losses under it, a free block; result.json reports both.
The study found: no gain over the baseline's validation loss, with three data sets. With ten
candidates per row and free selection the loss is slightly better (lower), but GLUE is worse.
Where we differ from the release: there the loss of the training model and the irreducible loss
belong to different masks of a row, and by the documented commands to different rows; here the
irreducible-loss model scores each candidate when it is drawn. It trains as long as the run (there
12 hours, or 6). The scoring pass predicts the masked positions only. Validation rows are neither in
the holdout nor trained on.
"""

import numpy as np

from methods.baseline import FREE_EXTRA_PASSES, Method, Option, baseline_on_holdout

MODEL = "irreducible_loss_model"


class RHO(Method):
    options = {
        "mega_batch_factor": Option(2, "candidates for every row of a batch", minimum=1),
        "irreducible_budget_hours": Option(
            0.0, "budget of the irreducible-loss model (0: the run's)", minimum=0.0
        ),
        **FREE_EXTRA_PASSES,
    }
    defaults = {"bert": {"tiny": dict(lr=8e-3)}}
    turned_off = {model: dict(mega_batch_factor=1) for model in ("bert", "t5")}

    @classmethod
    def prerequisites(cls, config):
        hours = config.options["irreducible_budget_hours"]
        budget = dict(budget_hours=hours, budget_steps=None) if hours else {}
        return {MODEL: baseline_on_holdout(config, **budget)}

    def next_batch(self):
        batch = self.config.batch
        positions = self.corpus.draw(self.config.options["mega_batch_factor"] * batch)
        with self.extra_pass():
            losses = self.row_losses(positions)
        with self.clock.free():
            irreducible_losses = self.row_losses(positions, self.finished_models[MODEL])
        scores = losses - irreducible_losses
        best = np.argsort(-scores, kind="stable")[:batch]
        self.mean_score, self.chosen_score = float(scores.mean()), float(scores[best].mean())
        return positions[np.sort(best)]  # in the order of the stream

    def report(self):
        return {"mean_score": self.mean_score, "chosen_score": self.chosen_score}
