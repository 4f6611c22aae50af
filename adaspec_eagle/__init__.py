"""Draft heads for Hugging Face language models: train, decode losslessly, measure."""

from adaspec_eagle.generate import generate
from adaspec_eagle.head import DraftHead, head_class, load_head
from adaspec_eagle.plug import speculative
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target

__all__ = [
    "AcceptanceStats",
    "DraftHead",
    "Target",
    "generate",
    "head_class",
    "load_head",
    "speculative",
]
__version__ = "0.1.0"
