"""MLPs in chunks of tokens; that training equals training without them is test_savers.py's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTConfig, OPTForCausalLM

from mold.method.chunked_mlp import chunk_mlps, decoder_layers
from tests.tiny_models import make_model

IDS = torch.arange(60).view(2, 30)


class Widest(TorchDispatchMode):
    """The most rows that a tensor of this width had."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return made


@pytest.mark.parametrize(("tokens", "rows"), [(1, 2), (9, 8), (60, 60), (1000, 60)])
def test_no_more_tokens_at_once(tokens, rows):
    model = make_model("llama", intermediate_size=133).train()
    chunk_mlps(model, "mlp_chunk_size", tokens)
    weights = {tuple(layer.mlp.gate_proj.weight.shape) for layer in decoder_layers(model)}
    assert weights == {(133, 64)}
    with Widest(133) as widest:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert widest.rows == max(rows, 64)  # 64: a transposed weight


def test_a_second_size_takes_the_place_of_the_first():
    model = make_model("llama", intermediate_size=233).eval()
    for tokens in (2, 40):
        chunk_mlps(model, "mlp_chunk_size", tokens)
    with Widest(233) as widest, torch.no_grad():
        model(input_ids=IDS)
    assert widest.rows == max(40, 64)


def test_dropout_in_a_chunk_is_drawn_once():
    """What the backward computes again is what the forward computed."""
    mlps = [make_model("gpt2", resid_pdrop=0.5).train() for _ in range(2)]
    chunk_mlps(mlps[0], "mlp_chunk_size", 14)
    states = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for model, whole in zip(mlps, (True, False), strict=True):
        mlp = decoder_layers(model)[0].mlp
        torch.manual_seed(3)
        out = mlp(states) if whole else torch.cat([mlp(chunk.contiguous()) for chunk in states.split(7, 1)], 1)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*mlp.parameters()])])
    torch.testing.assert_close(*results)


def test_without_gradients_nothing_is_kept():
    model = make_model("llama").eval()
    expected = model(input_ids=IDS).logits
    chunk_mlps(model, "mlp_chunk_size", 7)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"mlp_chunk_size: is 8, must not be given for GptOssForCausalLM: .*experts"):
        chunk_mlps(make_model("gpt_oss"), "mlp_chunk_size", 8)
    opt = OPTForCausalLM(OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=9))
    with pytest.raises(ValueError, match="must not be given for OPTForCausalLM: its layers have no module 'mlp'"):
        chunk_mlps(opt, "mlp_chunk_size", 8)
    mixing = make_model("llama")

    class Mixing(type(mixing.model.layers[1].mlp)):
        def forward(self, states):
            return super().forward(states).cumsum(1)

    mixing.model.layers[1].mlp.__class__ = Mixing
    with pytest.raises(ValueError, match="must not be given for LlamaForCausalLM: its Mixing is not the same for each"):
        chunk_mlps(mixing, "teacher_chunk_size", 8)
