"""What the tests of this folder run in several processes: `torchrun scenarios.py NAME FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rankgrpo.distributed import full_parameters, start_parallel


def whole_parameters(folder: Path) -> None:
    """A sharded model gives back, by name and in order, the parameters it was made of; a tied one comes once."""
    start_parallel()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False))
    model[2].weight = model[0].weight
    made = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model[1], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for _ in range(2):
        found = dict(full_parameters(model))
        assert list(found) == list(made) == ["0.weight", "1.weight", "1.bias"]
        assert all(torch.equal(found[name], made[name]) for name in made)
        with torch.no_grad():
            model(torch.tensor([1, 2]))  # leaves the root whole, in bfloat16
    for name, tensor in full_parameters(model, torch.bfloat16):
        assert torch.equal(tensor, made[name].bfloat16())


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
