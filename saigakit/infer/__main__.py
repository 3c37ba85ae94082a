"""Read a GGUF file and compute a few tokens, in the child process of `engine.load`."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

from saigakit.core import launch
from saigakit.errors import SaigaError
from saigakit.llamacpp import forward
from saigakit.prompt import template
from saigakit.prompt.backends import GgufTokenizer, gguf_vocabulary

_SECONDS = 300  # of CPU time, by which a template that is computed without end has been stopped

if __name__ == "__main__":
    file = Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    # What llama.cpp refuses in words, it refuses in the parent too.
    with launch.child(), suppress(ValueError), gguf_vocabulary(file) as llm:
        template.with_tools(llm.metadata.get("tokenizer.chat_template", ""), file)
        with suppress(SaigaError), forward.open_model(file, n_ctx=256) as model:
            ids = GgufTokenizer(llm).encode_text("Привет")[:4] or [0]
            list(model.logits(ids, [True] * len(ids)))
