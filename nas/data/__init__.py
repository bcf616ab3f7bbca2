"""Text into token streams: finding files, dividing them, a tokenizer, memory-mapped streams."""

from moesaic.nas.data.corpus import Corpus, load_corpus, open_corpus

__all__ = ["Corpus", "load_corpus", "open_corpus"]
