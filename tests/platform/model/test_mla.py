"""MLA against its equations in plain float64, for each query by itself."""

import torch

from nsa_platform.config.model import MlaAttentionConfig
from nsa_platform.model.inputs import PackedInputs
from nsa_platform.model.rotary import attention_scale, rotation_of
from nsa_platform.model.step import packed_step


def by_equations(module, config, x):
    """One sequence: latents, keys and values of every head, softmax over the past, row by row."""
    sizes: MlaAttentionConfig = module.config
    heads, rank, plain = sizes.query_heads, sizes.kv_lora_rank, sizes.key_width - sizes.rotary_width
    turn = rotation_of(torch.arange(len(x)), config, dtype=x.dtype)
    down = x @ module.latent.weight.T
    latent = down[:, :rank]
    latent = latent / (latent.square().mean(1, keepdim=True) + config.norm_eps).sqrt()
    latent = latent * module.latent_norm.weight
    shared_key = turn.apply(down[:, None, rank:])[:, 0]
    queries = (x @ module.query.weight.T).view(len(x), heads, -1)
    up = latent @ module.key_value.weight.T
    keys = up[:, : heads * plain].view(len(x), heads, plain)
    values = up[:, heads * plain :].view(len(x), heads, -1)
    rows = []
    for t in range(len(x)):
        outs = []
        for h in range(heads):
            turned = turn.apply(queries[:, :, plain:])[t, h]
            scores = keys[: t + 1, h] @ queries[t, h, :plain] + shared_key[: t + 1] @ turned
            outs.append((scores * attention_scale(config)).softmax(0) @ values[: t + 1, h])
        rows.append(torch.cat(outs))
    return torch.stack(rows) @ module.output.weight.T


def test_equals_the_equations_and_sees_its_own_sequence_alone(make_config, make_model):
    config = make_config({"kind": "mla"})
    model = make_model(config, dtype=torch.float64)
    module = model.layers[0].attention
    x = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = [13, 7]
    step = packed_step(PackedInputs.from_lengths(lengths), config, dtype=x.dtype)
    with torch.no_grad():
        wanted = torch.cat([by_equations(module, config, part) for part in x.split(lengths)])
        torch.testing.assert_close(module(x, step), wanted, rtol=0, atol=1e-12)


def test_every_weight_learns(make_config, make_model):
    model = make_model(make_config({"kind": "mla"}))
    ids = torch.arange(30)
    model(ids, PackedInputs.from_lengths([30])).hidden.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
