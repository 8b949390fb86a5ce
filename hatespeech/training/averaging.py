"""Several LoRAs of one beginning, averaged to one adapter of their rank.

The mean of their updates B A has several times the rank; what of it an adapter of the same rank can hold is its
truncated singular value decomposition (Eckart and Young 1936). Averaging weights instead of answers ("model soup",
Wortsman et al. 2022) costs nothing in serving.
"""

from collections.abc import Sequence


def state(model) -> dict:
    """A copy of the trainable weights, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def restore(model, kept: dict) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in kept:
                weight.copy_(kept[name])


def average(states: Sequence[dict]) -> tuple[dict, float]:
    """The members' mean update as one state, and the share of its squared norm that the rank can't hold.

    states: of state(), each of the same LoRA's A (rank, in) and B (out, rank) matrices.
    """
    import torch

    mean, held, whole = {}, 0.0, 0.0
    for name_a in (name for name in states[0] if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        rank, dtype = len(states[0][name_a]), states[0][name_a].dtype
        # (out, k rank) and (k rank, in), whose product is the mean of the k updates.
        b = torch.cat([each[name_b].double() for each in states], dim=1) / len(states)
        a = torch.cat([each[name_a].double() for each in states])
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        mean[name_b] = ((q_b @ u[:, :rank]) * root).to(dtype)
        mean[name_a] = ((root[:, None] * v[:rank]) @ q_a.T).to(dtype)
        held += (s[:rank] ** 2).sum().item()
        whole += (s**2).sum().item()
    return mean, 1 - held / max(whole, 1e-30)
