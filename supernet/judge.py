"""The judge of a search: what an architecture is worth with inherited weights, here or in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moesaic.search_spaces import Architecture
from moesaic.supernet.batch import Batch
from moesaic.supernet.bleu import BLEU, evaluate_bleu
from moesaic.supernet.evaluate import Evaluation, evaluate
from moesaic.supernet.model import Transformer


@dataclass(frozen=True)
class Judge:
    """Evaluates slices of ``model`` on ``batch`` by ``loss`` (a key of ``LOSSES``, or ``BLEU``), in bfloat16 if
    requested."""

    model: Transformer
    batch: Batch
    bfloat16: bool = False
    loss: str = "cross_entropy"

    def __call__(self, architecture: Architecture) -> Evaluation:
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            if self.loss == BLEU:
                return evaluate_bleu(self.model, self.batch, architecture)
            return evaluate(self.model, self.batch, architecture, self.loss)

    def plain(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What another process needs to make the same judge: plain data for JSON, and arrays."""
        model = self.model
        facts = {
            "architecture": model.architecture.to_dict(),
            "vocab_size": model.vocab_size,
            "source_vocab_size": model.source_vocab_size,
            "sharing": model.sharing,
            "bfloat16": self.bfloat16,
            "loss": self.loss,
        }
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"batch.{name}": tensor for name, tensor in vars(self.batch).items() if tensor is not None}
        return facts, {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    @staticmethod
    def of(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray], device: torch.device) -> Judge:
        """The judge that ``plain`` describes, with views of ``arrays`` on a CPU and copies of them on a GPU."""
        with torch.device("meta"):
            architecture = Architecture.from_dict(facts["architecture"])
            model = Transformer(architecture, facts["vocab_size"], facts["sharing"], facts["source_vocab_size"])
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        weights, batch = (
            {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in ("model.", "batch.")
        )
        model.load_state_dict(weights, assign=True)
        return Judge(model.to(device).eval(), Batch(**batch), facts["bfloat16"], facts["loss"])
