"""Token dropping: middle layers read only the tokens that are hard.

Paper: Hou et al. 2022, "Token Dropping for Efficient BERT Pretraining" (ACL, arXiv 2203.13240); for T5 the form of Yao et
al. 2022, "Random-LTD" (arXiv 2211.11586).
Idea: Frequent tokens are soon learnt. Half of a row skips the middle layers and joins again before the last one.

    BERT, L layers: 0 ... L/2 - 2 read all tokens; L/2 - 1 moves the kept ones, which attend to all; L/2 ... L - 2 read the
    kept ones alone; L - 1 all. Kept are the K tokens of a row whose id is most important:
        importance[id] <- 0.995 importance[id] + 0.005 (the update's mean loss where id was to be predicted)
    T5: each encoder layer but the first and last draws K columns of its own; the others pass it by.
    The last tenth of the budget drops nothing.

Cost: with K half a row 0.76 of BERT's layers at base (of the whole less, for the output is dear), and 5/12 less for T5's
encoder.
Finding: not in the study. Hou: a quarter cheaper at about the same GLUE, with rows of 512 tokens. At 128: unknown.
Where we differ: [UNK], [CLS], [SEP] and [MASK] are always kept, as in the release. Importance is updated once
an update, by the mean loss of an id (the release: the last loss of each), so that processes agree. Random-LTD
draws anew for each row and lets K grow; here all rows of an update share a draw and K is fixed, as in BERT.
"""

import torch

from methods.baseline import Method, Option, sum_over_processes

COLUMNS = 0xD309  # id of this random stream


class TokenDropping(Method):
    options = {
        "keep": Option(0.5, "share of a row's tokens that the middle layers read", minimum=0.01, maximum=1.0),
        "full_phase": Option(0.1, "share of the budget, at its end, that drops nothing", minimum=0.0, maximum=1.0),
    }
    turned_off = {model: dict(keep=1.0) for model in ("bert", "t5")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.importance = torch.full((self.config.vocabulary,), 10.0, device=self.config.device)
        self.importance[self.corpus.special_ids] = 1e4
        self.begin_update()

    def begin_update(self):
        self.sums, self.counts = torch.zeros_like(self.importance), torch.zeros_like(self.importance)

    def loss(self, batch, layers):
        width = batch["tokens"].shape[1]
        kept = max(1, round(self.config.options["keep"] * width))
        in_full_phase = self.clock.progress >= 1 - self.config.options["full_phase"]
        if kept == width or len(layers) < 2 or in_full_phase:
            return super().loss(batch, layers)
        if self.config.model == "t5":
            return self.t5_loss(batch, layers, kept)
        return self.bert_loss(batch, layers, kept)

    def bert_loss(self, batch, layers, count):
        model, half = self.model, len(layers) // 2
        with model.autocast():
            h = model.embed(batch["tokens"])
            importance = self.importance[batch["tokens"]]
            kept = importance.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
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
        with model.autocast():
            h, previous = model.embed_both(batch)
            bias = model.encoder_bias(h.shape[1])
            for index in layers:
                if index in (layers[0], layers[-1]):
                    h = model.layers[index].encoder(h, bias)
                    continue
                columns = torch.arange(h.shape[1], device=h.device)
                draws = self.corpus.uniform(COLUMNS, self.clock.updates, index, columns)
                kept = draws.argsort(stable=True)[:count].sort().values  # with their distances: (1, H, K, K)
                part = model.layers[index].encoder(h[:, kept], bias[:, :, kept][:, :, :, kept])
                h = h.index_copy(1, kept, part)
            logits = model.decode(previous, model.finish_encoder(h), layers=layers)
        return model.losses_of(logits, batch["labels"]).mean()

    def after_step(self):
        sum_over_processes([self.sums, self.counts])
        moved = 0.995 * self.importance + 0.005 * self.sums / self.counts.clamp(min=1)
        self.importance = torch.where(self.counts > 0, moved, self.importance)
        self.importance[self.corpus.special_ids] = 1e4

    def state_dict(self):
        return {"importance": self.importance}

    def load_state_dict(self, state):
        self.importance = state["importance"]
