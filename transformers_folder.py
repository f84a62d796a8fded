"""T5 in the folder format of transformers: config.json and its weights.

A T5 trained here is read by `T5ForConditionalGeneration.from_pretrained(folder)`, and a T5 v1.1 of
theirs (google/t5-v1_1-base) by finetune.py. Needs one more package, safetensors.

    python transformers_folder.py runs/NAME FOLDER      # a finished T5 for transformers
"""

from pathlib import Path

from errors import UserError, exits_on_user_error
from flags import Parser
from model import T5, T5Config, load
from runs import read_record, read_tensors, write_json, written_whole

# The fields of T5Config -> those of their config.json.
FIELDS = {
    "vocabulary_size": "vocab_size",
    "n_layers": "num_layers",
    "d_model": "d_model",
    "n_heads": "num_heads",
    "d_head": "d_kv",
    "d_ff": "d_ff",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_distance": "relative_attention_max_distance",
}
# What is the same in every T5 v1.1, and in ours.
V1_1 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}


def transformers_names(layers):
    """Our names of T5's parameters -> those of transformers, for the layers with these indices,
    numbered anew from 0."""
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    names = {
        "embedding": "shared.weight",
        "encoder_positions": f"encoder.{bias}",
        "decoder_positions": f"decoder.{bias}",
        "encoder_norm.weight": "encoder.final_layer_norm.weight",
        "decoder_norm.weight": "decoder.final_layer_norm.weight",
        "head.weight": "lm_head.weight",
    }
    attention = {"query": "q", "key": "k", "value": "v", "output": "o"}
    feed_forward = {"gate": "wi_0", "linear": "wi_1", "output": "wo"}
    parts = {
        "attention": ("SelfAttention", attention),
        "cross_attention": ("EncDecAttention", attention),
        "feed_forward": ("DenseReluDense", feed_forward),
    }
    stacks = {"encoder": ["attention", "feed_forward"], "decoder": list(parts)}
    for number, index in enumerate(layers):
        for stack, order in stacks.items():
            for place, part in enumerate(order):
                ours = f"layers.{index}.{stack}.{part}"
                theirs = f"{stack}.block.{number}.layer.{place}"
                names[f"{ours}_norm.weight"] = f"{theirs}.layer_norm.weight"
                their_part, matrices = parts[part]
                for mine, its in matrices.items():
                    names[f"{ours}.{mine}.weight"] = f"{theirs}.{their_part}.{its}.weight"
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
    """Writes a T5, the layers that are present, to a folder."""
    folder, depth = Path(folder), len(model.present_layers)
    weights = {
        theirs: model.get_parameter(ours).detach().cpu().contiguous()
        for ours, theirs in transformers_names(model.present_layers).items()
    }
    config = V1_1 | {theirs: getattr(model.config, ours) for ours, theirs in FIELDS.items()}
    config |= {"num_layers": depth, "num_decoder_layers": depth}
    stored = safetensors().save(weights, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "model.safetensors") as file:
        file.write(stored)
    write_json(folder / "config.json", config | {"dropout_rate": model.config.dropout})


def weight_files(folder):
    """The files with the weights: one, or those that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            listed = read_record(index, {"weight_map": dict})["weight_map"].values()
            return [folder / file for file in sorted(set(listed))]
    names = "model.pt; of transformers model.safetensors or pytorch_model.bin"
    raise UserError(f"{folder}: no weights here ({names})")


def read_weights(path):
    """The tensors in one such file, by name."""
    if path.suffix != ".safetensors":
        return read_tensors(path, ())
    load_file = safetensors().load_file
    from safetensors import SafetensorError

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def load_transformers(folder, device="cpu", **changes):
    """The T5 of such a folder, in evaluation mode. `changes` replace fields of the
    configuration."""
    folder = Path(folder)
    path = folder / "config.json"
    # Its class has defaults for the other fields, as ours has.
    stored = read_record(path, {"vocab_size": int, "num_layers": int})
    # "Not tied" is how T5 v1.1 says that its logits are not scaled; transformers 5 writes it by
    # another name.
    tied = stored.get("tie_word_embeddings", True)
    found = {
        "model_type": stored.get("model_type"),
        "feed_forward_proj": stored.get("feed_forward_proj"),
        "tie_word_embeddings": stored.get("scale_decoder_outputs", tied),
        "num_decoder_layers": stored.get("num_decoder_layers", stored["num_layers"]),
        "layer_norm_epsilon": stored.get("layer_norm_epsilon", 1e-6),
        "decoder_start_token_id": stored.get("decoder_start_token_id", 0),
    }
    for name, value in found.items():
        expected = stored["num_layers"] if name == "num_decoder_layers" else V1_1[name]
        if value != expected:
            raise UserError(f"{path}: {name} is {value!r}; here, as in T5 v1.1, it is {expected!r}")
    known = {ours: stored[theirs] for ours, theirs in FIELDS.items() if theirs in stored}
    model = T5(T5Config(**known | changes))
    weights = {}
    for file in weight_files(folder):
        weights |= read_weights(file)
    if tied:  # as transformers 5 writes it: one matrix is saved if both are the same
        weights.setdefault("lm_head.weight", weights.get("shared.weight"))
    names = transformers_names(range(model.config.n_layers))
    if missing := [theirs for theirs in names.values() if theirs not in weights]:
        raise UserError(f"{folder}: its weights have no {missing[0]}")
    if more := [name for name in weights if ".block." in name and name not in names.values()]:
        raise UserError(f"{folder}: its weights have {more[0]}, its config.json has no such layer")
    try:
        model.load_state_dict({ours: weights[theirs].float() for ours, theirs in names.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder}: its weights do not fit its config.json ({reason})") from None
    return model.to(device).eval()


@exits_on_user_error
def main(arguments=None):
    parser = Parser(description=__doc__, prog="transformers_folder.py")
    parser.add_argument("run", help="the folder of a T5's run")
    parser.add_argument("folder", help="what to write")
    options = parser.parse_args(arguments)
    model = load(Path(options.run) / "model.pt")
    if not isinstance(model, T5):
        raise UserError(f"{options.run}: a BERT; transformers has no such architecture")
    run, folder = Path(options.run), Path(options.folder)
    if folder.resolve() == run.resolve():
        raise UserError(f"{folder} is the run itself; name another folder")
    tokenizer = (run / "tokenizer.model").read_bytes()
    save_transformers(model, folder)
    with written_whole(folder / "spiece.model") as file:
        file.write(tokenizer)


if __name__ == "__main__":
    main()
