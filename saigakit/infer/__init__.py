"""Load a GGUF file and answer with it."""

from saigakit.infer.engine import greedy, load, stream

__all__ = ["greedy", "load", "stream"]
