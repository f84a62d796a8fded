"""The models: crammed BERT and T5 v1.1, self-contained.

A model here is a function of a batch (a dict of tensors that `data/corpus.py` makes):

    model.loss(batch)                    mean cross-entropy over all predicted tokens, a scalar
    model.loss(batch, per_example=True)  mean cross-entropy of each row, (B,)
    model.token_losses(batch)            cross-entropy of each predicted token, (B, P)
    model.logits(batch)                  scores of the predicted tokens, (B, P, V), in autocast's
                                         precision: `.float()` before a softmax

A method that walks the layers itself finds the parts of `logits` as functions: BERT's `embed`,
`layers`, `final_norm`, `predict`; T5's `embed_both`, `encoder_bias`, `layers`, `finish_encoder`,
`decode`.

Depth is a run-time choice: every call takes `layers`, the indices of the layers to run, in order;
without it the call runs `model.present_layers`, the layers that the model has now. An empty list is
no layer at all, not all of them. A layer of T5 is a pair, one of the encoder and one of the
decoder.

Shapes in comments: B rows, T tokens a row, P predicted tokens a row, C width, H heads, D width of a
head, V vocabulary.
"""

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError
from runs import read_tensors, write_tensors


@dataclass(frozen=True)
class BERTConfig:
    """The shape of a BERT. The defaults are crammed BERT ("c5", Geiping and Goldstein 2023) at
    base."""

    vocabulary_size: int = 32768
    n_layers: int = 16
    d_model: int = 768
    n_heads: int = 12
    d_ff: int = 1536  # width of the gated feed-forward layer
    max_length: int = 512  # of a row; the position table has no parameters
    dropout: float = 0.0  # pre-training runs without (as the study); fine-tuning sets 0.1


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for its feed-forward layer), at
    base."""

    vocabulary_size: int = 32128
    n_layers: int = 12  # in each of the two stacks
    d_model: int = 768
    n_heads: int = 12
    d_head: int = 64
    d_ff: int = 2048
    relative_buckets: int = 32
    relative_distance: int = 128  # beyond it all distances share the last bucket
    dropout: float = 0.0


SIZES = {
    "bert": {
        "tiny": dict(n_layers=4, d_model=256, n_heads=4, d_ff=512),
        "small": dict(n_layers=8, d_model=512, n_heads=8, d_ff=1024),
        "base": dict(n_layers=16, d_model=768, n_heads=12, d_ff=1536),
    },
    "t5": {
        "tiny": dict(n_layers=4, d_model=256, n_heads=4, d_ff=640),
        "small": dict(n_layers=8, d_model=512, n_heads=8, d_ff=1024),
        "base": dict(n_layers=12, d_model=768, n_heads=12, d_ff=2048),
    },
}


# -- Shared layers ---------------------------------------------------------------------------------

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


class Attention(nn.Module):
    """Multi-head attention without biases: softmax(q k^T * scale + bias) v.

    The releases make several of its projections with one matrix; separate matrices are the same
    function, and spare the backward pass a copy of all their gradients into one.

    Args:
        d_model, n_heads, d_head: width, number of heads, width of a head.
        scale: of the products; None is d_head^-1/2.
        dropout: on the attention weights.
    """

    def __init__(self, d_model, n_heads, d_head, scale=None, dropout=0.0):
        super().__init__()
        self.n_heads, self.scale, self.dropout = n_heads, scale, dropout
        self.query = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.key = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.value = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.output = nn.Linear(n_heads * d_head, d_model, bias=False)

    def split(self, x):
        """(B, T, H * D) -> (B, H, T, D)"""
        return x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)

    def keys_values(self, x):
        """What is attended to: (B, T, C) -> two of (B, H, T, D)."""
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x, keys_values=None, bias=None):
        """(B, T, C) -> (B, T, C), of x to itself, or to `keys_values`. `bias` is added to the
        products and broadcast to (B, H, T, T of the keys)."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q, dropout = self.split(self.query(x)), self.dropout if self.training else 0.0
        if bias is not None and bias.requires_grad and x.device.type == "cpu":
            y = attention_with_learned_bias(q, k, v, bias, self.scale, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale
            )
        return self.output(y.transpose(1, 2).flatten(2))


