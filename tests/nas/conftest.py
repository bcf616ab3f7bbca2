"""Fixtures of the top floor: a cache of its own, a small text corpus, and runs made once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.nas.stages.calibrate_latency import calibrated
from tests.nas.run_tools import finish, open_run

MICRO = """\
name: micro
data: {{kind: text, files: ['{files}'], vocab_size: 300, sequence_length: 32}}
space: tiny
budget: {{flops: 75%, parameters: 80%}}
device: {{device: cpu, threads: 1}}
supernet: {{steps: 24, batch_size: 4, checkpoint_every: 5}}
latency: {{batch_size: 2, models: 12, repeats: 3}}
search: {{trials: 30, population: 8, evaluation_windows: 8}}
export: {{front: 1}}
retrain: {{steps: 24, batch_size: 4, evaluation_windows: 8, checkpoint_every: 5}}
"""
"""A run of a few seconds. No budget line is measured, so that its search is the same whatever the machine does."""


def write_corpus(folder: Path, files: int = 24, words: int = 1500, seed: int = 0) -> Path:
    """Text with structure to learn: sentences over a small vocabulary with favourite successors."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    after = {word: rng.sample(vocabulary, 3) for word in vocabulary}
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        word, text = rng.choice(vocabulary), []
        for position in range(words):
            text.append(word)
            word = rng.choice(after[word]) if rng.random() < 0.9 else rng.choice(vocabulary)
            if position % 12 == 11:
                text.append("\n")
        (folder / f"text{index:02}.txt").write_text(" ".join(text))
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests neither read nor fill the user's cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def micro_config(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    """The YAML file of a run of a few seconds."""
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(MICRO.format(files=corpus_folder))
    return path


@pytest.fixture(scope="session")
def calibration(micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration of the micro run; tests work on copies of it."""
    return calibrated(open_run(micro_config, tmp_path_factory.mktemp("calibrated") / "run"))


@pytest.fixture(scope="session")
def quick_run(micro_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``run_tools.QUICK``; tests work on copies of it."""
    path = tmp_path_factory.mktemp("quick") / "run"
    finish(open_run(micro_config, path))
    return path
