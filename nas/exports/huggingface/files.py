"""The files beside an exported language model that transformers reads: of its tokenizer, and of how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesaic.nas.data.tokenizer import end_of_text, read_tokenizer
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.files import read_json, write_json

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
MODEL_CLASS = "MoesaicForCausalLM"


def is_language_model(architecture: Architecture) -> bool:
    """Whether it predicts the next token, and nothing else: what ``MODEL_CLASS`` is for."""
    return architecture.encoder is None and architecture.backbone.head == "linear"


def check_language_model(architecture: Architecture, where: str) -> None:
    """Raises MoesaicError where it is another model."""
    if not is_language_model(architecture):
        raise MoesaicError(
            "only language models, which predict the next token, run in transformers so far",
            where=where,
            found="an encoder" if architecture.encoder is None else "a model that translates",
            allowed="a decoder alone, with a linear head",
        )


def write_language_files(directory: Path, tokenizer: Path, sequence_length: int) -> None:
    """Write ``TOKENIZER_CONFIG`` and ``GENERATION_CONFIG``. A tokenizer that came with a configuration keeps it.

    The token that ends a document also begins a text, and fills padding on the left, where a prompt has none.
    """
    end = end_of_text(read_tokenizer(tokenizer))
    ids = {} if end is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    write_json(directory / GENERATION_CONFIG, ids)
    own = tokenizer.parent / TOKENIZER_CONFIG
    if own.is_file():
        write_json(directory / TOKENIZER_CONFIG, read_json(own))
        return
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    if end is not None:
        token = read_tokenizer(tokenizer).id_to_token(end)
        config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
    write_json(directory / TOKENIZER_CONFIG, config)


def card_header() -> list[str]:
    """What the model hub reads of a card. The licence is that of the text, which nobody here knows."""
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: other",
        "tags: [moesaic, mixture-of-experts]",
        "---",
        "",
    ]


def snippet(name: str) -> list[str]:
    """How a program loads the model."""
    return [
        "```python",
        "import moesaic  # adds the model to transformers; needs: pip install 'moesaic[hf]'",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        'write = pipeline("text-generation", model=model, tokenizer=tokenizer)',
        'print(write("def ", max_new_tokens=20)[0]["generated_text"])',
        "```",
        "",
    ]
