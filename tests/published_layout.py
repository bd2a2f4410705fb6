"""Random models in the layout of the models that were published with the paper."""

import json
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

INPUT_IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
GROUPS = HEADS // KV_HEADS


class PublishedAttention(nn.Module):
    """What github.com/qiuzh20/gated_attention computes, from its `q_proj`."""

    def __init__(self, attention: nn.Module, q_proj: nn.Linear):
        super().__init__()
        self.theirs, self.q_proj = attention, q_proj

    def forward(self, hidden_states, position_embeddings, **_):
        batch, length, _ = hidden_states.shape
        packed = self.q_proj(hidden_states).view(batch, length, KV_HEADS, -1)
        query, gate = packed[..., : GROUPS * HEAD_DIM], packed[..., GROUPS * HEAD_DIM :]
        query = query.reshape(batch, length, HEADS, HEAD_DIM)
        gate = gate.reshape(batch, length, HEADS, -1)
        key = self.theirs.k_proj(hidden_states).view(batch, length, KV_HEADS, HEAD_DIM)
        value = self.theirs.v_proj(hidden_states).view(batch, length, KV_HEADS, HEAD_DIM)
        if hasattr(self.theirs, "q_norm"):
            query, key = self.theirs.q_norm(query), self.theirs.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = (states.repeat_interleave(GROUPS, 1) for states in (key, value))
        logits = (query @ key.mT) / HEAD_DIM**0.5
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        output = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ value
        output = output.transpose(1, 2) * torch.sigmoid(gate)
        return self.theirs.o_proj(output.reshape(batch, length, -1)), None


def published(folder: Path, family: str, granularity: str, bias: bool = False) -> torch.Tensor:
    """Write a random model in the published layout; returns its logits."""
    model = tiny_model(family, attention_bias=bias)
    rows = HEADS * HEAD_DIM + HEADS * (1 if granularity == "headwise" else HEAD_DIM)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    for index, layer in enumerate(model.model.layers):
        q_proj = nn.Linear(64, rows, bias=bias)
        q_proj.weight.data.normal_(std=0.2)
        if bias:  # gates have none
            packed = torch.zeros(KV_HEADS, rows // KV_HEADS)
            packed[:, : GROUPS * HEAD_DIM].normal_()
            q_proj.bias.data = packed.flatten()
        prefix = f"model.layers.{index}.self_attn.q_proj."
        weights |= {prefix + name: tensor.clone() for name, tensor in q_proj.state_dict().items()}
        layer.self_attn = PublishedAttention(layer.self_attn, q_proj)
    model.save_pretrained(folder, state_dict=weights)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    flags = {"use_qk_norm": family == "qwen3", "qkv_bias": bias, "model_type": "qwen3"}
    flags |= {f"{granularity}_attn_output_gate": True, "architectures": ["Qwen3ForCausalLM"]}
    del config["attention_bias"]
    (folder / "config.json").write_text(json.dumps(config | flags))
    with torch.no_grad():
        return model(INPUT_IDS).logits
