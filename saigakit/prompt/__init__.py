"""Turn a conversation into token ids, exactly, and mark what is trained."""

from saigakit.prompt.encoding import encode, load_tokenizer
from saigakit.prompt.token_view import show
from saigakit.prompt.wrong_renderings import compare as compare_renderings
from saigakit.prompt.wrong_renderings import role_ids

__all__ = ["compare_renderings", "encode", "load_tokenizer", "role_ids", "show"]
