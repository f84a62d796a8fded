"""When does BERT's attention find its neighbours, and T5's the gap that it fills?

    python results/plateau.py learned FILE.csv --data=english --budget_steps=7000 --validations=28
    python results/plateau.py fixed FILE.csv ...
    python results/plateau.py published FILE.csv --budget_hours=0.1 --validations=26
    python results/plateau.py wide FILE.csv ...
    python results/plateau.py draw FIGURE.svg FILE.csv FILE.csv ...

The first two train BERT as train.py does, with its flags, and with the scale of the positions
learned, as at size base, or fixed, as at tiny. The CSV has, of each validation, the loss, that
scale and, for every head, the mean share of its attention that goes to the token before and to the
one behind. The next two train T5, with the published initial values, as at base, or with tiny's.
Their CSV has the standard deviation of the encoder's table of relative positions and, for every
head with which the decoder attends to what the encoder read, the mean share that goes to the
sentinel of the span that it is writing.
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
from data.corpus import SENTINELS

COLUMNS = {
    "bert": "update rows validation_loss position_scale embedding_std layer head before behind",
    "t5": "update rows validation_loss position_std layer head sentinel",
}
ROWS = 200  # of the validation set
PUBLISHED = {name: getattr(models.T5Config, name) for name in ("position_std", "head_std")}
# Each task's model and what it changes of tiny.
TASKS = {
    "learned": ("bert", dict(learned_position_scale=True)),
    "fixed": ("bert", {}),
    "published": ("t5", PUBLISHED),
    "wide": ("t5", {}),
}


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


@torch.no_grad()
def sentinel_shares(t5, batch, first_sentinel):
    """[(layer, head, share to the sentinel of the span)]"""
    weights = []  # a layer (B, H, P, T)

    def keep(attention, inputs):
        x, (keys, _), _ = inputs
        (q,) = attention.heads(x, attention.query)
        weights.append((q @ keys.transpose(-2, -1)).softmax(dim=-1))

    hooks = [layer.decoder.cross_attention.register_forward_pre_hook(keep) for layer in t5.layers]
    t5.logits(batch)
    for hook in hooks:
        hook.remove()
    labels = batch["labels"]
    is_sentinel = labels > first_sentinel - SENTINELS  # they number the spans, downwards
    own = first_sentinel + 1 - is_sentinel.cumsum(dim=1)
    at_own = batch["tokens"][:, None, :] == own[:, :, None]  # (B, P, T)
    written = ~is_sentinel
    written[:, -1] = False  # the end belongs to no span
    shares = [(layer * at_own[:, None]).sum(dim=3).transpose(1, 2)[written] for layer in weights]
    return [
        (number, head, share)
        for number, layer in enumerate(shares)
        for head, share in enumerate(layer.mean(dim=0).tolist())
    ]


def watch(path, name, flags):
    """Trains the model of that name, and writes the CSV."""

    rows = []

    class Watched(train.Training):
        def validate(self):
            super().validate()
            model, batch = self.model, next(self.corpus.validation_batches(ROWS))
            found = [self.clock.updates, self.counters.rows, self.counters.validation_loss]
            if name == "bert":
                found += [model.position_scale.item(), model.embedding.std().item()]
                shares = neighbour_shares(model, batch)
            else:
                found += [model.encoder_positions.std().item()]
                shares = sentinel_shares(model, batch, self.corpus.meta["first_sentinel"])
            rows.extend([*found, *share] for share in shares)

    train.Training = Watched
    # Not in runs/: they are no runs like the others, because what a task may change is no flag.
    with tempfile.TemporaryDirectory() as folder:
        train.main([f"--model={name}", *flags, f"--out={folder}/run"])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS[name].split(), *rows])


def draw(figure_path, paths):
    """Over the rows that were read: the loss, how large the positions are, and the largest share of
    a head's attention that goes to one neighbour, or to the sentinel."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "plateau", "font.size": report.FONT_SIZE}
    curves = {}  # of each file {rows: the values of the panels}
    for path in map(Path, paths):
        curve = curves[path.stem.replace("-", " ")] = {}
        for row in csv.DictReader(path.open()):
            row = {name: float(value) for name, value in row.items()}
            share = max(row[name] for name in ("before", "behind", "sentinel") if name in row)
            size = row["position_scale" if "position_scale" in row else "position_std"]
            largest = max(share, curve.get(row["rows"], [0])[-1])
            curve[row["rows"]] = row["validation_loss"], size, largest
    labels = ["validation loss (nats)", "scale of the positions", "attention to a neighbour"]
    if "sentinel" in row:
        labels[1:] = ["deviation of positions", "attention to the sentinel"]
    figure, panels = pyplot.subplots(3, sharex=True, figsize=(6, 8))
    for (name, curve), color in zip(curves.items(), itertools.cycle(report.COLORS)):
        for axes, values in zip(panels, zip(*curve.values())):
            axes.plot(list(curve), values, color=color, label=name)
    for axes, label in zip(panels, labels):
        axes.set(ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        report.name_lines(axes)
    panels[-1].set(xlabel="rows trained on")
    panels[-1].locator_params(axis="x", nbins=5)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(figure_path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    task, path, *rest = sys.argv[1:]
    if task == "draw":
        draw(path, rest)
    else:
        name, changes = TASKS[task]
        models.SIZES[name]["tiny"] |= changes
        watch(path, name, rest)
