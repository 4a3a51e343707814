import torch
from torch import nn

from rankgrpo.runtime.distributed import full_parameters


def test_of_a_whole_model_they_are_its_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = nn.Parameter(torch.eye(2))
    found = dict(full_parameters(model))
    assert list(found) == ["0.weight", "0.bias", "1.weight"]
    assert found["1.weight"].data_ptr() == model[1].weight.data_ptr() and not found["1.weight"].requires_grad
    assert dict(full_parameters(model, torch.bfloat16))["0.bias"].dtype == torch.bfloat16
