"""When does BERT's attention find its neighbours?

    python results/plateau.py learned FILE.csv --data=english --budget_steps=7000 --validations=28
    python results/plateau.py fixed FILE.csv ...
    python results/plateau.py draw FIGURE.svg FILE.csv FILE.csv ...

The first two train as train.py does, with its flags, and with the scale of BERT's positions
learned, as at size base, or fixed, as at tiny. The CSV has, of each validation, the loss, that
scale and, for every head, the mean share of its attention that goes to the token before and to the
one behind.
"""

import csv
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, as rst.py asks

# isort: split

import torch

import model as models
import report

COLUMNS = "update rows validation_loss position_scale embedding_std layer head before behind"
ROWS = 200  # of the validation set


@torch.no_grad()
def neighbour_shares(bert, batch):
    """[(layer, head, share to the token before, share to the one behind)]"""
    h, found = bert.embed(batch["tokens"]), []
    for number, layer in enumerate(bert.layers):
        attention = layer.attention
        q, k = attention.heads(layer.attention_norm(h), attention.query, attention.key)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, H, T, T)
        before, behind = (
            weights.diagonal(offset, dim1=-2, dim2=-1).mean(dim=(0, 2)).tolist()
            for offset in (-1, 1)
        )
        found += [(number, head, *pair) for head, pair in enumerate(zip(before, behind))]
        h = layer(h)
    return found


def watch(path, flags):
    """Trains, and writes the CSV."""

    rows = []

    class Watched(train.Training):
        def validate(self):
            super().validate()
            batch = next(self.corpus.validation_batches(ROWS))
            of_model = [self.model.position_scale.item(), self.model.embedding.std().item()]
            counters = [self.clock.updates, self.counters.rows, self.counters.validation_loss]
            for shares in neighbour_shares(self.model, batch):
                rows.append([*counters, *of_model, *shares])

    train.Training = Watched
    # Not in runs/: whether the scale is learned is no flag, so this is no run like the others.
    with tempfile.TemporaryDirectory() as folder:
        train.main([*flags, f"--out={folder}/run"])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS.split(), *rows])


def draw(figure_path, paths):
    """Over the rows that were read: the loss, the scale of the positions, and the largest share of
    a head's attention that goes to one neighbour."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "plateau", "font.size": report.FONT_SIZE}
    figure, panels = pyplot.subplots(3, sharex=True, figsize=(6, 8))
    for path, color in zip(map(Path, paths), itertools.cycle(report.COLORS)):
        curves = {}
        for row in csv.DictReader(path.open()):
            place, share = int(row["rows"]), max(float(row["before"]), float(row["behind"]))
            largest = max(share, curves[place][2] if place in curves else 0)
            curves[place] = float(row["validation_loss"]), float(row["position_scale"]), largest
        for axes, values in zip(panels, zip(*curves.values())):
            axes.plot(list(curves), values, color=color, label=path.stem.replace("-", " "))
    labels = "validation loss (nats)", "scale of the positions", "attention to a neighbour"
    for axes, label in zip(panels, labels):
        axes.set(ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        report.name_lines(axes)
    panels[-1].set(xlabel="rows trained on")
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(figure_path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    task, path, *rest = sys.argv[1:]
    if task == "draw":
        draw(path, rest)
    else:
        learned = {"learned": True, "fixed": False}[task]
        models.SIZES["bert"]["tiny"]["learned_position_scale"] = learned
        watch(path, rest)
