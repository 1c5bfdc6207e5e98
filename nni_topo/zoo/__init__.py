"""Models and data by name, training, checkpoints and measurements, as used by comparisons."""

from nni_topo.network.cost.measure import count_macs, count_params, latencies
from nni_topo.zoo.checkpoints import load_checkpoint, save_checkpoint
from nni_topo.zoo.data import DataBundle, list_data, load_data
from nni_topo.zoo.evaluation import check_model, evaluate, loss_and_accuracy
from nni_topo.zoo.models import create_model, default_recipe, list_models
from nni_topo.zoo.recipes import Augmentation, Recipe
from nni_topo.zoo.training import EpochLog, TrainingLog, augmented, train

__all__ = [
    "Augmentation",
    "DataBundle",
    "EpochLog",
    "Recipe",
    "TrainingLog",
    "augmented",
    "check_model",
    "count_macs",
    "count_params",
    "create_model",
    "default_recipe",
    "evaluate",
    "latencies",
    "list_data",
    "list_models",
    "load_checkpoint",
    "load_data",
    "loss_and_accuracy",
    "save_checkpoint",
    "train",
]
