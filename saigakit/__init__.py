"""Fine-tune a Saiga model on Kaggle's free GPUs and run it as a 4-bit GGUF."""

from saigakit.config import TrainConfig
from saigakit.core import workspace
from saigakit.core.workspace import find_input
from saigakit.errors import DataError, SaigaError
from saigakit.registry import MODELS, Lora, ModelSpec

__version__ = "0.1.0"
__all__ = [
    "MODELS",
    "DataError",
    "Lora",
    "ModelSpec",
    "SaigaError",
    "TrainConfig",
    "__version__",
    "find_input",
    "prepare",
]


def prepare(stage: str) -> None:
    """Install the packages that `stage` lacks and print a summary of this machine.

    Raises SaigaError with the command to run if any are lacking off Kaggle, and if HF_REPO and HF_TOKEN cannot publish.
    """
    from saigakit.core import hub, install  # here, so that `python -m saigakit.core.install` does not import it twice

    install.prepare(stage)
    if stage in ("02_train", "03_merge_gguf"):  # they end with publish.if_asked
        hub.require_publishable()
    print(workspace.describe_machine())
