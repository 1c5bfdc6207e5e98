"""Models and data by name, training, checkpoints and measurements: what comparisons are made with."""

from .checkpoints import load_checkpoint, save_checkpoint
from .data import DataBundle, list_data, load_data
from .evaluation import check_model, evaluate, evaluate_loss
from .measure import count_macs, count_params, latencies, latency_ms
from .models import ModelInfo, create_model, list_models, model_info
from .recipes import Recipe, default_recipe
from .training import EpochLog, TrainingLog, train

__all__ = [
    "DataBundle",
    "EpochLog",
    "ModelInfo",
    "Recipe",
    "TrainingLog",
    "check_model",
    "count_macs",
    "count_params",
    "create_model",
    "default_recipe",
    "evaluate",
    "evaluate_loss",
    "latencies",
    "latency_ms",
    "list_data",
    "list_models",
    "load_checkpoint",
    "load_data",
    "model_info",
    "save_checkpoint",
    "train",
]
