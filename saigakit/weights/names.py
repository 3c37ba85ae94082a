"""Spell the names of a language model's tensors as its base does."""

import re
from collections.abc import Container
from typing import NamedTuple, Self

# Of the language model: alone, or next to a vision model, saved by transformers before and since 4.52.
PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_LANGUAGE = re.compile(
    r"(model\.language_model|language_model\.model|language_model|model)\.(?=(embed_tokens|layers|norm)\b)"
)
_HEAD = re.compile(r"(model\.)?(language_model\.)?(?=lm_head\b)")
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Names(NamedTuple):
    """What precedes the names of a base's embeddings and layers."""

    prefix: str = PREFIXES[0]

    @classmethod
    def of(cls, tensors: Container[str]) -> Self:
        return cls(next((prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in tensors), PREFIXES[0]))

    @property
    def embeddings(self) -> str:
        return f"{self.prefix}embed_tokens.weight"

    @property
    def head(self) -> str:
        return self.spell("lm_head.weight")

    def spell(self, name: str) -> str:
        """The base's name for what another class or version of transformers calls `name`."""
        if _HEAD.match(name):
            return _HEAD.sub("language_model." if self.prefix == PREFIXES[1] else "", name, count=1)
        return _LANGUAGE.sub(self.prefix, name, count=1) if _LANGUAGE.match(name) else name


def without_wrappers(name: str) -> str:
    """Remove what torch.compile, FSDP and activation checkpointing add to the names of modules."""
    return _WRAPPERS.sub("", name)
