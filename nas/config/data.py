"""What a user may write about the text to learn from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from moesaic.nas.config.section import Section
from moesaic.search_spaces import MoesaicError


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_one_or_many)]


class SplitFiles(Section):
    """Text whose splits are known. For validation and test, without files of their own, training text is divided."""

    train: Annotated[Paths, Field(min_length=1)]
    validation: Paths = Field(default=[])
    test: Paths = Field(default=[])


_PAIR = "[FILE.en, FILE.de]"


def is_tsv(path: str) -> bool:
    """Whether each line of this file holds a sentence, a tab and its translation."""
    return path.lower().removesuffix(".gz").endswith(".tsv")


class DataConfig(Section):
    """``stdlib`` is the Python standard library's source; ``text`` takes ``files``: paths, folders, globs, or these for
    each of ``train``, ``validation`` and ``test``. Files are text, or records with the text in ``field``: JSON lines
    (.jsonl), Parquet, or the Arrow files that Hugging Face's ``datasets`` saves; .gz of text and of JSON lines.

    ``tokenizer``, a ``tokenizer.json`` or its folder, is used instead of a BPE trained to ``vocab_size`` tokens.

    ``parallel`` are sentences with translations. Their ``files`` are two whose lines correspond, source and target, or
    one TSV; the same for a split. Both languages have one BPE (``vocabulary: shared``) or one each (``separate``).
    ``sequence_length`` is the most tokens of a sentence, its end included.
    """

    kind: Literal["stdlib", "text", "parallel"] = "stdlib"
    files: Annotated[
        Annotated[Paths, Tag("all")] | Annotated[SplitFiles, Tag("splits")],
        Discriminator(lambda value: "splits" if isinstance(value, dict | SplitFiles) else "all"),
    ] = Field(default=[])
    field: str = "text"
    vocabulary: Literal["shared", "separate"] = "shared"
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=258, le=2**20)] = 2048
    sequence_length: Annotated[int, Field(ge=8)] = 128

    @model_validator(mode="after")
    def _one_vocabulary(self) -> DataConfig:
        if self.tokenizer is not None and "vocab_size" in self.model_fields_set and self.vocab_size != 2048:
            raise MoesaicError(
                "a given tokenizer has its own vocab_size", found=self.vocab_size, nearest="without the key"
            )
        return self

    @model_validator(mode="after")
    def _files_for_text(self) -> DataConfig:
        if self.kind != "stdlib" and not self.files:
            form = f"{_PAIR}, or [FILE.tsv]" if self.kind == "parallel" else "a path, a folder, a glob, a list"
            raise MoesaicError(f"data of kind {self.kind} needs files", allowed=f"files: {form}")
        if self.kind == "stdlib" and self.files:
            raise MoesaicError("data of kind stdlib takes no files", nearest="kind: text")
        return self

    @model_validator(mode="after")
    def _pairs_of_files(self) -> DataConfig:
        if self.kind != "parallel":
            if self.vocabulary != "shared":
                raise MoesaicError("one language has one vocabulary", found="vocabulary: separate", nearest="shared")
            return self
        for name, paths in self.split_files.items():
            if len(paths) > 2 or (len(paths) == 1 and not is_tsv(paths[0])):
                raise MoesaicError(
                    f"the {name} split is not two files whose lines correspond, and not one TSV",
                    found=", ".join(paths),
                    allowed=f"{_PAIR}, or [FILE.tsv]",
                )
        if self.tokenizer is not None and self.vocabulary == "separate":
            raise MoesaicError("a given tokenizer is that of both languages", nearest="vocabulary: shared")
        return self

    @property
    def split_files(self) -> dict[str, list[str]]:
        """The files of each split of parallel text. Where splits have none of their own, they are of the training's."""
        if isinstance(self.files, list):
            return {"train": self.files, "validation": [], "test": []}
        return {name: getattr(self.files, name) for name in SplitFiles.model_fields}
