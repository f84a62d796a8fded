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
import math
from dataclasses import dataclass

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
    learned_position_scale: bool = True  # of the position table; else it keeps its initial value
    dropout: float = 0.0  # pre-training runs without (as in the study); fine-tuning sets 0.1


@dataclass(frozen=True)
class T5Config:
    """The shape and initial values of a T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for its
    feed-forward layer), at base."""

    vocabulary_size: int = 32128
    n_layers: int = 12  # in each of the two stacks
    d_model: int = 768
    n_heads: int = 12
    d_head: int = 64
    d_ff: int = 2048
    relative_buckets: int = 32
    relative_distance: int = 128  # beyond it all distances share the last bucket
    # Initial standard deviations, of the tables of relative positions (None: d_model^-1/2) and of
    # the output matrix.
    position_std: float | None = None
    head_std: float = 1.0
    dropout: float = 0.0


SIZES = {
    "bert": {
        "tiny": dict(n_layers=4, d_model=128, n_heads=4, d_ff=256, learned_position_scale=False),
        "small": dict(n_layers=8, d_model=512, n_heads=8, d_ff=1024, learned_position_scale=False),
        "base": dict(n_layers=16, d_model=768, n_heads=12, d_ff=1536),
    },
    "t5": {
        "tiny": dict(
            n_layers=4, d_model=64, n_heads=2, d_head=32, d_ff=160, position_std=4.0, head_std=0.125
        ),
        "small": dict(n_layers=8, d_model=512, n_heads=8, d_ff=1024),
        "base": dict(n_layers=12, d_model=768, n_heads=12, d_ff=2048),
    },
}


# -- Shared layers ---------------------------------------------------------------------------------

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


def project(x, *linears):
    """Applies several linear layers without biases to the same x; returns a list.

    A GPU multiplies by all their matrices as one, because larger products are faster there. On a
    CPU they are not, and the backward pass would have to copy the gradient of each into one.
    """
    if x.device.type == "cpu":
        return [linear(x) for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    return F.linear(x, weight).split([linear.out_features for linear in linears], dim=-1)


def cross_entropy(logits, labels, reduction="mean"):
    """In nats, (B, P, V) and (B, P) -> 0-dim, or (B * P,) with reduction "none"."""
    # In fp32, whatever the layers compute in: bf16 has three digits, too few for a sum over V.
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)


class Attention(nn.Module):
    """Multi-head attention without biases: softmax(q k^T * scale + bias) v.

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

    def heads(self, x, *linears):
        """Applies these layers to x, in heads: (B, T, C) -> a (B, H, T, D) for each."""
        shape = (*x.shape[:2], self.n_heads, -1)
        return [y.view(shape).transpose(1, 2) for y in project(x, *linears)]

    def keys_values(self, x):
        """The keys and values of x: (B, T, C) -> two of (B, H, T, D)."""
        return self.heads(x, self.key, self.value)

    def forward(self, x, keys_values=None, bias=None):
        """(B, T, C) -> (B, T, C), of x to itself, or to `keys_values`. `bias` is added to the
        products and broadcast to (B, H, T, T of the keys)."""
        if keys_values is None:
            k, v, q = self.heads(x, self.key, self.value, self.query)
        else:
            (q,), (k, v) = self.heads(x, self.query), keys_values
        dropout = self.dropout if self.training else 0.0
        attention = F.scaled_dot_product_attention  # fused: the T x T products are never stored
        if bias is not None and bias.requires_grad and x.device.type == "cpu":
            attention = attention_with_learned_bias
        y = attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return self.output(y.transpose(1, 2).flatten(2))


def attention_with_learned_bias(q, k, v, attn_mask, dropout_p, scale):
    """scaled_dot_product_attention for a bias with a gradient: there torch has no fused kernel on a
    CPU, and its general path makes more passes over the (B, H, T, T) products than these."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    products = (q if scale == 1.0 else q * scale) @ k.transpose(-2, -1)
    weights = (products + attn_mask).softmax(dim=-1)
    return F.dropout(weights, dropout_p, dropout_p > 0) @ v


