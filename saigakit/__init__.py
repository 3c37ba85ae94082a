"""Fine-tune a Saiga model on Kaggle's free GPUs and run it as a 4-bit GGUF.

Data flows one way. A module imports only modules to its left:

errors < progress < models < config < workspace < install < manifest < tables < memory < launch < records < calls <
shapes < conversations < data < examples < definitions < splits < base_files < sources < placeholders < template <
tokenizer_backends < layouts < tokenization < rows < renderings < near_duplicates < estimates < audit < pieces < lengths
< fitting < report < packing < replay < steps < ranks < sharding < attention < shards < blas < adapter < nf4 < merge <
weights < fold < head < trial < preflight < checkpoints < resuming < generation < questions < samples < curve <
training_log < evaluation < training_run < trainer < loading < worker < train < quantization < architecture < vocabulary
< forward < importance < activations < quality < container < streaming < estimate_export < read_back < sizes < fit <
chat_format < modelfile < markdown < lineage < gguf_card < companions < gguf_files < export < lora_gguf <
merged_safetensors < calibration < export_beside < quality_by_type < infer < metrics < results < evaluate < summary <
card < publish < kernels < kaggle_models < publish_gguf < parameters < execution < runner < conversation < terminal <
cli
"""

from saigakit.config import TrainConfig
from saigakit.errors import DataError, SaigaError
from saigakit.models import MODELS, ModelSpec

__version__ = "0.1.0"
__all__ = ["MODELS", "DataError", "ModelSpec", "SaigaError", "TrainConfig", "__version__"]