def attention_with_learned_bias(q, k, v, bias, scale=None, dropout=0.0):
    """scaled_dot_product_attention for a bias with a gradient: there torch has no fused kernel on a
    CPU, and its general path makes more passes over the (B, H, T, T) products than these."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    products = (q if scale == 1.0 else q * scale) @ k.transpose(-2, -1)
    weights = (products + bias).softmax(dim=-1)
    return F.dropout(weights, dropout, dropout > 0) @ v


def padding_bias(mask):
    """What a mask (B, T) bool adds to the attention products: 0 at tokens and -inf at padding, (B,
    1, 1, T); None for None."""
    return (
        None
        if mask is None
        else torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))[
            :, None, None, :
        ]
    )


class GatedFeedForward(nn.Module):
    """W_out(W_linear h * GELU(W_gate h)), without biases (Shazeer 2020, "GLU Variants Improve
    Transformer").

    `approximate`: "none" for the exact GELU, with erf (crammed BERT); "tanh" (T5).
    """

    def __init__(self, d_model, d_ff, approximate, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(d_model, d_ff, bias=False)
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.output = nn.Linear(d_ff, d_model, bias=False)
        self.approximate, self.dropout = approximate, dropout

    def forward(self, h):  # (B, T, C) -> (B, T, C)
        h = self.linear(h) * F.gelu(self.gate(h), approximate=self.approximate)
        return self.output(F.dropout(h, self.dropout, self.training))


class LanguageModel(nn.Module):
    """What the training loop needs of a model; `logits(batch, layers)`, `layers` and `embedding`
    are the subclass's.

    A batch holds `tokens` (B, T) int64, what the model reads; `labels` (B, P) int64, what it is to
    predict, -100 where there is nothing to predict; and what else the model needs.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.present_layers = list(range(config.n_layers))
        self.autocast_dtype = None  # None: fp32; torch.bfloat16 or torch.float16: autocast

    def autocast(self):
        """The mixed-precision context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.embedding.device.type, dtype=self.autocast_dtype)

    def loss(self, batch, layers=None, per_example=False):
        """Mean cross-entropy in nats over the predicted tokens, or per row with `per_example`:
        (B,)."""
        if per_example:
            return self.token_losses(batch, layers).sum(dim=1) / (batch["labels"] >= 0).sum(dim=1)
        return F.cross_entropy(
            self.logits(batch, layers).flatten(0, 1).float(), batch["labels"].flatten()
        )

    def token_losses(self, batch, layers=None):
        """Cross-entropy in nats of each predicted token, 0 where there is none: (B, P)."""
        return self.losses_of(self.logits(batch, layers), batch["labels"])

    @staticmethod
    def losses_of(logits, labels):
        """Cross-entropy in nats: (B, P, V), (B, P) -> (B, P)."""
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return losses.view(labels.shape)

    def compile_layers(self):
        """Compiles the layers one by one, so that another depth needs no other compilation."""
        for layer in self.modules():
            if isinstance(layer, (BERTLayer, T5EncoderLayer, T5DecoderLayer)):
                layer.compile()


# -- BERT ------------------------------------------------------------------------------------------


class BERTLayer(nn.Module):
    """A pre-norm Transformer layer: h + Attention(LN h), then h + FeedForward(LN h)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.attention = Attention(
            config.d_model, config.n_heads, config.d_model // config.n_heads, dropout=config.dropout
        )
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.feed_forward = GatedFeedForward(config.d_model, config.d_ff, "none")
        self.dropout = config.dropout

    def forward(self, h, bias=None, context=None):  # (B, T, C), (B, 1, 1, T) -> (B, T, C)
        """`context` (B, S, C): what h attends to, where that is not h itself."""
        x = self.attention_norm(h)
        keys_values = (
            None if context is None else self.attention.keys_values(self.attention_norm(context))
        )
        h = h + F.dropout(self.attention(x, keys_values, bias), self.dropout, self.training)
        return h + F.dropout(
            self.feed_forward(self.feed_forward_norm(h)), self.dropout, self.training
        )


def sinusoidal_positions(length, width):
    """The fixed sin/cos position table of "Attention is all you need" (section 3.5): (length,
    width)."""
    angle = torch.arange(length)[:, None] * torch.exp(
        torch.arange(0, width, 2) * (-math.log(10000.0) / width)
    )
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(length, width)


class BERT(LanguageModel):
    """Crammed BERT: pre-norm, no biases, gated GELU, sinusoidal positions with one learned scale, a
    linear head on the masked positions only, decoder tied to the embedding. At base it has
    120,179,713 parameters, the tied matrix counted once.

    A batch also holds `positions` (B, P) int64, the columns to predict.

    No attention mask in pre-training: its rows are full, and attention crosses document borders, as
    the study.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))  # tied
        self.position_scale = nn.Parameter(torch.empty(()))
        self.register_buffer(
            "position_table",
            sinusoidal_positions(config.max_length, config.d_model),
            persistent=False,
        )
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.layers = nn.ModuleList(BERTLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.head = nn.Linear(config.d_model, config.d_model, bias=False)
        self.initialise()

    @property
    def initial_std(self):
        """Of every matrix; `initialise` says why."""
        return 0.02 * (BERTConfig.d_model / self.config.d_model) ** 0.5

    @torch.no_grad()
    def initialise(self):
        """Every matrix N(0, 0.02^2) at the study's width of 768, not scaled with depth, and
        sqrt(768 / C) times as wide at width C, so that a narrow model's activations start as large
        as base's; norms 1 and 0; the position scale C^-1/2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.initial_std)
            elif name == "position_scale":
                nn.init.constant_(parameter, self.config.d_model**-0.5)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("norm.bias"):
                nn.init.zeros_(parameter)
            else:
                raise AssertionError(f"no initial value is defined for {name}")

    def embed(self, tokens):
        """What the first layer reads: (B, T) -> (B, T, C)."""
        if tokens.shape[1] > self.config.max_length:
            raise UserError(
                f"rows of {tokens.shape[1]} tokens: this model reads at most "
                f"{self.config.max_length}"
            )
        # padding_idx: as in the study, [PAD] (id 0) gets no gradient as an input, only as an
        # output.
        h = F.embedding(tokens, self.embedding, padding_idx=0)
        h = self.embedding_norm(h + self.position_scale * self.position_table[: tokens.shape[1]])
        return F.dropout(h, self.config.dropout, self.training)

    def encode(self, tokens, layers=None, mask=None):
        """Hidden states after the final norm: (B, T) -> (B, T, C). `mask` (B, T) bool is True at
        the tokens that are no padding; without it all are."""
        h, bias = self.embed(tokens), padding_bias(mask)
        for index in self.present_layers if layers is None else layers:
            h = self.layers[index](h, bias)
        return self.final_norm(h)

    def predict(self, h, positions):
        """Scores over the vocabulary at these columns, (B, T, C), (B, P) -> (B, P, V)."""
        h = h.gather(1, positions[:, :, None].expand(-1, -1, h.shape[-1]))
        return F.linear(self.head(h), self.embedding)

    def logits(self, batch, layers=None):
        """Scores over the vocabulary at the predicted positions: (B, P, V)."""
        with self.autocast():
            return self.predict(self.encode(batch["tokens"], layers), batch["positions"])

    def training_flops_per_row(self, row_length, predicted_per_row, layers=None):
        """Floating-point operations of one row's forward and backward: six for each layer weight
        and token and for each head and decoder weight and predicted token, and the two attention
        products."""
        layers = self.present_layers if layers is None else layers
        c = self.config
        layer_weights = 4 * c.d_model**2 + 3 * c.d_model * c.d_ff
        output_weights = c.d_model**2 + c.vocabulary_size * c.d_model
        attention = 3 * 2 * 2 * row_length**2 * c.d_model
        return (
            len(layers) * (6 * layer_weights * row_length + attention)
            + 6 * output_weights * predicted_per_row
        )


# -- T5 --------------------------------------------------------------------------------------------


class T5EncoderLayer(nn.Module):
    """h + SelfAttention(norm h), then h + FeedForward(norm h)."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.attention_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.attention = Attention(c.d_model, c.n_heads, c.d_head, scale=1.0, dropout=c.dropout)
        self.feed_forward_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.feed_forward = GatedFeedForward(c.d_model, c.d_ff, "tanh", c.dropout)
        self.dropout = c.dropout

    def forward(self, h, bias):  # (B, T, C), (1 or B, H, T, T) -> (B, T, C)
        h = h + F.dropout(
            self.attention(self.attention_norm(h), bias=bias), self.dropout, self.training
        )
        return h + F.dropout(
            self.feed_forward(self.feed_forward_norm(h)), self.dropout, self.training
        )


class T5DecoderLayer(T5EncoderLayer):
    """An encoder layer with attention to the encoder's output in its middle."""

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.cross_attention_norm = nn.RMSNorm(c.d_model, eps=1e-6)
        self.cross_attention = Attention(
            c.d_model, c.n_heads, c.d_head, scale=1.0, dropout=c.dropout
        )

    def forward(self, h, encoded, bias, cross_bias=None, cache=None):
        """(B, P, C) -> (B, P, C).

        Args:
            encoded: the encoder's output, (B, T, C).
            bias: of the self-attention, (1, H, P, P), with -inf where it may not look.
            cross_bias: of the attention to `encoded`, broadcast to (B, H, P, T): -inf at padding.
            cache: a dictionary of this layer's for generation: keys and values of the positions
                before h.
        """
        x = self.attention_norm(h)
        keys_values = self.attention.keys_values(x)
        if cache is not None:
            if "self" in cache:
                keys_values = [
                    torch.cat([old, new], dim=2) for old, new in zip(cache["self"], keys_values)
                ]
            cache["self"] = keys_values
        h = h + F.dropout(self.attention(x, keys_values, bias), self.dropout, self.training)
        if cache is None or "cross" not in cache:
            keys_values = self.cross_attention.keys_values(encoded)
            if cache is not None:
                cache["cross"] = keys_values
        else:
            keys_values = cache["cross"]
        h = h + F.dropout(
            self.cross_attention(self.cross_attention_norm(h), keys_values, cross_bias),
            self.dropout,
            self.training,
        )
        return h + F.dropout(
            self.feed_forward(self.feed_forward_norm(h)), self.dropout, self.training
        )


class T5LayerPair(nn.Module):
    """One layer of each stack: they come and go together."""

    def __init__(self, config):
        super().__init__()
        self.encoder = T5EncoderLayer(config)
        self.decoder = T5DecoderLayer(config)


def relative_buckets(queries, keys, config, bidirectional):
    """T5's bucket of every distance key - query: (len(queries), len(keys)) int64, from two lists of
    positions. Near distances have a bucket each; farther ones share buckets on a logarithmic
    scale."""
    distance = keys[None, :] - queries[:, None]
    buckets = config.relative_buckets
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # In fp32, as the original: at a few distances the rounding decides the bucket.
    scale = torch.log(distance.clamp(min=1).float() / exact) / math.log(
        config.relative_distance / exact
    )
    far = (exact + (scale * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5(LanguageModel):
    """T5 v1.1: encoder and decoder, pre-norm with RMSNorm, no biases, gated GELU, relative
    positions, unscaled attention and logits, output matrix of its own. At base it has 247,577,856
    parameters.

    The table of relative positions belongs to its stack, once, so that dropping a layer leaves it
    (the study's release has one in every layer).

    A batch may also hold `mask` (B, T) bool, True at the tokens that are no padding.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))
        self.encoder_positions = nn.Parameter(torch.empty(config.relative_buckets, config.n_heads))
        self.decoder_positions = nn.Parameter(torch.empty(config.relative_buckets, config.n_heads))
        self.layers = nn.ModuleList(T5LayerPair(config) for _ in range(config.n_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.decoder_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.vocabulary_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """T5 v1.1's (Raffel et al. 2020): N(0, 1) for embedding and head; every other matrix by its
        fan-in, the queries also by the head's width (in place of scaled products); norms 1."""
        c = self.config
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name in ("embedding", "head.weight"):
                nn.init.normal_(parameter, std=1.0)
            elif name.endswith("_positions"):
                nn.init.normal_(parameter, std=c.d_model**-0.5)
            elif name.endswith("query.weight"):
                nn.init.normal_(parameter, std=(c.d_model * c.d_head) ** -0.5)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def position_bias(self, table, queries, keys, bidirectional):
        """What distance adds to the attention products: (1, H, len(queries), len(keys))."""
        buckets = relative_buckets(queries, keys, self.config, bidirectional)
        # Contiguous, or a GPU's fused attention kernels refuse it.
        bias = F.embedding(buckets, table).permute(2, 0, 1).contiguous()[None]
        if not bidirectional:
            bias = bias.masked_fill(keys[None, :] > queries[:, None], float("-inf"))
        return bias

    def embed(self, tokens):
        """What the first layers read: (B, T) -> (B, T, C)."""
        return F.dropout(F.embedding(tokens, self.embedding), self.config.dropout, self.training)

    def embed_both(self, batch):
        """What the first layers of both stacks read: (B, T, C), and of the labels before each (B,
        P, C)."""
        tokens, labels = batch["tokens"], batch["labels"]
        previous = F.pad(labels[:, :-1].clamp(min=0), (1, 0))  # starts with [PAD], id 0
        # One look-up for both stacks, because its gradient is as large as the embedding; of flat
        # tokens, so that both parts are contiguous, as what the layers give each other (to a
        # compiler that matters).
        h = self.embed(torch.cat([tokens.flatten(), previous.flatten()]))
        read, previous = h.split([tokens.numel(), labels.numel()])
        return read.view(*tokens.shape, -1), previous.view(*labels.shape, -1)

    def encoder_bias(self, length):
        """Of the encoder's self-attention: (1, H, length, length)."""
        places = torch.arange(length, device=self.embedding.device)
        return self.position_bias(self.encoder_positions, places, places, bidirectional=True)

    def finish_encoder(self, h):
        """From the last layer's output to what the decoder attends to: (B, T, C) -> (B, T, C)."""
        return F.dropout(self.encoder_norm(h), self.config.dropout, self.training)

    def encode(self, h, padding=None, layers=None):
        """The encoder's output for embedded tokens: (B, T, C) -> (B, T, C)."""
        bias = self.encoder_bias(h.shape[1])
        bias = bias if padding is None else bias + padding
        for index in self.present_layers if layers is None else layers:
            h = self.layers[index].encoder(h, bias)
        return self.finish_encoder(h)

    def decode(self, h, encoded, padding=None, layers=None, caches=None):
        """Scores of the next tokens, for embedded ones: (B, P, C) -> (B, P, V). With `caches` (a
        dictionary for every layer) `h` goes on where the call before ended."""
        layers = self.present_layers if layers is None else layers
        before = 0
        if caches is not None and layers and "self" in caches[layers[0]]:
            before = caches[layers[0]]["self"][0].shape[2]
        keys = torch.arange(before + h.shape[1], device=h.device)
        bias = self.position_bias(self.decoder_positions, keys[before:], keys, bidirectional=False)
        for index in layers:
            h = self.layers[index].decoder(h, encoded, bias, padding, caches and caches[index])
        return self.head(F.dropout(self.decoder_norm(h), self.config.dropout, self.training))

    def logits(self, batch, layers=None):
        """Scores over the vocabulary for every label: (B, P, V)."""
        with self.autocast():
            padding = padding_bias(batch.get("mask"))
            read, previous = self.embed_both(batch)
            return self.decode(previous, self.encode(read, padding, layers), padding, layers)

    @torch.no_grad()
    def generate(self, batch, max_length, end=1, use_cache=True):
        """Greedy decoding: (B, at most `max_length`) int64, the tokens up to the one with id `end`,
        then zeros. Stops when every row has ended."""
        with self.autocast():
            padding = padding_bias(batch.get("mask"))
            encoded = self.encode(self.embed(batch["tokens"]), padding)
            caches = {index: {} for index in self.present_layers} if use_cache else None
            tokens = torch.zeros(len(encoded), 1, dtype=torch.long, device=encoded.device)
            ended = torch.zeros(len(encoded), dtype=torch.bool, device=encoded.device)
            for _ in range(max_length):
                read = tokens[:, -1:] if use_cache else tokens
                best = self.decode(self.embed(read), encoded, padding, caches=caches)[:, -1].argmax(
                    dim=-1
                )
                tokens = torch.cat([tokens, best.masked_fill(ended, 0)[:, None]], dim=1)
                ended |= best == end
                if ended.all():
                    break
            return tokens[:, 1:]

    def training_flops_per_row(self, row_length, predicted_per_row, layers=None):
        """As BERT's: six for each weight and token that it multiplies, and the attention
        products."""
        layers = self.present_layers if layers is None else layers
        c, T, P = self.config, row_length, predicted_per_row
        inner = c.n_heads * c.d_head
        attention, feed_forward = 4 * c.d_model * inner, 3 * c.d_model * c.d_ff
        # The cross-attention makes its keys and values of the encoder's T tokens.
        weights = (
            T * (attention + feed_forward)
            + P * (attention + attention // 2 + feed_forward)
            + T * attention // 2
        )
        products = 2 * 2 * inner * (T * T + P * P + P * T)
        return len(layers) * (6 * weights + 3 * products) + 6 * P * c.d_model * c.vocabulary_size


MODELS = {"bert": (BERT, BERTConfig), "t5": (T5, T5Config)}


def build(name, size, vocabulary_size):
    """A freshly initialised model: `name` is a key of SIZES, `size` one of its sizes."""
    model, config = MODELS[name]
    return model(config(vocabulary_size=vocabulary_size, **SIZES[name][size]))


def save(model, path):
    """Writes the weights, with the configuration that `load` needs, to a new file that replaces
    `path`."""
    name = next(name for name, (cls, _) in MODELS.items() if isinstance(model, cls))
    stored = {
        "model": name,
        "config": dataclasses.asdict(model.config),
        "present_layers": model.present_layers,
        "weights": model.state_dict(),
    }
    write_tensors(path, stored)


def load(path, device="cpu", **changes):
    """The model of a `model.pt`, in evaluation mode; `changes` replace fields of its
    configuration."""
    stored = read_tensors(path, ("model", "config", "present_layers", "weights"), device)
    model, config = MODELS[stored["model"]]
    model = model(config(**stored["config"] | changes)).to(device)
    model.load_state_dict(stored["weights"])
    model.present_layers = stored["present_layers"]
    return model.eval()


# -- T5 in the folder format of transformers -------------------------------------------------------


def transformers_names(layers):
    """Our names of T5's parameters -> those of transformers' T5ForConditionalGeneration, for the
    layers with these indices, numbered anew from 0."""
    names = {
        "embedding": "shared.weight",
        "encoder_positions": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder_positions": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder_norm.weight": "encoder.final_layer_norm.weight",
        "decoder_norm.weight": "decoder.final_layer_norm.weight",
        "head.weight": "lm_head.weight",
    }
    attention = {"query": "q", "key": "k", "value": "v", "output": "o"}
    feed_forward = {"gate": "wi_0", "linear": "wi_1", "output": "wo"}
    parts = {
        "attention": ("SelfAttention", attention),
        "cross_attention": ("EncDecAttention", attention),
    }
    parts["feed_forward"] = ("DenseReluDense", feed_forward)
    for number, index in enumerate(layers):
        for stack, order in (
            ("encoder", ["attention", "feed_forward"]),
            ("decoder", ["attention", "cross_attention", "feed_forward"]),
        ):
            for place, part in enumerate(order):
                ours, theirs = (
                    f"layers.{index}.{stack}.{part}",
                    f"{stack}.block.{number}.layer.{place}",
                )
                names[f"{ours}_norm.weight"] = f"{theirs}.layer_norm.weight"
                their_part, matrices = parts[part]
                names |= {
                    f"{ours}.{mine}.weight": f"{theirs}.{their_part}.{its}.weight"
                    for mine, its in matrices.items()
                }
    return names


def safetensors():
    """The optional package that reads and writes the weights of such folders."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "the transformers folder format needs one more package: pip install safetensors"
        ) from None
    return safetensors.torch


def save_transformers(model, folder):
    """Writes a T5, the layers that are present, as config.json and model.safetensors: what
    transformers' `T5ForConditionalGeneration.from_pretrained(folder)` reads."""
    c, folder = model.config, Path(folder)
    weights = {
        theirs: model.get_parameter(ours).detach().cpu().contiguous()
        for ours, theirs in transformers_names(model.present_layers).items()
    }
    depth = len(model.present_layers)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": c.vocabulary_size,
        "d_model": c.d_model,
        "d_kv": c.d_head,
        "d_ff": c.d_ff,
        "num_layers": depth,
        "num_decoder_layers": depth,
        "num_heads": c.n_heads,
        "relative_attention_num_buckets": c.relative_buckets,
        "relative_attention_max_distance": c.relative_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "dropout_rate": c.dropout,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "dtype": "float32",
    }
    save_file = safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_transformers(folder, device="cpu", **changes):
    """The T5 of such a folder (T5 v1.1's architecture, as google/t5-v1_1-base), in evaluation mode;
    its weights are `model.safetensors` or `pytorch_model.bin`. `changes` replace fields of the
    configuration."""
    folder = Path(folder)
    try:
        stored = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no readable config.json, so not a folder of transformers ({error})"
        ) from None
    for name, value in {"model_type": "t5", "feed_forward_proj": "gated-gelu"}.items():
        if stored.get(name) != value:
            raise UserError(
                f"{folder}/config.json: {name} is {stored.get(name)!r}; T5 v1.1 has {value!r}"
            )
    # "Not tied" is how T5 v1.1 says that its logits are not scaled; transformers 5 writes it by
    # another name.
    if stored.get("scale_decoder_outputs", stored.get("tie_word_embeddings", True)):
        raise UserError(
            f"{folder}/config.json: tie_word_embeddings is not false; this is the first T5, not "
            "v1.1"
        )
    if stored.get("num_decoder_layers", stored["num_layers"]) != stored["num_layers"]:
        raise UserError(
            f"{folder}/config.json: {stored['num_layers']} encoder and "
            f"{stored['num_decoder_layers']} decoder layers; here both stacks are as deep"
        )
    fields = {
        "vocabulary_size": "vocab_size",
        "n_layers": "num_layers",
        "d_model": "d_model",
        "n_heads": "num_heads",
        "d_head": "d_kv",
        "d_ff": "d_ff",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_distance": "relative_attention_max_distance",
    }
    config = T5Config(
        **{ours: stored[theirs] for ours, theirs in fields.items() if theirs in stored} | changes
    )
    if (folder / "model.safetensors").exists():
        weights = safetensors().load_file(folder / "model.safetensors")
    else:
        weights = read_tensors(folder / "pytorch_model.bin", ())
    names = transformers_names(range(config.n_layers))
    # As transformers 5 writes it: one matrix is saved if both are the same.
    if stored.get("tie_word_embeddings", True):
        weights.setdefault("lm_head.weight", weights.get("shared.weight"))
    if missing := [theirs for theirs in names.values() if theirs not in weights]:
        raise UserError(f"{folder}: its weights have no {missing[0]}")
    model = T5(config)
    try:
        model.load_state_dict({ours: weights[theirs].float() for ours, theirs in names.items()})
    except RuntimeError as error:
        raise UserError(
            f"{folder}: its weights do not fit its config.json "
            f"({str(error).splitlines()[-1].strip()})"
        ) from None
    return model.to(device).eval()
