"""Shapes of models whose weights are random: what a benchmark needs instead of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from seesaw.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama. Sizes are element counts."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocab: int = 32000
    max_position: int = 4096


SHAPES = {
    "tiny": Shape(hidden=256, ffn=704, layers=4, heads=4, kv_heads=2),
    "270m": Shape(hidden=1024, ffn=2816, layers=16, heads=16, kv_heads=8),
    "1.1b": Shape(hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4),
}


def write_config(folder: Path, shape: Shape) -> None:
    """Write the `config.json` of `shape` into `folder`; its weights are bfloat16."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def model_directory(name: str, folder: Path) -> Path:
    """The directory of a named shape, written into `folder`, or `name` itself if it is one with a `config.json`.

    Raises `ConfigError` naming the shapes there are.
    """
    if name in SHAPES:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, SHAPES[name])
        return folder
    if (Path(name) / "config.json").is_file():
        return Path(name)
    raise ConfigError(
        f"shape {name!r}: choose one of {', '.join(SHAPES)}, or give a directory that has a config.json"
    )
