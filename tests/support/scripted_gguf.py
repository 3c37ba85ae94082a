"""Write a GGUF whose model prefers a given text, whatever it has read, in the vocabulary of another GGUF."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

POSITIONS = 1024
STEPS = 192  # how many tokens can be scripted


def write(source: Path, target: Path, start: int, tokens: Sequence[int], chat_template: str | None = None) -> Path:
    """`tokens` follow a prompt of `start` tokens; what the grammar forbids of them is left out by the sampler.

    GPT-2's learned positions make the logits a function of the position alone.
    """
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "gpt2")
    for key, field in reader.fields.items():
        if key.startswith("tokenizer.") and (key != "tokenizer.chat_template" or chat_template is None):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    size = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(STEPS)
    writer.add_block_count(1)
    writer.add_feed_forward_length(STEPS)
    writer.add_head_count(1)
    writer.add_layer_norm_eps(1e-5)
    positions, output = np.zeros((POSITIONS, STEPS), np.float32), np.zeros((size, STEPS), np.float16)
    for step, token in enumerate(tokens[:STEPS]):
        positions[start - 1 + step, step] = 1
        output[token, step] = 10
    nothing = np.zeros(STEPS, np.float32)
    matrices = {"attn_qkv": 3 * STEPS, "attn_output": STEPS, "ffn_up": STEPS, "ffn_down": STEPS}
    tensors = {
        "token_embd.weight": np.zeros((size, STEPS), np.float16),
        "position_embd.weight": positions,
        "output_norm.weight": nothing + 1,
        "output_norm.bias": nothing,
        "output.weight": output,
        **{f"blk.0.{name}.weight": np.zeros((width, STEPS), np.float32) for name, width in matrices.items()},
        **{f"blk.0.{name}.bias": np.zeros(width, np.float32) for name, width in matrices.items()},
        **{f"blk.0.{name}.weight": nothing + 1 for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.bias": nothing for name in ("attn_norm", "ffn_norm")},
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
