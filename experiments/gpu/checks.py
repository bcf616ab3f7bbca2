"""Does a GPU compute what the CPU computes, and allocate what was priced? Random models of two presets, one of them of
models that translate, in both types.

python -m experiments.gpu.checks [--out FILE] [--models 24] [--small]

For each model: logits of a whole pass and of a decoding step with grouped heads, against float32 on the CPU; a
left-padded batch against the same sequences without padding; finite gradients; memory of a pass over its price. The
script fails if a check does. ``--small`` compares the CPU with itself, to show that the script works.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor

from experiments.common import Row, facts, parser_of, run_script
from moesaic import (
    Architecture,
    Context,
    Device,
    DeviceConfig,
    Transformer,
    activation_memory,
    choose_device,
    peak_activation_bytes,
    random_passes,
    write_value,
)
from moesaic.kernels import has_triton
from moesaic.search_spaces import load_space, preset_source
from moesaic.supernet import KeyValueCache

Phase = Literal["prefill", "decode", "translate"]
VOCABULARY, LENGTH, BATCH, PADDING = 1024, 96, 4, 7
TOLERANCE = {"float32": 2e-3, "bfloat16": 8e-2}
"""Largest difference of logits over their standard deviation: sums in another order, and products in 8 bits."""


def logits(
    model: Transformer, tokens: Tensor, device: Device, source: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    with torch.inference_mode(), device.autocast():
        return model(tokens, mask=mask, source=source).float()


def difference(found: Tensor, expected: Tensor) -> float:
    """In standard deviations of what is expected. Routing may differ where two experts are nearly equal, so the 99th
    percentile over tokens counts, not the largest."""
    error = (found.cpu() - expected).abs().amax(-1).flatten() / expected.std()
    return float(error.quantile(0.99))


def decoded(model: Transformer, tokens: Tensor, device: Device, source: Tensor | None) -> Tensor:
    """Logits of the last token, computed after a cache of the others."""
    cache = KeyValueCache(model.architecture, len(tokens), tokens.shape[1], device.torch_device)
    with torch.inference_mode(), device.autocast():
        model.run(tokens[:, :-1], cache=cache, source=source)
        return model.run(tokens[:, -1:], cache=cache).logits.float()


def gradients_are_finite(model: Transformer, tokens: Tensor, device: Device, source: Tensor | None) -> bool:
    with device.autocast():
        output = model.run(tokens, source=source)
    (output.logits.float().logsumexp(-1).mean() + output.balance_loss()).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return len(found) > 0 and all(bool(gradient.isfinite().all()) for gradient in found)


def check(architecture: Architecture, device: Device, seed: int) -> Row:
    torch.manual_seed(seed)
    reference = Transformer(architecture, VOCABULARY).eval()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    cpu = replace(device, kind="cpu", dtype="float32")
    source = torch.randint(0, VOCABULARY, (BATCH, LENGTH // 2)) if architecture.encoder else None
    expected = logits(reference, tokens, cpu, source)
    model = Transformer(architecture, VOCABULARY)
    model.load_state_dict(reference.state_dict())
    model = model.to(device.torch_device).eval()
    there = tokens.to(device.torch_device)
    source = None if source is None else source.to(device.torch_device)
    padded = torch.cat([there.new_zeros(BATCH, PADDING), there], dim=1)
    mask = torch.arange(LENGTH + PADDING, device=there.device).expand(BATCH, -1) >= PADDING
    phases: tuple[Phase, ...] = ("prefill", "translate" if architecture.encoder else "decode")
    errors = {
        "prefill": difference(logits(model, there, device, source), expected),
        "decode": difference(decoded(model, there, device, source), expected[:, -1:]),
        "padded": difference(logits(model, padded, device, source, mask)[:, PADDING:], expected),
    }
    return {
        "fingerprint": architecture.fingerprint,
        "dtype": device.dtype,
        "errors": {name: round(error, 5) for name, error in errors.items()},
        "memory": {phase: memory(architecture, device, phase) for phase in phases},
        "passed": max(errors.values()) < TOLERANCE[device.dtype] and gradients_are_finite(model, there, device, source),
    }


def memory(architecture: Architecture, device: Device, phase: Phase) -> float:
    """Measured over priced bytes of activations and cache, under the counted load."""
    implementation = "triton" if has_triton(device.torch_device) else "torch"
    context = Context(VOCABULARY, 4 * LENGTH, BATCH, device.bytes_per_value, phase, implementation)
    if architecture.encoder:
        context = replace(context, sequence_length=16, source_length=LENGTH, beam=4 if phase == "translate" else 1)
    (one,) = random_passes([architecture], context, device, seed=0)
    return round(peak_activation_bytes(one) / activation_memory(architecture, one.uses(), context), 3)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checks.json")
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--small", action="store_true", help="two small models, on the CPU")
    arguments = parser.parse_args()
    spaces = [load_space(preset_source(name)) for name in ("tiny" if arguments.small else "small", "translation")]
    kind = "cpu" if arguments.small else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        device, rng = choose_device(DeviceConfig(device=kind, dtype=dtype)), Random(0)
        for seed in range(2 if arguments.small else arguments.models):
            rows.append(check(spaces[seed % 2].sample_balanced(rng), device, seed))
            print(rows[-1], flush=True)
    failed = [row["fingerprint"] for row in rows if not row["passed"]]
    ratios = [ratio for row in rows for ratio in row["memory"].values()]
    result = {**facts(device), "failed": failed, "memory_ratio": [min(ratios), max(ratios)], "rows": rows}
    write_value(arguments.out, result)
    print(
        f"{len(rows) - len(failed)} of {len(rows)} models agree; memory is {min(ratios)} to {max(ratios)} of its price"
    )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