def padding_bias(mask):
    """What a mask (B, T) bool adds to the attention products: 0 at tokens and -inf at padding,
    (B, 1, 1, T); None for None."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return bias[:, None, None, :]


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
        self.approximate, self.dropout = approximate, nn.Dropout(dropout)

    def forward(self, h):  # (B, T, C) -> (B, T, C)
        h, gate = project(h, self.linear, self.gate)
        h = h * F.gelu(gate, approximate=self.approximate)
        return self.output(self.dropout(h))


class LanguageModel(nn.Module):
    """Both models' loss, precision and compilation. A subclass has `logits(batch, layers)`,
    `layers` and `embedding`.

    `work_per_token`: tokens that a layer processes for each that is read (T5's has a decoder).

    A batch holds `tokens` (B, T) int64, what the model reads; `labels` (B, P) int64, what it is to
    predict, -100 where there is nothing to predict; and what else the model needs.
    """

    work_per_token = 1.0

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.present_layers = list(range(config.n_layers))
        self.autocast_dtype = None  # None: fp32; torch.bfloat16 or torch.float16: autocast
        self.cross_entropy = cross_entropy  # or a compiled one

    def autocast(self):
        """The mixed-precision context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.embedding.device.type, dtype=self.autocast_dtype)

    def loss(self, batch, layers=None, per_example=False):
        """Mean cross-entropy in nats over the predicted tokens, or per row with `per_example`:
        (B,)."""
        labels = batch["labels"]
        if per_example:
            return self.token_losses(batch, layers).sum(dim=1) / (labels >= 0).sum(dim=1)
        return self.cross_entropy(self.logits(batch, layers), labels)

    def token_losses(self, batch, layers=None):
        """Cross-entropy in nats of each predicted token, 0 where there is none: (B, P)."""
        return self.losses_of(self.logits(batch, layers), batch["labels"])

    def losses_of(self, logits, labels):
        """Cross-entropy in nats: (B, P, V), (B, P) -> (B, P)."""
        return self.cross_entropy(logits, labels, "none").view(labels.shape)

    def training_bytes_per_row(self, row_length):
        """An estimate of the GPU memory that a row's forward and backward pass needs: 15 bytes (25
        in fp32) for each token, layer and unit of its two widths, and 12 for each score, if a
        quarter of the tokens are predicted. (Fitted to measurements, not compiled; the tests repeat
        them.)"""
        c, numbers = self.config, 25 if self.autocast_dtype is None else 15
        in_layers = numbers * c.n_layers * (c.d_model + c.d_ff) * row_length * self.work_per_token
        return in_layers + 12 * c.vocabulary_size * row_length / 4

    def compile_parts(self):
        """Compiles the layers one by one, so that another depth needs no other compilation, and the
        loss, which then never stores the logits in fp32. Each shape has a graph of its own."""
        # Above it torch would silently go on without compiling. A run has about five shapes, one
        # whose method changes rows some dozens.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
        for layer in self.modules():
            if isinstance(layer, (BERTLayer, T5EncoderLayer, T5DecoderLayer)):
                layer.compile(dynamic=False)
        self.cross_entropy = torch.compile(cross_entropy, dynamic=False)


# -- BERT ------------------------------------------------------------------------------------------


class BERTLayer(nn.Module):
    """A pre-norm Transformer layer: h + Attention(LN h), then h + FeedForward(LN h)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        d_head = config.d_model // config.n_heads
        self.attention = Attention(config.d_model, config.n_heads, d_head, dropout=config.dropout)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.feed_forward = GatedFeedForward(config.d_model, config.d_ff, "none")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, bias=None, context=None):  # (B, T, C), (B, 1, 1, T) -> (B, T, C)
        """`context` (B, S, C): what h attends to, where that is not h itself."""
        x, keys_values = self.attention_norm(h), None
        if context is not None:
            keys_values = self.attention.keys_values(self.attention_norm(context))
        h = h + self.dropout(self.attention(x, keys_values, bias))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))


def sinusoidal_positions(length, width):
    """The fixed sin/cos position table of "Attention is all you need" (section 3.5): (length,
    width)."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequencies
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(length, width)


