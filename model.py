"""The models: crammed BERT, self-contained.

A model here is a function of a batch (a dict of tensors that `data/corpus.py` makes):

    model.loss(batch)                    mean cross-entropy over all predicted tokens, a scalar
    model.loss(batch, per_example=True)  mean cross-entropy of each row, (B,)
    model.logits(batch)                  scores of the predicted positions only

Depth is a run-time choice: every call takes `layers`, the indices of the layers to run, in order;
without it the call runs `model.present_layers`, the layers that the model has now. An empty list is no
layer at all, not all of them.

Shapes in comments: B rows, T tokens a row, P predicted tokens a row, C width, H heads, D width of a
head, V vocabulary.
"""

import contextlib
import dataclasses
import math
import os
import pickle
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError


@dataclass(frozen=True)
class BERTConfig:
    """The shape of a BERT. The defaults are crammed BERT ("c5", Geiping and Goldstein 2023) at base."""

    vocabulary_size: int = 32768
    n_layers: int = 16
    d_model: int = 768
    n_heads: int = 12
    d_ff: int = 1536  # width of the gated feed-forward layer
    max_length: int = 512  # of a row; the position table has no parameters
    dropout: float = 0.0  # pre-training runs without (as the study); fine-tuning sets 0.1


SIZES = {
    "bert": {
        "tiny": dict(n_layers=4, d_model=256, n_heads=4, d_ff=512),
        "small": dict(n_layers=8, d_model=512, n_heads=8, d_ff=1024),
        "base": dict(n_layers=16, d_model=768, n_heads=12, d_ff=1536),
    },
}


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention without biases.

    The release makes queries, keys and values with one matrix; three matrices are the same function,
    and spare the backward pass a copy of all three gradients into one.
    """

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).view(B, T, self.n_heads, -1).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).reshape(B, T, C))


class GatedFeedForward(nn.Module):
    """W_out(W_linear h * GELU(W_gate h)), without biases. The release stacks the two input matrices."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.output = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, h):  # (B, T, C) -> (B, T, C)
        return self.output(self.linear(h) * F.gelu(self.gate(h)))  # the exact GELU, with erf


class BERTLayer(nn.Module):
    """A pre-norm Transformer layer: h + Attention(LN h), then h + FeedForward(LN h)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.feed_forward = GatedFeedForward(config)
        self.dropout = config.dropout

    def forward(self, h):  # (B, T, C) -> (B, T, C)
        h = h + F.dropout(self.attention(self.attention_norm(h)), self.dropout, self.training)
        return h + F.dropout(self.feed_forward(self.feed_forward_norm(h)), self.dropout, self.training)


def sinusoidal_positions(length, width):
    """The fixed sin/cos position table of "Attention is all you need" (section 3.5): (length, width)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).view(length, width)


