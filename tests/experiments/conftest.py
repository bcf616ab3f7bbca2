"""The top floor's fixtures: a cache of its own, a small text corpus, a run of a few seconds."""

from tests.nas.conftest import cache, corpus_folder, micro_config

__all__ = ["cache", "corpus_folder", "micro_config"]
