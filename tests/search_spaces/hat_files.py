"""HAT's 44 published sub-transformers, and the files they come in.

The table is made of the files in ``configs/*/subtransformer`` of https://github.com/mit-han-lab/hardware-aware-transformers
(MIT licence) at 70e5a27, and of the figures in its README: parameters in millions without embeddings, GFLOPs, and BLEU.
Latency is in seconds on a Raspberry Pi, in milliseconds elsewhere.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

HAT_NETWORKS = list(csv.DictReader((Path(__file__).parent / "hat_subtransformers.csv").open(encoding="utf-8")))


def hat_file(network: Mapping[str, str]) -> str:
    """The sub-transformer file of a row of the table."""
    text = ""
    for stack in ("encoder", "decoder"):
        sizes = network[f"{stack}_ffn"].split()
        text += f"{stack}-embed-dim-subtransformer: {network[f'{stack}_width']}\n"
        text += f"{stack}-layer-num-subtransformer: {len(sizes)}\n"
        text += f"{stack}-ffn-embed-dim-all-subtransformer: {_list(sizes)}\n"
        text += f"{stack}-self-attention-heads-all-subtransformer: {_list(network[f'{stack}_heads'].split())}\n"
    text += f"decoder-ende-attention-heads-all-subtransformer: {_list(network['cross_heads'].split())}\n"
    return text + f"decoder-arbitrary-ende-attn-all-subtransformer: {_list(network['arbitrary'].split())}\n"


def _list(values: list[str]) -> str:
    return f"[{', '.join(values)}]"
