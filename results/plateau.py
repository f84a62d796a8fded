"""When does BERT's attention find its neighbours? Trains as train.py does, with its flags and with
the scale of its positions fixed, as at size tiny, or learned, as at base, and writes a CSV: at each
validation the loss, and for every head the mean share of its attention that goes to the token
before and to the token behind.

    python results/plateau.py learned FILE.csv --data=english --budget_steps=7000 --validations=28
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # before torch, as rst.py asks

# isort: split

import torch

import model as models

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


class Watched(train.Training):
    """A run that also looks at its attention when it validates."""

    def validate(self):
        super().validate()
        batch = next(self.corpus.validation_batches(ROWS))
        scale = self.model.position_scale.item()
        embedding = self.model.embedding.std().item()
        for layer, head, before, behind in neighbour_shares(self.model, batch):
            rows.writerow(
                [self.clock.updates, self.counters.rows, self.counters.validation_loss]
                + [scale, embedding, layer, head, before, behind]
            )
        file.flush()


if __name__ == "__main__":
    scale, path, *flags = sys.argv[1:]
    models.SIZES["bert"]["tiny"]["learned_position_scale"] = {"learned": True, "fixed": False}[
        scale
    ]
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            "update rows validation_loss position_scale embedding_std layer head before "
            "behind".split()
        )
        train.Training = Watched
        train.main(flags)
