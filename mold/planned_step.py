"""A training step on tensors without values: what stands in its operators' places, and what counts them.

`mold.plan` has the idea. Everything here makes what a real step would make, and nothing of it is ever read.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from mold.method.chunked_mlp import chunk_length, chunk_mlps, decoder_layers
from mold.method.layer_mixture import loss_of_mixture
from mold.training.adapters import add_adapter, without_adapter
from mold.training.chunked_cross_entropy import ChunkedCrossEntropy
from mold.training.heads import ChunkedHead, FullHead

PLANNED = "mold_planned"
_PIECE_ROWS = 64
"""Most rows that a kernel takes at once."""
Operator = tuple[float, float, str]
"""FLOPs, bytes moved, kind."""


def planned_model(config: PretrainedConfig, dtype: str, attention: str) -> PreTrainedModel:
    """The model on the meta device: shapes alone."""
    config = copy.deepcopy(config)
    for name in ("attention_dropout", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        dtype = getattr(torch, dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def as_trained(model: PreTrainedModel, setup):
    """The student as training makes it from the model: in 4 bits, with its adapter and checkpointing."""
    with torch.device("meta"):
        if setup.load_in_4bit:
            _quantize(model, torch.bfloat16 if setup.bf16 else getattr(torch, setup.dtype))
        if setup.peft_config is not None:
            model = add_adapter(model, copy.deepcopy(setup.peft_config))  # peft writes into it
    if setup.mlp_chunk_size is not None:
        chunk_mlps(without_adapter(model), "mlp_chunk_size", setup.mlp_chunk_size, planned=planned_chunks)
    if setup.activation_checkpointing:
        # Saving the random state reads values, which there are none of.
        new = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.19
        enable = new or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    if setup.offload:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_checkpoint_on_host)
    return model.train()


def _checkpoint_on_host(function, *args, **kwargs):
    """As transformers does with offload=True: what is kept of a layer is not on the device until its backward."""
    hooks = (
        lambda t: (t.shape, t.dtype),
        lambda shape_and_dtype: torch.empty(shape_and_dtype[0], dtype=shape_and_dtype[1]),
    )
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _InFourBits(nn.Linear):
    """What bitsandbytes keeps of a linear layer, and makes of it when it is used."""

    def __init__(self, layer: nn.Linear | Conv1D, compute_dtype: torch.dtype):
        wide, narrow = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        super().__init__(narrow, wide, bias=False)
        self.bias, self._dtype = layer.bias, compute_dtype
        size = wide * narrow
        self.weight = nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(-(-size // 64)))

    def forward(self, x):
        out = _Dequantized.apply(x.to(self._dtype), self.weight, (self.out_features, self.in_features))
        return (out if self.bias is None else out + self.bias.to(self._dtype)).to(x.dtype)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, shape):
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None, None


def _quantize(model, compute_dtype):
    """All linear layers but the output, in place; the model then says of itself what a quantized one does."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D) and layer is not model.get_output_embeddings():
            model.set_submodule(name, _InFourBits(layer, compute_dtype))
    model.is_quantized = model.is_loaded_in_4bit = True


def on_fake_cpu(model):
    """The model's parameters and buffers become fake CPU tensors, shared where they were; inside a FakeTensorMode."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if tensors is module._parameters:
                        fake = torch.nn.Parameter(fake, tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                tensors[name] = made[id(tensor)][1]
    return model


@torch.no_grad()
def observe(model, batch, length, spans=None):
    """A forward of a teacher, whose signals are its layers' attention alone, [L, B, S, M]."""
    options = {} if spans is None else {"spans": spans, "output_attentions": True}
    ids, mask = (torch.zeros(batch, length, dtype=torch.int64) for _ in range(2))
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return None if spans is None else torch.stack(out.attentions)


def make_signals(teacher, config, setup):
    """The teacher's attention in a batch, [L1, B, S, M]: what its forward makes, or what was cached."""
    if not setup.trains_attention or setup.attention == "eager":
        return None
    if teacher is not None:
        texts = setup.texts
        some = texts if setup.teacher_chunk_size is None else max(1, setup.teacher_chunk_size // setup.length)
        parts = [min(some, texts - start) for start in range(0, texts, some)]
        return torch.cat([observe(teacher, part, setup.length, setup.spans) for part in parts], 1)
    layers = setup.teacher_layers or config.num_hidden_layers
    return torch.empty(1 if setup.signal_layers == "mixture" else layers, setup.texts, *setup.spans)


class _PlannedDivergence(torch.autograd.Function):
    """Of a mixture [B, S, M]: the loss [B], with the gradient that is made beside it."""

    @staticmethod
    def forward(ctx, mixed):
        ctx.save_for_backward(torch.empty_like(mixed))
        return torch.empty(len(mixed))

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, None, None]


