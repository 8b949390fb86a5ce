"""Training in several processes, one for each GPU, as torchrun starts them.

Each process takes its share of every batch, and the gradients of all are summed before each step. So all of them make
the same steps, and the adapter is that of one process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout


@contextmanager
def joined() -> Iterator[int]:
    """Be one of the processes that torchrun started; yields the rank. Only process 0 prints. Call it first.

    Each process sees one GPU: where unsloth sees several, it waits for them in every layer.
    """
    rank, world_size = rank_and_size()
    visible, local_rank = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("LOCAL_RANK", "0")
    if visible != "":
        os.environ["CUDA_VISIBLE_DEVICES"] = local_rank if visible is None else visible.split(",")[int(local_rank)]
    with open(os.devnull, "w") as nowhere, nullcontext() if rank == 0 else redirect_stdout(nowhere):
        yield rank
    if world_size > 1:
        # Not after an error: this waits for the others, who wait for this process. torchrun ends them when it exits.
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def connect() -> None:
    """Find the other processes. Not before the base is loaded: once they are connected, transformers writes files in
    process 0 alone, and unsloth makes processes wait for each other while each still does its own."""
    import torch
    from torch import distributed

    if rank_and_size()[1] > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def sum_gradients(weights: list, loss, stop: bool) -> tuple[object, bool]:
    """Sum the gradients of all processes, in place; the summed loss, and whether one of them was asked to stop.

    weights: tensors with gradients. loss: a tensor of no dimensions.
    """
    import torch
    from torch import distributed

    # One message holds all: the gradients, the loss, and the wish to stop.
    flat = torch.cat([weight.grad.flatten() for weight in weights] + [loss.view(1), loss.new_full((1,), stop)])
    distributed.all_reduce(flat)
    for weight, summed in zip(weights, flat[:-2].split([weight.numel() for weight in weights]), strict=True):
        weight.grad.copy_(summed.view_as(weight))
    return flat[-2].clone(), bool(flat[-1] > 0)
