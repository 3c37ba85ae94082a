"""Answer with a GGUF file: what 04_infer and the terminal chat use."""

from saigakit.infer.engine import MAX_SEQUENCES, greedy, load, stream

__all__ = ["MAX_SEQUENCES", "greedy", "load", "stream"]
