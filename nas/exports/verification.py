"""Asks another program for the logits of a converted model, in a process of its own, and compares them with ours."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from json import decoder
from pathlib import Path

import torch

from moesaic.nas.data.tokenizer import tokenizer_of
from moesaic.nas.exports.figures import RuntimeCheck
from moesaic.search_spaces import MoesaicError
from moesaic.supernet import Transformer
from moesaic.supernet.checkpoint import save_tensors

TOLERANCE = 1e-4
"""Largest difference of logits that float32 explains."""
_POSITIONS = 128
_SECONDS = 1800


def verified(program: str, module: str, folder: Path, model: Transformer, tokenizer: Path) -> RuntimeCheck:
    """What ``program`` computes for the converted ``model`` in ``folder``: text of the standard library.

    ``module`` is run as ``python -m MODULE FOLDER REFERENCE``, where REFERENCE is a safetensors file with ``ids``
    [1, S] and ``logits`` [1, S, V]; it prints a JSON object with the version and both differences.

    Raises
    ------
    MoesaicError : the program does not load the model, or its logits differ; the tokenizer has ids that it has not.
    """
    ids = tokenizer_of(tokenizer, model.vocab_size).encode(inspect.getsource(decoder)).ids
    longest = min(_POSITIONS, model.architecture.backbone.max_positions or _POSITIONS)
    tokens = torch.tensor([ids[:longest]])
    with torch.inference_mode():
        logits = model(tokens)
    with tempfile.TemporaryDirectory() as temporary:
        reference = Path(temporary) / "reference.safetensors"
        save_tensors(reference, {"ids": tokens, "logits": logits}, {})
        command = [sys.executable, "-m", module, str(folder), str(reference)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise MoesaicError(f"{program} took longer than {_SECONDS} s, so the converted model is removed") from None
    if done.returncode:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise MoesaicError(f"{program} does not run the converted model, which is removed", found=said)
    check = RuntimeCheck(program=program, positions=tokens.shape[1], **json.loads(done.stdout.splitlines()[-1]))
    worst = max(check.logit_difference, check.decode_logit_difference)
    if not worst <= TOLERANCE:
        raise MoesaicError(
            f"the logits of {program} {check.version} are others, so the converted model is removed",
            found=f"largest difference {worst:.2g}",
            allowed=f"at most {TOLERANCE:g}",
        )
    return check
