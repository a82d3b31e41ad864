"""Several processes under torchrun: what they agree on, and models sharded over them (FSDP2).

One process joins no group and takes none of these paths. What a run decides comes from numbers that
are the same on every rank: computed by all from the same data, summed over ranks, or rank 0's.
Shapes: a "local" tensor is the part of a sharded one that this rank holds."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data import UserError


def active() -> bool:
    """Whether this process was started by torchrun and has joined the others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def join() -> None:
    """Under torchrun: join the process group, NCCL on GPUs and gloo on CPUs. Only rank 0 prints."""
    if "RANK" not in os.environ or active():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        start = tqdm.__init__
        tqdm.__init__ = lambda bar, *args, **more: start(bar, *args, **{**more, "disable": True})


def leave() -> None:
    if active():
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this rank is the first of all to ask: what ends a command is said once. The cause
    comes before its consequences: a rank says why before the others find it gone."""
    if not active():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("said", 1) == 1
    except RuntimeError:  # torchrun, which keeps the store, is gone
        return True


def _device() -> torch.device:
    """Where collectives take their tensors from."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def all_sum(values: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """The sum over all ranks, element by element, on every rank; the values themselves where there
    is one process."""
    return _reduced(values, dist.ReduceOp.SUM)


def all_max(values: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """The largest of all ranks, element by element, on every rank."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values, operation):
    if not active():
        return values
    total = torch.as_tensor(values).to(_device(), copy=True)
    dist.all_reduce(total, operation)
    return total.cpu().numpy() if isinstance(values, np.ndarray) else total.to(values.device)


def first_rank(function: Callable, *arguments):
    """function(*arguments) on rank 0 alone -> its result, on every rank. Its UserError is raised on
    every rank."""
    if not active():
        return function(*arguments)
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function(*arguments)
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0, device=_device())
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def gather(items: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if not active():
        return items
    found = [None] * world()
    dist.all_gather_object(found, items)
    return sum(found, [])


def barrier() -> None:
    if active():
        dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every rank holds whole -> sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(whole, DTensor):
        return whole
    whole = whole.to(parameter.device)
    place = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, *place, src_data_rank=None)


# ---- Sharded models ------------------------------------------------------------------------------
def shard(model: torch.nn.Module, lm: torch.nn.Module, device: torch.device) -> None:
    """Shard a model over all ranks, in place: each keeps 1/world of every parameter, a decoder
    block is gathered just before it is used. lm: the causal LM in it. Weights and buffers become
    rank 0's; the others' need not hold anything."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    whole = model.state_dict()
    mesh = dist.init_device_mesh(device.type, (world(),))
    for module in lm.modules():
        if type(module).__name__ in (lm._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    # The rest stays gathered from hidden_states to the end of backward: the loss, outside of the
    # model's forward, takes the head's weight in between.
    fully_shard(lm, mesh=mesh, reshard_after_forward=False)
    for module in lm.modules():
        if isinstance(module, FSDPModule):  # gradients are summed: see common.backward
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
            module.set_gradient_divide_factor(1.0)
    # GPT-2 returns a view of its states, which nobody writes into.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    backbone = getattr(lm, lm.base_model_prefix)
    lm.sharded_backbone = functools.partial(_last_hidden_state, backbone)
    register_fsdp_forward_method(lm, "sharded_backbone")
    fill(model, whole)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
        dist.broadcast(buffer.data, 0)


def fill(model: torch.nn.Module, whole: dict[str, Tensor]) -> None:
    """Put rank 0's whole parameters into a sharded model. whole: read on rank 0 alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole if rank() == 0 else {}, options=options)


def _last_hidden_state(backbone, ids: Tensor) -> Tensor:
    return backbone(input_ids=ids, use_cache=False).last_hidden_state


def reshard(lm: torch.nn.Module) -> None:
    """Give up what a forward pass without gradients has left gathered: model.parameters() are the
    optimizer's again."""
    if hasattr(lm, "sharded_backbone"):
        lm.reshard()


def whole_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """name -> whole parameter or buffer, on the CPU of rank 0; {} on the others. A tied head is
    not named twice."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    found = get_model_state_dict(model, options=options)
    return {name: value for name, value in found.items() if name in names}
