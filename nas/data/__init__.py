"""Text into token streams, and pairs of sentences: finding files, dividing them, a tokenizer, memory-mapped ids."""

from moesaic.nas.data.corpus import Corpus, load_corpus, open_corpus
from moesaic.nas.data.parallel import ParallelCorpus, load_parallel, open_parallel

__all__ = ["Corpus", "ParallelCorpus", "load_corpus", "load_parallel", "open_corpus", "open_parallel"]
