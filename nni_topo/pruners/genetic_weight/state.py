"""Files from which a stopped genetic algorithm resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nni_topo.disk import DELETE, output_folder, reading, whole_file
from nni_topo.errors import ConfigError
from nni_topo.maths.search.weights import HistoryRow, Individual, WeightGeneticAlgorithm


def save_state(algorithm: WeightGeneticAlgorithm, path: str | Path) -> None:
    """Write generation, history and random generator; folders are made, and the file is written atomically."""
    path = Path(path)
    output_folder(path.parent)
    members = algorithm.current_generation
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(
            file,
            request=np.array(_request(algorithm)),
            generator=np.array(json.dumps(algorithm.rng.bit_generator.state)),
            generation=np.array(algorithm.generation),
            start_accuracy=np.array(algorithm.start_accuracy),
            genes=np.stack([member.genes for member in members]),
            lines=np.array([(member.number, member.born, member.partner) for member in members]),
            measured=np.array([(member.fitness, member.accuracy, member.compression) for member in members]),
            history=np.array(algorithm.history, dtype=np.float64),
        )


def load_state(algorithm: WeightGeneticAlgorithm, path: str | Path) -> None:
    """Put an algorithm into a file's state; DataError if it is damaged, ConfigError if it is of another search."""
    path = Path(path)
    with reading(path, "a state", "of a genetic search", DELETE):
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        if str(content["request"]) != _request(algorithm):
            raise ConfigError(f"a state must be of the same weights, settings and seed, got another search's ({path})")
        algorithm.current_generation = []
        members = zip(content["genes"], content["lines"], content["measured"], strict=True)
        for genes, (number, born, partner), measured in members:
            member = Individual(genes, int(number), int(born), int(partner))
            member.fitness, member.accuracy, member.compression = measured.tolist()
            algorithm.current_generation.append(member)
        algorithm.rng.bit_generator.state = json.loads(str(content["generator"]))
        algorithm.generation = int(content["generation"])
        algorithm.start_accuracy = float(content["start_accuracy"])
        whole = (0, 1, 5, 6)
        algorithm.history = [
            HistoryRow(*(int(value) if place in whole else value for place, value in enumerate(row)))
            for row in content["history"].tolist()
        ]


def _request(algorithm: WeightGeneticAlgorithm) -> str:
    """Return a digest of what the search depends on, the evaluation and the number of generations left out."""
    settings = {name: value for name, value in asdict(algorithm.settings).items() if name != "generations"}
    digest = hashlib.sha256(json.dumps([settings, algorithm.seed]).encode())
    for layer in algorithm.layers:
        digest.update(np.int64(layer.least).tobytes() + layer.magnitudes.tobytes())
    return digest.hexdigest()
