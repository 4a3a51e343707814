import pytest
import torch
from scenarios import play
from torch import nn

from rankgrpo.distributed import full_parameters


def test_of_a_whole_model_they_are_its_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = nn.Parameter(torch.eye(2))
    found = dict(full_parameters(model))
    assert list(found) == ["0.weight", "0.bias", "1.weight"]
    assert found["1.weight"].data_ptr() == model[1].weight.data_ptr() and not found["1.weight"].requires_grad
    assert dict(full_parameters(model, torch.bfloat16))["0.bias"].dtype == torch.bfloat16


@pytest.mark.slow
def test_of_a_split_model_they_are_what_it_was_made_of__and_a_full_disk_is_told_by_all(tmp_path):
    play(2, tmp_path, "whole_parameters", "full_disk")