class BERT(nn.Module):
    """Crammed BERT: pre-norm, no biases, gated GELU, sinusoidal positions with one learned scale, a
    linear head on the masked positions only, decoder tied to the embedding. At base it has 120,179,713
    parameters, the tied matrix counted once.

    A batch: `tokens` (B, T) int64, what the model reads; `positions` (B, P) int64, the columns to
    predict; `labels` (B, P) int64, the tokens that stood there.

    No attention mask: pre-training rows are full, and attention crosses document borders, as the study.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))  # tied
        self.position_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("position_table", sinusoidal_positions(config.max_length, config.d_model), persistent=False)
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.layers = nn.ModuleList(BERTLayer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=1e-12)
        self.head = nn.Linear(config.d_model, config.d_model, bias=False)
        self.present_layers = list(range(config.n_layers))
        self.autocast_dtype = None  # None: fp32; torch.bfloat16 or torch.float16: autocast
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Every matrix N(0, 0.02^2), not scaled with depth; norms 1 and 0; the position scale C^-1/2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name == "position_scale":
                nn.init.constant_(parameter, self.config.d_model**-0.5)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("norm.bias"):
                nn.init.zeros_(parameter)
            else:
                raise AssertionError(f"no initial value is defined for {name}")

    def autocast(self):
        """The mixed-precision context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.embedding.device.type, dtype=self.autocast_dtype)

    def embed(self, tokens):
        """What the first layer reads: (B, T) -> (B, T, C)."""
        if tokens.shape[1] > self.config.max_length:
            raise UserError(f"rows of {tokens.shape[1]} tokens: this model reads at most {self.config.max_length}")
        # padding_idx: as in the study, [PAD] (id 0) gets no gradient as an input, only as an output.
        h = F.embedding(tokens, self.embedding, padding_idx=0)
        h = self.embedding_norm(h + self.position_scale * self.position_table[: tokens.shape[1]])
        return F.dropout(h, self.config.dropout, self.training)

    def encode(self, tokens, layers=None):
        """Hidden states after the final norm: (B, T) -> (B, T, C)."""
        h = self.embed(tokens)
        for index in self.present_layers if layers is None else layers:
            h = self.layers[index](h)
        return self.final_norm(h)

    def logits(self, batch, layers=None):
        """Scores over the vocabulary at the predicted positions: (B, P, V)."""
        with self.autocast():
            h = self.encode(batch["tokens"], layers)
            positions = batch["positions"][:, :, None].expand(-1, -1, h.shape[-1])
            return F.linear(self.head(h.gather(1, positions)), self.embedding)

    def loss(self, batch, layers=None, per_example=False):
        """Mean cross-entropy in nats over the predicted tokens, or per row with `per_example`: (B,)."""
        logits, labels = self.logits(batch, layers), batch["labels"]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none" if per_example else "mean")
        return losses.view(labels.shape).mean(dim=1) if per_example else losses

    def training_flops_per_row(self, row_length, predicted_per_row, layers=None):
        """Floating-point operations of one row's forward and backward: six for each layer weight and
        token and for each head and decoder weight and predicted token, and the two attention products."""
        layers = self.present_layers if layers is None else layers
        c = self.config
        layer_weights = 4 * c.d_model**2 + 3 * c.d_model * c.d_ff
        output_weights = c.d_model**2 + c.vocabulary_size * c.d_model
        attention = 3 * 2 * 2 * row_length**2 * c.d_model
        return len(layers) * (6 * layer_weights * row_length + attention) + 6 * output_weights * predicted_per_row


MODELS = {"bert": (BERT, BERTConfig)}


def build(name, size, vocabulary_size):
    """A freshly initialised model: `name` is a key of SIZES, `size` one of its sizes."""
    model, config = MODELS[name]
    return model(config(vocabulary_size=vocabulary_size, **SIZES[name][size]))


def save(model, path):
    """Writes the weights, with the configuration that `load` needs, to a new file that replaces `path`."""
    name = next(name for name, (cls, _) in MODELS.items() if isinstance(model, cls))
    stored = {
        "model": name,
        "config": dataclasses.asdict(model.config),
        "present_layers": model.present_layers,
        "weights": model.state_dict(),
    }
    write_whole(stored, path)


def load(path, device="cpu", **changes):
    """The model of a `model.pt`, in evaluation mode; `changes` replace fields of its configuration."""
    stored = read_whole(path, device)
    model, config = MODELS[stored["model"]]
    model = model(config(**stored["config"] | changes)).to(device)
    model.load_state_dict(stored["weights"])
    model.present_layers = stored["present_layers"]
    return model.eval()


def write_whole(stored, path):
    """torch.save to a temporary file beside `path`, then renamed: the old file stands until the new one
    is complete. Raises UserError if it cannot be written."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(stored, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        kept = "; the file that was there is untouched" if os.path.exists(path) else ""
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}{kept}. Is the disk full?") from None


def read_whole(path, device="cpu"):
    """torch.load of plain data only (`weights_only`); a damaged file is a UserError."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read, it is cut short or damaged ({str(error).splitlines()[0]})") from None
