"""Token dropping: middle layers read only the tokens that are hard.

Paper: Hou et al. 2022, "Token Dropping for Efficient BERT Pretraining" (ACL, arXiv 2203.13240); for
T5 the form of Yao et al. 2022, "Random-LTD" (arXiv 2211.11586).
Idea: Frequent tokens are soon learnt. Half of a row's tokens skip the middle layers and rejoin
at the last one, except in the last tenth of the budget.

    BERT, L layers: 0 ... L/2 - 2 read all tokens; in L/2 - 1 the kept ones attend to all;
        L/2 ... L - 2 read the kept ones alone; L - 1 all. A row keeps its K most important, and
        before all others [UNK], [CLS], [SEP], [MASK]:
        importance[id] <- 0.995 importance[id] + 0.005 (mean loss of an update, id the label)
    T5: each encoder layer but the first and last draws K columns; the others pass it by.

Cost: with K half a row, before the last tenth, 0.76 of BERT's layers at base, and 7/12 of T5's
encoder.
Finding: not in the study. Hou: 25% cheaper at about the same GLUE, rows of 512 tokens.
Where we differ: importance takes an id's mean loss in an update (the release: its last), so that
processes agree. Random-LTD draws for each row and lets K grow; here an update's rows share a draw.
"""

import torch

from methods.baseline import Method, Option, sum_over_processes

COLUMNS = 0xD309  # id of this random stream


class TokenDropping(Method):
    options = {
        "keep": Option(0.5, "share of tokens that middle layers read", minimum=0.01, maximum=1.0),
        "full_phase": Option(0.1, "last share of the budget: all tokens", minimum=0.0, maximum=1.0),
    }
    turned_off = {model: dict(keep=1.0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.importance = torch.full((self.config.vocabulary,), 10.0, device=self.config.device)
        self.importance[self.corpus.special_ids] = 1e4  # it stays: they are never labels
        self.begin_update()  # makes the sums

    def begin_update(self):
        self.sums, self.counts = (torch.zeros_like(self.importance) for _ in range(2))

    def loss(self, batch, layers):
        width = batch["tokens"].shape[1]
        kept = max(1, round(self.config.options["keep"] * width))
        in_full_phase = self.clock.progress >= 1 - self.config.options["full_phase"]
        if kept == width or len(layers) < 2 or in_full_phase:
            return super().loss(batch, layers)
        return getattr(self, f"{self.config.model}_loss")(batch, layers, kept)

    def bert_loss(self, batch, layers, count):
        model, half = self.model, len(layers) // 2
        with model.autocast():
            h = model.embed(batch["tokens"])
            order = self.importance[batch["tokens"]].argsort(dim=1, descending=True, stable=True)
            kept = order[:, :count].sort(dim=1).values
            columns = kept[:, :, None].expand(-1, -1, h.shape[2])  # (B, K, C)
            for index in layers[: half - 1]:
                h = model.layers[index](h)
            part = model.layers[layers[half - 1]](h.gather(1, columns), context=h)
            for index in layers[half:-1]:
                part = model.layers[index](part)
            h = model.layers[layers[-1]](h.scatter(1, columns, part))
            logits = model.predict(model.final_norm(h), batch["positions"])
        losses = model.losses_of(logits, batch["labels"])
        labels = batch["labels"].flatten()
        self.sums.index_add_(0, labels, losses.detach().flatten())
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
        return losses.mean()

    def t5_loss(self, batch, layers, count):
        model = self.model
        columns = torch.arange(batch["tokens"].shape[1], device=self.corpus.device)
        with model.autocast():
            h, previous = model.embed_both(batch)
            bias = model.encoder_bias(len(columns))
            for index in layers:
                if index in (layers[0], layers[-1]):
                    h = model.layers[index].encoder(h, bias)
                    continue
                draws = self.corpus.uniform(COLUMNS, self.clock.updates, index, columns)
                kept = draws.argsort(stable=True)[:count].sort().values
                # The bias is of their distances in the row: (1, H, K, K).
                part = model.layers[index].encoder(h[:, kept], bias[:, :, kept][:, :, :, kept])
                h = h.index_copy(1, kept, part)
            logits = model.decode(previous, model.finish_encoder(h), layers=layers)
        return model.losses_of(logits, batch["labels"]).mean()

    def after_step(self):
        if self.config.model == "bert":  # T5's columns are random
            sum_over_processes([self.sums, self.counts])
            moved = 0.995 * self.importance + 0.005 * self.sums / self.counts.clamp(min=1)
            self.importance = torch.where(self.counts > 0, moved, self.importance)

    def state_dict(self):
        return {"importance": self.importance}

    def load_state_dict(self, state):
        self.importance = state["importance"]
