"""Hold an answer to a grammar with llguidance: which token may come next, and which must."""

from functools import lru_cache

from saigakit.core.lazy import llama_cpp, llguidance, np
from saigakit.errors import SaigaError
from saigakit.infer.engine import stop_ids
from saigakit.infer.sequences import MAX_TOKENS
from saigakit.weights.tensors import Array


@lru_cache(maxsize=1)  # takes a second for a large vocabulary
def _read_vocabulary(llm: "llama_cpp.Llama") -> "llguidance.LLTokenizer":
    from llguidance.llamacpp import lltokenizer_from_vocab  # imports llama_cpp

    return lltokenizer_from_vocab(llama_cpp.llama_model_get_vocab(llm.model), eos_token=sorted(stop_ids(llm)))


def require_holdable(grammar: str, vocabulary: "llguidance.LLTokenizer | None" = None) -> None:
    refused, reasons = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if refused:
        reason = " ".join(reasons[0].partition("\n   1 |")[0].split())  # without the grammar
        raise SaigaError(f"The answer cannot be held to this schema: {reason}.")


class Constraint:
    """The most likely answer that fits a grammar.

    Raises SaigaError, with the reason of llguidance, for a grammar that it cannot hold.
    """

    def __init__(self, llm: "llama_cpp.Llama", grammar: str) -> None:
        vocabulary = _read_vocabulary(llm)
        require_holdable(grammar, vocabulary)
        self._matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        self._stop_ids = frozenset(vocabulary.eos_tokens)
        self._allowed = np.zeros((llm.n_vocab() + 31) // 32, dtype=np.int32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow, the model has ended the answer, or llguidance has given up."""
        return bool(self._matcher.is_stopped())

    def begin(self) -> list[int]:
        """The tokens with which every answer begins."""
        return self._consume_forced(MAX_TOKENS)

    def choose(self, logits: Array) -> list[int]:
        """The most likely token that the grammar allows, and those that it forces after it."""
        token = int(logits.argmax())
        if self._matcher.validate_tokens([token]) == 0:  # else the mask would change nothing
            self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
            bits = np.unpackbits(self._allowed.view(np.uint8), bitorder="little", count=len(logits))
            token = int(np.where(bits, logits, -np.inf).argmax())
        self._matcher.consume_token(token)
        return [token] if self.is_complete else [token, *self._consume_forced(MAX_TOKENS - 1)]

    def _consume_forced(self, count: int) -> list[int]:
        forced: list[int] = self._matcher.compute_ff_tokens()[:count]
        forced = [token for token in forced if token not in self._stop_ids]
        self._matcher.consume_tokens(forced)
        return forced

    def require_no_error(self) -> None:
        """Raises SaigaError if llguidance could not follow the answer, which ended there."""
        if self._matcher.is_error():
            raise SaigaError(f"llguidance gave up on this schema: {self._matcher.get_error().splitlines()[0]}.")
