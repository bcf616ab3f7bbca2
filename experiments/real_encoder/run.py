"""A sentence encoder made sparser without training: the searched model, the best uniform and the best pruned one.

python -m experiments.real_encoder.run MODEL TRAIN VALIDATION TEST [--out runs/real-encoder] [KEY=VALUE]...

MODEL is a Hugging Face folder of an encoder without a head; the others are text files. It is the run of sparsify.yaml.
Then each model embeds sentences of TEST (the mean of its states), and the order of the sentences' similarities is
compared with the source's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import moesaic
from experiments.common import Row, arguments_of, facts, markdown, run_script
from moesaic import Transformer, open_checkpoint, open_run, write_value

HERE = Path(__file__).parent
SENTENCES, SHORTEST, LONGEST = 300, 8, 128
"""Sentences that are compared; the fewest words of one, the most tokens."""


def sentences(path: Path) -> list[str]:
    """The first sentences of a text that are long enough."""
    parts = path.read_text(encoding="utf-8").replace("\n", " ").split(". ")
    return [part.strip() for part in parts if len(part.split()) >= SHORTEST][:SENTENCES]


@torch.inference_mode()
def embeddings(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """[n, D] the mean state of each text, of length 1."""
    encoded = tokenizer.encode_batch(texts)
    tokens = torch.tensor([one.ids for one in encoded])
    mask = torch.tensor([one.attention_mask for one in encoded]).bool()
    states = torch.cat([model(part, mask=own) for part, own in zip(tokens.split(16), mask.split(16), strict=True)])
    return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of the similarities of all pairs of sentences."""
    pairs = np.triu_indices(len(one), 1)
    return float(spearmanr((one @ one.T).numpy()[pairs], (other @ other.T).numpy()[pairs])[0])  # pyright: ignore


def main() -> None:
    arguments, settings = arguments_of(__doc__, "runs/real-encoder")
    run = open_run(HERE / "sparsify.yaml", settings, arguments.out)
    summaries = moesaic.run(HERE / "sparsify.yaml", settings, arguments.out)

    checkpoint, texts = open_checkpoint(arguments.model), sentences(arguments.test)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(LONGEST)
    source = embeddings(checkpoint.load(), tokenizer, texts)
    rows: list[Row] = []
    for budget, summary in summaries.items():
        whole = summary.source
        assert whole is not None
        for result in (summary.chosen.retrained, *summary.rivals):
            folder = arguments.out / "budgets" / budget / "retrain" / result.name / f"seed-{summary.seed}"
            rows.append(
                {
                    "budget": budget,
                    "model": result.name,
                    "flops": round(result.measured["flops"] / whole.measured["flops"], 3),
                    "cosine": round(1 - result.loss, 4),
                    "above_searched": round(result.above_searched.mean, 4),
                    "p_value": result.above_searched.p_value,
                    "agreement": round(agreement(embeddings(moesaic.load(folder), tokenizer, texts), source), 4),
                }
            )
    seconds = {budget: summary.stage_seconds for budget, summary in summaries.items()}
    result = {**facts(run.device), "seed": run.config.seed, "settings": arguments.settings, "stage_seconds": seconds}
    write_value(HERE / "result.json", result | {"sentences": len(texts), "rows": rows}, dict)
    table = [
        [row["budget"], row["model"], f"{row['flops']:.0%}", f"{row['cosine']:.3f}", f"{row['agreement']:.3f}"]
        for row in rows
    ]
    print(markdown("budget|model|FLOPs|cosine|order of similarities", table))


if __name__ == "__main__":
    run_script(main)
