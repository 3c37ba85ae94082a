"""Fine-tune a Saiga model on Kaggle's free GPUs and run it as a 4-bit GGUF.

Data flows one way. A module imports only modules to its left:

errors < progress < models < config < workspace < install < manifest < tables < memory < launch < records
< calls < shapes < conversations < data < examples < definitions < splits < sources < placeholders < template
< tokenizer_backends < layouts < tokenization < rows < renderings < near_duplicates < estimates < audit
< pieces < lengths < report < packing < attention < weights < curve < trainer < train < generation < shards
< merge < quantization < architecture < vocabulary < container < sizes < export < infer < metrics < results
< evaluate < summary < kernels < parameters < execution < runner < conversation < cli
"""

from saigakit.config import TrainConfig
from saigakit.errors import DataError, SaigaError
from saigakit.models import MODELS, ModelSpec

__version__ = "0.1.0"
__all__ = ["MODELS", "DataError", "ModelSpec", "SaigaError", "TrainConfig", "__version__"]
