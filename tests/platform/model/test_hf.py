"""Exports open in transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nsa_platform.model import hf
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.weights import export_model


@pytest.fixture
def exported(tmp_path, make_config, make_model):
    model = make_model(make_config())
    return model, export_model(tmp_path / "model", model.config, model.state_dict())


def test_auto_classes_load_an_export(exported):
    model, folder = exported
    hf.register()
    hf.register()
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, hf.NsaHfConfig) and config.hidden_size == 32
    assert config.platform_config() == model.config

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, hf.NsaForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    ids = torch.randint(0, 61, (2, 30))
    wanted = model.logits(model(ids.flatten(), PackedInputs.from_lengths([30, 30])).hidden)
    assert torch.equal(loaded(ids).logits.flatten(0, 1), wanted)
    with pytest.raises(ValueError, match="padding"):
        loaded(ids, attention_mask=torch.tensor([[1] * 29 + [0]] * 2))
    with pytest.raises(ValueError, match="labels: not taken"):
        loaded(ids, labels=ids)


def test_saving_from_transformers_and_loading_again(exported, tmp_path):
    _, folder = exported
    hf.register()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for one, other in zip(loaded.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
