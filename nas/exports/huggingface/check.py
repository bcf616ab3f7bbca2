"""Run by ``nas.exports.verification``: the logits of an export in transformers, and how far they are from ours.

The package that it is part of has added the class to transformers."""

from __future__ import annotations

import json
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(folder: str, reference: str) -> None:
    expected = load_file(reference)
    ids, logits = expected["ids"], expected["logits"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first = ids.shape[1] // 2
    with torch.inference_mode():
        whole = model(ids).logits
        begun = model(ids[:, :first], use_cache=True)
        steps, past = [begun.logits], begun.past_key_values
        for position in range(first, ids.shape[1]):
            step = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
            steps.append(step.logits)
    found = {
        "version": transformers.__version__,
        "logit_difference": (whole - logits).abs().max().item(),
        "decode_logit_difference": (torch.cat(steps, 1) - logits).abs().max().item(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