def planned_loss(model, head, setup, signals):
    """The loss of a forward, by the trainer's own head; pooled attention is in `_PlannedAttention`."""
    rows, length, packed = setup.texts, setup.length, {}
    if setup.padding_free:
        packed = {"cu_seqlens": list(range(0, rows * length + 1, length))}
        rows, length = 1, rows * length
    ids, regions, mask = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(3))
    learned = _learned(head, rows, max(1, int((length - 1) * setup.learned)))
    options = {} if setup.attention == "eager" else {"spans": None if signals is None else setup.spans, **packed}
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.bf16):
        outputs = model(
            input_ids=ids,
            attention_mask=None if setup.attention == "eager" else mask,
            use_cache=False,
            output_attentions=setup.attention == "eager" or signals is not None,
            **options,
            **head.arguments(learned),
        )
        loss = head.cross_entropy(outputs, ids, regions, learned).sum()
    if setup.attention == "eager":  # pooling the maps: the backward begins with a gradient of every layer's
        loss = loss + sum(maps.mean(1).sum() for maps in outputs.attentions)
    if signals is not None:
        weights = torch.empty(len(outputs.attentions[0]), len(outputs.attentions), requires_grad=True)
        loss = loss + loss_of_mixture(_PlannedDivergence.apply, weights, outputs.attentions).sum()
    return loss


def _learned(head: FullHead | ChunkedHead, batch: int, count: int):
    """What `head.learned` would find where `count` positions of every text are learned; here are no values to find."""
    if isinstance(head, FullHead):
        return torch.zeros(count, dtype=torch.int64) if head.keeps_logits else None
    return tuple(torch.zeros(batch * count, dtype=torch.int64) for _ in range(2))


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live storages, and each operator's FLOPs and bytes moved."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peaks = [0]
        """Of the phases so far."""
        self.operators: list[Operator] = []
        self._alive: dict[int, weakref.ref] = {}

    def restart(self):
        self.peaks, self.operators = [self.live], []

    def next_phase(self):
        self.peaks.append(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim" or function.is_view:
            return result
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for tensor in outputs:
            self._watch(tensor.untyped_storage())
        moved = sum(x.numel() * x.itemsize for x in (*inputs, *outputs))
        counter = flop_registry.get(function._overloadpacket)
        flops = counter(*args, **(kwargs or {}), out_val=result) if counter else 0.0
        self.add(flops, moved, outputs[0].dtype if outputs else torch.float32)
        return result

    def add(self, flops: float, moved: float, dtype: torch.dtype, prefix: str = ""):
        self.operators.append((flops, moved, prefix + ("bfloat16" if dtype.itemsize == 2 else "float32")))

    def _watch(self, storage):
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_):
            self.live -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peaks[-1] = max(self.peaks[-1], self.live)


def _tracker() -> Tracker:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next(mode for mode in stack if isinstance(mode, Tracker))


def mark_layers(model: PreTrainedModel, tracker: Tracker) -> None:
    """The backward's phases end where the last layer but one and the second one have their gradients."""
    layers = decoder_layers(without_adapter(model))
    for place in (-2, 1) if len(layers) > 2 else ():
        trained = next((p for p in layers[place].parameters() if p.requires_grad), None)
        if trained is not None:
            trained.register_post_accumulate_grad_hook(lambda _: tracker.next_phase())


