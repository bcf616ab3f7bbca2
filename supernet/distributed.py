"""Data-parallel training by several processes: which rows each takes, and how they average gradients.

Not ``DistributedDataParallel``: it needs the same parameters in every step, or scans the graph for those without a
gradient. Here every process trains the same slices, so the architectures determine which parameters have a gradient.
Gradients are reduced in buckets after the last slice of a step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.supernet.batch import Batch
from moesaic.supernet.model import Transformer

BUCKET_ELEMENTS = 2**23
"""32 MiB of float32 per reduction: few reductions, and a buffer that is small beside the gradients."""


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, of which this is number ``rank``; by default the only one.

    ``flags`` is a group that reduces values on the CPU, on whatever device the gradients are. With a ``mesh``, weights,
    gradients and optimiser state are sharded (FSDP2, arXiv 2304.11277), and FSDP averages the gradients.
    """

    rank: int = 0
    size: int = 1
    flags: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the shared files."""
        return self.rank == 0

    def rows(self, batch: Batch) -> Batch:
        """This process's sequences of a batch: every ``size``-th, so that all processes have the same number.

        Raises
        ------
        MoesaicError : ``size`` does not divide their number.
        """
        if len(batch) % self.size:
            raise MoesaicError(
                "a batch cannot be dealt evenly",
                where="train.workers",
                found=f"{self.size} for {len(batch)} rows",
                allowed="a divisor of batch_size",
            )
        return batch[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds in any process; all get the same answer."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, self.flags)
        return bool(value)

    def mean(self, figures: Sequence[float]) -> list[float]:
        """Means over the processes, the same in all of them."""
        if self.size == 1:
            return list(figures)
        values = torch.tensor(figures, dtype=torch.float64)
        dist.all_reduce(values, group=self.flags)
        return (values / self.size).tolist()

    def average_gradients(self, model: Transformer, slices: Sequence[Architecture]) -> None:
        """Replace the gradients of the parameters that ``slices`` use by their means over the processes.

        A missing gradient counts as zero, since otherwise the other processes would wait for it forever.
        """
        if self.size == 1 or self.mesh is not None:
            return
        gradients = []
        for parameter in used_parameters(model, slices):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            flat /= self.size
            for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def shard(self, model: Transformer) -> None:
        """With a ``mesh``, shard the weights of ``model`` layer by layer."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for module in (*model.layers, model):
            fully_shard(module, mesh=self.mesh)
        register_fsdp_forward_method(model, "run")

    def whole(self, tensor: Tensor) -> Tensor:
        """The full ``tensor``, on the CPU if it is sharded. Every process must call this."""
        if self.mesh is None:
            return tensor
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """This process's part of a full ``tensor`` that belongs to ``parameter``, on the parameter's device."""
        tensor = tensor.to(parameter.device)
        if self.mesh is None:
            return tensor
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(tensor, self.mesh, parameter.placements, src_data_rank=None)


ALONE = Ranks()


@contextmanager
def joined(device: torch.device, shard: bool = False) -> Iterator[Ranks]:
    """Join the process group of the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and leave it at the end. A
    group that this process has joined already is used and kept. Processes of one machine listen on its loopback
    interface alone."""
    joins = not dist.is_initialized()
    if joins:
        if os.environ.get("MASTER_ADDR") in _LOOPBACK:
            name = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        size = dist.get_world_size()
        mesh = init_device_mesh(device.type, (size,)) if shard and size > 1 else None
        flags = dist.new_group(backend="gloo")
        assert isinstance(flags, dist.ProcessGroup)
        yield Ranks(dist.get_rank(), size, flags, mesh)
    finally:
        if joins:
            dist.destroy_process_group()


def used_parameters(model: Transformer, slices: Sequence[Architecture]) -> list[Tensor]:
    """The parameters of ``model`` that get a gradient when ``slices`` train, in the model's order."""
    used = {name for architecture in slices for name in model.where(architecture)}
    return [parameter for name, parameter in model.named_parameters() if name in used]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in buckets; one ends where the total size reaches the next multiple of ``BUCKET_ELEMENTS``."""
    tensors = list(tensors)
    before = accumulate((tensor.numel() for tensor in tensors), initial=0)
    buckets: dict[int, list[Tensor]] = {}
    for tensor, elements in zip(tensors, before, strict=False):
        buckets.setdefault(elements // BUCKET_ELEMENTS, []).append(tensor)
    yield from buckets.values()