class BERT(LanguageModel):
    """Crammed BERT: pre-norm, no biases but the norms', gated GELU, sinusoidal positions times one
    scale (C^-1/2 at first), a linear head on the masked positions only, decoder tied to the
    embedding. At base it has 120,179,713 parameters, the tied matrix counted once.

    At base the scale is learned, as in the study. As long as no layer attends to neighbours,
    positions are noise, and the gradient shrinks the scale; Adam's steps, which are as large as the
    rate, soon bring one number to zero. Then no layer sees positions, and BERT may stay a bag of
    words for all of a short run. So tiny and small keep its initial value.

    A batch also holds `positions` (B, P) int64, the columns to predict. Pre-training has no
    attention mask: its rows are full, and attention crosses document borders, as in the study.
    """

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))  # tied
        if config.learned_position_scale:
            self.position_scale = nn.Parameter(torch.empty(()))
        else:
            self.register_buffer("position_scale", torch.empty(()))
        # Not among the saved weights: it is the same for every model of this shape.
        positions = sinusoidal_positions(config.max_length, config.d_model)
        self.register_buffer("position_table", positions, persistent=False)
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.layers = nn.ModuleList(BERTLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.head = nn.Linear(config.d_model, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.initialise()

    @property
    def initial_std(self):
        """Of every matrix; `initialise` says why."""
        return 0.02 * (BERTConfig.d_model / self.config.d_model) ** 0.5

    @torch.no_grad()
    def initialise(self):
        """Every matrix N(0, 0.02^2) at the study's width of 768, not scaled with depth. At width C
        the deviation is sqrt(768 / C) times as large, so that a narrow model's activations start as
        large as base's. Norms 1 and 0, the position scale C^-1/2."""
        self.position_scale.fill_(self.config.d_model**-0.5)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.initial_std)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("norm.bias"):
                nn.init.zeros_(parameter)
            elif name != "position_scale":
                raise AssertionError(f"no initial value is defined for {name}")

    def embed(self, tokens):
        """What the first layer reads: (B, T) -> (B, T, C)."""
        length, most = tokens.shape[1], self.config.max_length
        if length > most:
            raise UserError(f"rows of {length} tokens: this model reads at most {most}")
        # As in the study, [PAD] (id 0) gets a gradient from the output only, not as an input.
        h = F.embedding(tokens, self.embedding, padding_idx=0)
        h = self.embedding_norm(h + self.position_scale * self.position_table[:length])
        return self.dropout(h)

    def encode(self, tokens, layers=None, mask=None):
        """Hidden states after the final norm: (B, T) -> (B, T, C). `mask` (B, T) bool is True at
        the tokens that are no padding; without it all are."""
        h, bias = self.embed(tokens), padding_bias(mask)
        for index in self.present_layers if layers is None else layers:
            h = self.layers[index](h, bias)
        return self.final_norm(h)

    def predict(self, h, positions):
        """Scores over the vocabulary at these columns, (B, T, C), (B, P) -> (B, P, V)."""
        # Only these reach the decoder, by far the largest matrix: at base 19 columns of 128.
        h = h.gather(1, positions[:, :, None].expand(-1, -1, h.shape[-1]))
        return F.linear(self.head(h), self.embedding)

    def logits(self, batch, layers=None):
        """Scores over the vocabulary at the predicted positions: (B, P, V)."""
        with self.autocast():
            return self.predict(self.encode(batch["tokens"], layers), batch["positions"])

    def training_flops_per_row(self, row_length, predicted_per_row, layers=None):
        """Floating-point operations of one row's forward and backward pass: six for each weight of
        a layer and token, and for each weight of head and decoder and predicted token, and what the
        two attention products take."""
        layers, c = self.present_layers if layers is None else layers, self.config
        # A multiply and an add for each weight forward, and twice as many backward: for the
        # gradient of its input and for its own.
        layer_weights = 4 * c.d_model**2 + 3 * c.d_model * c.d_ff
        output_weights = c.d_model**2 + c.vocabulary_size * c.d_model
        attention = 3 * 2 * 2 * row_length**2 * c.d_model
        in_layers = len(layers) * (6 * layer_weights * row_length + attention)
        return in_layers + 6 * output_weights * predicted_per_row


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
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, h, bias):  # (B, T, C), (1 or B, H, T, T) -> (B, T, C)
        h = h + self.dropout(self.attention(self.attention_norm(h), bias=bias))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))


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
                before h, and of `encoded`.
        """
        x, keys_values = self.attention_norm(h), None
        if cache is not None:
            keys_values = self.attention.keys_values(x)
            if "self" in cache:
                pairs = zip(cache["self"], keys_values)
                keys_values = [torch.cat(pair, dim=2) for pair in pairs]
            cache["self"] = keys_values
        h = h + self.dropout(self.attention(x, keys_values, bias))
        cache = {} if cache is None else cache
        if "cross" not in cache:
            cache["cross"] = self.cross_attention.keys_values(encoded)
        x = self.cross_attention_norm(h)
        h = h + self.dropout(self.cross_attention(x, cache["cross"], cross_bias))
        return h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))


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
    distance, buckets, offset = keys[None, :] - queries[:, None], config.relative_buckets, 0
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # In fp32, as the original: at a few distances the rounding decides the bucket.
    scale = torch.log(distance.clamp(min=1).float() / exact)
    scale = scale / math.log(config.relative_distance / exact)
    far = (exact + (scale * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5(LanguageModel):
    """T5 v1.1: encoder and decoder, pre-norm with RMSNorm, no biases, gated GELU, relative
    positions, unscaled attention and logits, output matrix of its own. At base it has 247,577,856
    parameters.

    The table of relative positions belongs to its stack, once, so that dropping a layer leaves it
    (the study's release has one in every layer). At tiny it begins so wide that every head attends
    to a few distances, and not to all tokens alike: otherwise T5 may stay a bag of words for all of
    a short run.

    A batch may also hold `mask` (B, T) bool, True at the tokens that are no padding.
    """

    work_per_token = 1.5  # the decoder's share, with keys and values of the encoder's output

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))
        self.encoder_positions = nn.Parameter(torch.empty(config.relative_buckets, config.n_heads))
        self.decoder_positions = nn.Parameter(torch.empty(config.relative_buckets, config.n_heads))
        self.layers = nn.ModuleList(T5LayerPair(config) for _ in range(config.n_layers))
        self.encoder_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.decoder_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.vocabulary_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """T5 v1.1's (Raffel et al. 2020) unless `config` sets others: N(0, 1) for embedding and
        head; d_model^-1/2 for the tables of relative positions; every other matrix by its fan-in,
        the queries also by the head's width (in place of scaled products); norms 1."""
        c = self.config
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name == "embedding":
                nn.init.normal_(parameter, std=1.0)
            elif name == "head.weight":
                nn.init.normal_(parameter, std=c.head_std)
            elif name.endswith("_positions"):
                std = c.d_model**-0.5 if c.position_std is None else c.position_std
                nn.init.normal_(parameter, std=std)
            elif name.endswith("query.weight"):
                nn.init.normal_(parameter, std=(c.d_model * c.d_head) ** -0.5)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def position_bias(self, table, queries, keys, bidirectional):
        """What distance adds to the attention products: (1, H, len(queries), len(keys))."""
        buckets = relative_buckets(queries, keys, self.config, bidirectional)
        # A GPU's fused attention kernels refuse it unless its last stride is 1, even of one column.
        bias = F.embedding(buckets, table).permute(2, 0, 1)
        bias = bias.clone(memory_format=torch.contiguous_format)[None]
        if not bidirectional:
            bias = bias.masked_fill(keys[None, :] > queries[:, None], float("-inf"))
        return bias

    def embed(self, tokens):
        """What the first layers read: (B, T) -> (B, T, C)."""
        return self.dropout(F.embedding(tokens, self.embedding))

    def embed_both(self, batch):
        """What the first layers of both stacks read: the tokens (B, T, C), and for each label the
        one before it (B, P, C)."""
        tokens, labels = batch["tokens"], batch["labels"]
        previous = F.pad(labels[:, :-1].clamp(min=0), (1, 0))  # starts with <pad>, id 0
        # One look-up for both stacks, because its gradient is as large as the embedding. The tokens
        # are flat, so that both parts are contiguous, as every later layer's input is: a compiled
        # layer would be compiled again for another layout.
        h = self.embed(torch.cat([tokens.flatten(), previous.flatten()]))
        read, previous = h.split([tokens.numel(), labels.numel()])
        return read.view(*tokens.shape, -1), previous.view(*labels.shape, -1)

    def encoder_bias(self, length):
        """Of the encoder's self-attention: (1, H, length, length)."""
        places = torch.arange(length, device=self.embedding.device)
        return self.position_bias(self.encoder_positions, places, places, bidirectional=True)

    def finish_encoder(self, h):
        """From the last layer's output to what the decoder attends to: (B, T, C) -> (B, T, C)."""
        h = self.dropout(self.encoder_norm(h))
        return h.to(self.autocast_dtype or h.dtype)  # once, not in every layer of the decoder

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
        # In training h is the whole row; in generation the newest token, whose keys and values join
        # those of the tokens before it.
        keys = torch.arange(before + h.shape[1], device=h.device)
        bias = self.position_bias(self.decoder_positions, keys[before:], keys, bidirectional=False)
        for index in layers:
            h = self.layers[index].decoder(h, encoded, bias, padding, caches and caches[index])
        return self.head(self.dropout(self.decoder_norm(h)))

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
                scores = self.decode(self.embed(read), encoded, padding, caches=caches)
                best = scores[:, -1].argmax(dim=-1)
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
        weights = T * (attention + feed_forward) + P * (attention + feed_forward)
        # The cross-attention makes its keys and values of the encoder's T tokens.
        weights += P * attention // 2 + T * attention // 2
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