class PlannedCrossEntropy(ChunkedCrossEntropy):
    """Two chunks stand for all: hidden states and their gradient are whole, the others' operators are as theirs."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, softcap, chunk_size):
        ctx.hidden = hidden.shape

        def run(rows):
            ChunkedCrossEntropy.forward(ctx, hidden[:rows], weight, bias, targets[:rows], softcap, chunk_size)

        _run_chunks(run, len(hidden), chunk_size)
        return torch.empty(len(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        dhidden = torch.empty(ctx.hidden, dtype=hidden.dtype) if ctx.needs_input_grad[0] else None

        def run(rows):
            few = _Saved(ctx, (hidden[:rows], weight, bias, targets[:rows]))
            return ChunkedCrossEntropy.backward(few, grad[:rows])

        return dhidden, *_run_chunks(run, ctx.hidden[0], ctx.chunk_size)[1:]


class _Saved:
    """What the backward of a chunked cross-entropy reads."""

    def __init__(self, ctx, tensors):
        self.saved_tensors, self.needs_input_grad = tensors, ctx.needs_input_grad
        self.softcap, self.chunk_size = ctx.softcap, ctx.chunk_size


def planned_chunks(forward, tokens, hidden):
    """See `mold.method.chunked_mlp`."""
    size = chunk_length(tokens, hidden)
    if hidden.shape[1] <= size:
        return forward(hidden)
    mlp = forward.args[0]
    return _PlannedChunks.apply(forward, size, hidden, *(p for p in mlp.parameters() if p.requires_grad))


class _PlannedChunks(torch.autograd.Function):
    """Two chunks of an MLP stand for all, in the forward and where the backward computes each again."""

    @staticmethod
    def forward(ctx, forward, size, hidden, *trained):
        ctx.forward, ctx.size = forward, size
        ctx.save_for_backward(hidden, *trained)

        def run(tokens):
            for chunk in hidden[:, :tokens].split(size, 1):
                forward(chunk)

        _run_chunks(run, hidden.shape[1], size)
        outputs = torch.empty_like(hidden)  # of the chunks, until they are one
        return torch.empty_like(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, *trained = ctx.saved_tensors
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[2] else None

        def run(tokens):
            for chunk, upstream in zip(hidden[:, :tokens].split(ctx.size, 1), grad.split(ctx.size, 1), strict=False):
                found = gradients_of(chunk.detach().requires_grad_(), upstream)
            return found

        @torch.enable_grad()
        def gradients_of(chunk, upstream):
            return torch.autograd.grad(ctx.forward(chunk), [chunk, *trained], upstream)[1:]

        found = _run_chunks(run, hidden.shape[1], ctx.size)
        return None, None, None if gradients is None else torch.empty_like(gradients), *found


def _run_chunks(run: Callable[[int], Any], tokens: int, chunk_size: int):
    """Run one chunk of tokens, then two, and count the operators of all."""
    chunks, tracker = tokens / chunk_size, _tracker()
    if chunks <= 2:
        return run(tokens)
    start = len(tracker.operators)
    run(chunk_size)
    one = tracker.operators[start:]
    del tracker.operators[start:]
    result = run(2 * chunk_size)
    tracker.operators[start:] = repeated(one, tracker.operators[start:], chunks - 1)
    return result


class _PlannedAttention(torch.autograd.Function):
    """What any flash attention makes and keeps, and what the pooled attention and its gradient add to it."""

    @staticmethod
    def forward(ctx, q, k, v, spans):
        ctx.spans = spans
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        _count_attention(q, k, 4)
        return out, None if spans is None else _pooled(q, spans)

    @staticmethod
    def backward(ctx, grad, pooled_grad):
        q, k, v, _, _ = ctx.saved_tensors
        _count_attention(q, k, 10)
        pooled = None
        if pooled_grad is not None:
            _pooled(q, ctx.spans)
            pooled = torch.empty_like(q), torch.empty_like(k)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        if pooled is not None:
            dq, dk = pooled[0] + dq, pooled[1] + dk
        return dq, dk, torch.empty_like(v), None


def _pooled(q, spans):
    """[B, S, M]; beside it, for a moment, what Triton's kernels pool by the pieces that the spans cut the text into."""
    batch, _, length, _ = q.shape
    steps, keys = spans
    rows, columns = min(2 * steps + length // _PIECE_ROWS + 1, length + 1), min(2 * keys, length + 1)
    for pooled_by in ((rows, columns), (steps, columns)):
        torch.empty(batch, *pooled_by)
    return torch.empty(batch, steps, keys)


def attention_flops(q, products):
    """Of causal attention: 2 products of 2 T^2 D in the forward, 5 in the backward, over half of T x T."""
    batch, heads, length, head_dim = q.shape
    return products * batch * heads * length**2 * head_dim / 2


def _count_attention(q, k, products):
    _tracker().add(attention_flops(q, products), q.nbytes + k.nbytes, q.dtype, "attention ")


def _planned_attention(module, query, key, value, attention_mask, spans=None, cu_seqlens=None, **kwargs):
    outs, captured = [], []
    for start, end in itertools.pairwise(cu_seqlens or [0, query.shape[2]]):
        text = (states[:, :, start:end] for states in (query, key, value))
        out, pooled = _PlannedAttention.apply(*text, spans)
        outs.append(out.transpose(1, 2))
        captured.append(pooled)
    if len(outs) == 1:
        return outs[0], captured[0]
    return torch.cat(outs, 1), None if spans is None else torch.cat(captured)


AttentionInterface.register(PLANNED, _planned_attention)
AttentionMaskInterface.register(PLANNED, lambda *args, **kwargs: None)  # as `mold_mask` finds where nothing is padded


def repeated(few: list[Operator], more: list[Operator], times: float) -> list[Operator]:
    """The operators of `few` and so many times those that `more` has beyond them."""
    beyond = (Counter(more) - Counter(few)).elements()
    return few + [(flops * times, moved * times, kind) for flops, moved, kind in beyond]
