"""WSD: warm up, hold the rate, and cool down at the end.

Paper: Hu et al. 2024, "MiniCPM" (arXiv 2404.06395); the shape of the end is Hägele et al. 2024,
"Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (arXiv 2405.18392).
Idea: While the rate is constant the run's length need not be known; only the last part of a run
depends on it. So one plateau serves runs of many budgets.

    rate / peak =  p / w                          while p < w
                   1                              while p < 1 - D
                   1 - sqrt((p - (1 - D)) / D)    until p = 1

Cost: 1.
Finding: not in the study. Both papers: as good as a cosine that was tuned for the run's length. Its
gain, one plateau for many runs, does not count at a fixed budget. On the plateau validation losses
look worse than a decayed run's: compare final ones. MiniCPM: a 10% cool-down is enough, 2.5% not.
Where we differ: w is a share of the budget. The mean rate is 0.84 of the peak (the BERT baseline's:
0.5), so the best peak is likely to be lower: try 0.5, 0.7 and 1 times the baseline's.
"""

from errors import UserError
from methods.baseline import Method, Option


class WSD(Method):
    options = {
        "warm_up": Option(
            0.05, "share of the budget in which the rate rises", minimum=0.0, maximum=1.0
        ),
        "cool_down": Option(
            0.2, "share of the budget in which the rate falls", minimum=0.0, maximum=1.0
        ),
        "shape": Option("sqrt", "of the cool-down: 1 - sqrt, or linear", ("sqrt", "linear")),
    }
    defaults = {"bert": {"tiny": dict(lr=2e-3)}}
    # T5's cosine, which starts at half the peak, is out of reach.
    turned_off = {"bert": dict(warm_up=0.5, cool_down=0.5, shape="linear")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        options = self.config.options
        warm_up, cool_down = options["warm_up"], options["cool_down"]
        if warm_up + cool_down > 1:
            both = f"--warm_up={warm_up:g} and --cool_down={cool_down:g}"
            raise UserError(f"{both} are shares of the budget: at most 1 in all")

    def schedule(self, progress):
        options = self.config.options
        warm_up, cool_down, shape = options["warm_up"], options["cool_down"], options["shape"]
        if progress < warm_up:
            return progress / warm_up
        if progress < 1 - cool_down or not cool_down:
            return 1.0
        fallen = (progress - (1 - cool_down)) / cool_down
        return 1 - (fallen**0.5 if shape == "sqrt" else fallen)
