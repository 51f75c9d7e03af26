"""Write the sizes of the presets, and a word or two on each choice: memory.json beside
this file, for the planner.
"""

import json
from dataclasses import asdict
from pathlib import Path

from qwen_analog.config import (
    ACTIVATION_CHECKPOINTING,
    PRECISIONS,
    PRESETS,
    STRATEGIES,
    QwenConfig,
)
from qwen_analog.loss import CHUNK_SIZE
from qwen_analog.optim import PIECE_SIZE

HERE = Path(__file__).resolve().parent
FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"
    " head_dim intermediate_size tie_word_embeddings attention_bias qk_norm"
).split()


def main() -> None:
    presets = {}
    for name in PRESETS:
        config = asdict(QwenConfig.from_preset(name))
        presets[name] = {field: config[field] for field in FIELDS}
    data = {
        "presets": presets,
        "precision": PRECISIONS,
        "strategy": STRATEGIES,
        "activation_checkpointing": ACTIVATION_CHECKPOINTING,
        "optimizer": ["adamw", "adamw-bf16", "muon", None],
        "chunk_size": CHUNK_SIZE,
        "piece_size": PIECE_SIZE,
    }
    (HERE / "memory.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
