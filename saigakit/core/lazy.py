"""Import heavy packages when they are first used, so that what needs none of them starts at once."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets as datasets
    import gguf as gguf
    import huggingface_hub as huggingface_hub
    import jsonschema as jsonschema
    import llama_cpp as llama_cpp
    import llguidance as llguidance
    import matplotlib.figure as mpl_figure
    import numpy as np
    import peft as peft
    import pyarrow as pyarrow
    import pydantic as pydantic
    import safetensors as safetensors
    import tokenizers as tokenizers
    import torch as torch
    import transformers as transformers

    __all__ = ["mpl_figure", "np"]
else:

    class _Package:
        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401
            package = importlib.import_module(self.__name__)
            self.__dict__ = package.__dict__  # from now on its names are found here, as fast as in the package itself
            return getattr(package, name)

    datasets, np, pyarrow = map(_Package, ("datasets", "numpy", "pyarrow"))
    gguf, llama_cpp, mpl_figure = map(_Package, ("gguf", "llama_cpp", "matplotlib.figure"))
    huggingface_hub, peft, tokenizers = map(_Package, ("huggingface_hub", "peft", "tokenizers"))
    jsonschema, llguidance, pydantic = map(_Package, ("jsonschema", "llguidance", "pydantic"))
    safetensors, torch, transformers = map(_Package, ("safetensors", "torch", "transformers"))
