"""Peak memory and time of a training step, predicted from a model's configuration: no weights, no data, no GPU.

**Memory.** At any moment of a step a device holds

    base + weights + optimizer state + live(t)

base is what the process takes before it has a model. The optimizer's state is there from the second step on. live(t)
are gradients and everything that autograd and the running operator hold at moment t. For a decoder of L layers, hidden
size H, vocabulary V, with N = B T tokens and an element of e bytes, it has three summits, and the peak is the highest:

    end of the forward    L N (c H + 2 F) e + V N (e + 4)         what c operators of width H and an MLP of width F
                                                                  keep, logits and their float32 softmax
    end of the backward   gradients + one layer's N (c H + 2 F) e
    the optimizer's step  gradients

Activation checkpointing turns L N (c H + 2 F) e into L N H e + one layer's; chunked cross-entropy removes V N; an
adapter removes most of the gradients and of the optimizer's state; attention maps, if they are made, add L Hq B T^2
three times. Pooled attention to M key words of S steps adds 4 L B S M at the end of the forward, as much again of the
teacher's layers (of one layer, where its mixture is stored), and 4 L B S M of gradients when the backward begins: texts
whose steps and key words grow with T have S M grow with T^2. What c is depends on the family, the dtype, autocast and
the version of transformers. So it is not written down here: the step is run on fake tensors, which have shapes and no
values (torch's FakeTensorMode), with the model's own code, and every storage is counted from the operator that makes
it until it dies. live(t) is exact but for what happens inside a single operator. It holds for every family and every
saver alike.

What repeats is not run again and again. Of L layers of the same shapes three and four are run: everything is linear in
L, the highest moments of the forward, of the backward's first layer and of its last one each for itself (between those
it goes on as from one to the other). Of the chunks of a cross-entropy two are run.

**Time.** Operator by operator the roofline max(FLOPs / rate, bytes / bandwidth), with matrix products and attention
counted by torch's FLOP counter and causal attention at half of T^2, and the bytes of clipping and of the optimizer's
update. Rates and bandwidth are measured on this machine; for a named GPU they are its peaks times an assumed efficiency
(`EFFICIENCY`).

On the CPU the prediction is of live memory. The C library keeps freed blocks between those in use: a process may hold a
third more, half more with activation checkpointing, unless it is started with MALLOC_MMAP_THRESHOLD_=131072 and
keep_freed_memory is off.

Weights in 4 bits are counted as bitsandbytes has them: packed, with a scale of every 64, and made whole where they are
used. Dropout before an adapter keeps a mask of floats, as on CPUs; on a GPU it takes less.

Not covered: several processes (DDP keeps another copy of the gradients), a teacher's other tokenizer,
layers that are left out of a mixture.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from mold.method.chunked_mlp import chunk_length, chunk_mlps, decoder_layers
from mold.method.layer_mixture import loss_of_mixture
from mold.method.signal_settings import SIGNAL_LAYERS
from mold.models import config_of_layers
from mold.training.adapters import add_adapter, without_adapter
from mold.training.chunked_cross_entropy import ChunkedCrossEntropy
from mold.training.config import MoldConfig, check_choices
from mold.training.heads import ChunkedHead, FullHead, make_head
from mold_kernels import attention_with_lse

GIB = 2**30
EFFICIENCY = 0.5
"""Share of a GPU's peak rate and bandwidth that training reaches: assumed."""

_PLANNED = "mold_planned"
_PIECE_ROWS = 64
"""Most rows that a kernel takes at once."""
_RUN = (3, 4)
"""Layers that are run in place of more like them."""
_MIDDLE = 3
"""The phase of the backward between its first layers and its last ones."""
_Operator = tuple[float, float, str]
_TRAINING = MoldConfig.__dataclass_fields__
TOKENS_A_STEP = {"sentence": 40, "line": 40, "paragraph": 160}
TOKENS_A_KEY_WORD, TOKENS_OF_A_QUESTION = 16, 256
"""Of a text whose steps and key words are not known: assumed."""
_STATE_BYTES = {"adamw_torch": 2.0, "adamw_torch_fused": 2.0, "lion_32bit": 1.0, "sgd": 0.0}
"""Optimizer state, in parameters of the same dtype."""
_STATE_BYTES_8BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_torch_8bit": 2, "lion_8bit": 1}
"""Optimizer state, in bytes a parameter."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a step runs.

    flops: FLOP/s reached in matrix products ("float32", "bfloat16") and in attention ("attention float32", ...);
    bandwidth: bytes/s reached; memory: bytes; base: bytes taken before there is a model.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    base: float


def _gpu(name: str, tf32: float, bf16: float, bandwidth: float, memory: float) -> Machine:
    """From the vendor's dense TFLOP/s, TB/s and GB; the base is a context with its libraries."""
    rates = {"float32": tf32 * 1e12 * EFFICIENCY, "bfloat16": bf16 * 1e12 * EFFICIENCY}
    rates |= {f"attention {dtype}": rate for dtype, rate in rates.items()}
    return Machine(name, rates, bandwidth * 1e12 * EFFICIENCY, memory * 1e9, 0.8 * GIB)


# float32 at the rate of TF32, which has to be switched on.
GPUS = {
    "a100-80gb": _gpu("NVIDIA A100 80 GB", 156, 312, 2.04, 80),
    "h100-80gb": _gpu("NVIDIA H100 SXM", 494, 989, 3.35, 80),
    "h200": _gpu("NVIDIA H200", 494, 989, 4.8, 141),
    "b200": _gpu("NVIDIA B200", 1100, 2250, 8.0, 180),
    "l40s": _gpu("NVIDIA L40S", 183, 362, 0.86, 48),
    "l4": _gpu("NVIDIA L4", 60, 121, 0.3, 24),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 83, 165, 1.01, 24),
    "rtx-3090": _gpu("NVIDIA GeForce RTX 3090", 36, 71, 0.94, 24),
}


def this_machine() -> Machine:
    """This machine's CPU: rates and bandwidth measured now (about a second), memory as the system reports it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, base = (int(text.split()[0]) * 1024 for text in (memory["MemTotal"], status["VmRSS"]))
    rates = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.ones(1024, 1024, dtype=getattr(torch, name)) for _ in range(2))
        rates[name] = 2 * 1024**3 / _seconds(lambda a=a, b=b: a @ b)
        q, k = (torch.ones(1, 1024, heads, 64, dtype=a.dtype).transpose(1, 2).requires_grad_() for heads in (8, 4))
        forward_and_backward = _seconds(lambda q=q, k=k: attention_with_lse(q, k, k)[0].sum().backward())
        rates[f"attention {name}"] = _attention_flops(q, 4 + 10) / forward_and_backward
    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    return Machine("this machine", rates, bandwidth, total, base)


def _seconds(call: Callable) -> float:
    """The median of a few runs, in seconds."""
    call()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides a step's memory and time beside the model; the names are those of `MoldConfig` where it has them.

    length: tokens of a sequence.
    dtype: of the weights, "float32" or "bfloat16".
    bf16: autocast of float32 weights.
    offload: whether what checkpointing keeps of each layer lies in the host's memory.
    cross_entropy: "full", or "chunked"; "liger" is planned as that.
    mlp_chunk_size: tokens that an MLP takes at a time; None: all.
    optim: the optimizer's name as transformers has it.
    attention: "mold", or "eager": T x T maps of every layer, as output_attentions=True makes them elsewhere.
    tasks: texts that an example is trained as, see `MoldConfig.tasks`.
    trains_attention: whether there is an attention loss.
    step_unit, max_reasoning_steps, max_key_words, key_scope: of the texts, see `SegmentOptions`.
    num_steps, num_key_words: that a text has; None: as many as such a text mostly has (`TOKENS_A_STEP`, ...).
    signal_layers: of the teacher that stand in a batch: "all", or their "mixture".
    teacher_layers: how many it has; None: as many as the student.
    padding_free: the texts of a batch, all of this length, stand in one row.
    peft_config: of an adapter (peft's LoraConfig or its like); None: every weight is trained.
    load_in_4bit: linear layers but the output in 4 bits.
    teacher, teacher_dtype: the configuration and dtype of a teacher that runs beside the student; None: none does.
    teacher_chunk_size: tokens that it, or an MLP of it, takes at a time; None: all.
    learned: share of the tokens that have a cross-entropy.
    """

    length: int
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    dtype: str = dataclasses.field(default="float32", metadata={"choices": ["float32", "bfloat16"]})
    bf16: bool = False
    activation_checkpointing: bool = False
    offload: bool = False
    cross_entropy: str = dataclasses.field(default="full", metadata=_TRAINING["cross_entropy"].metadata)
    mlp_chunk_size: int | None = None
    optim: str = "adamw_torch_fused"
    attention: str = dataclasses.field(default="mold", metadata={"choices": ["mold", "eager"]})
    tasks: int = 1
    trains_attention: bool = True
    padding_free: bool = False
    peft_config: object = None
    load_in_4bit: bool = False
    teacher: PretrainedConfig | None = None
    teacher_dtype: str = dataclasses.field(default="float32", metadata={"choices": ["float32", "bfloat16"]})
    teacher_chunk_size: int | None = None
    learned: float = 1.0
    step_unit: str = dataclasses.field(default="sentence", metadata=_TRAINING["step_unit"].metadata)
    max_reasoning_steps: int | None = None
    max_key_words: int | None = None
    key_scope: str = dataclasses.field(default="all", metadata=_TRAINING["key_scope"].metadata)
    num_steps: int | None = None
    num_key_words: int | None = None
    signal_layers: str = dataclasses.field(default="all", metadata={"choices": SIGNAL_LAYERS})
    teacher_layers: int | None = None

    def __post_init__(self):
        if self.offload and not self.activation_checkpointing:
            raise ValueError("offload: is True, must be False without activation_checkpointing, whose states it moves")
        if self.length < 2:
            raise ValueError(f"length: is {self.length}, must be at least 2")
        if self.optim not in _STATE_BYTES | _STATE_BYTES_8BIT:
            known = ", ".join(_STATE_BYTES | _STATE_BYTES_8BIT)
            raise ValueError(f"optim: is {self.optim!r}, must be one whose memory is known: {known}")
        check_choices(self)

    @property
    def texts(self) -> int:
        """Of a batch."""
        return self.per_device_train_batch_size * self.tasks

    @property
    def spans(self) -> tuple[int, int]:
        """Steps and key words of a text."""
        scope = self.length if self.key_scope == "all" else min(self.length, TOKENS_OF_A_QUESTION)
        steps = self.num_steps or -(-self.length // TOKENS_A_STEP[self.step_unit])
        keys = self.num_key_words or -(-scope // TOKENS_A_KEY_WORD)
        return min(steps, self.max_reasoning_steps or steps), min(keys, self.max_key_words or keys)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step's predicted memory (bytes) and cost.

    parameters, trainable: how many; activations: what the forward keeps for the backward, logits included;
    phases: the highest sums of gradients, activations and buffers while a teacher's forward, the student's, the head
    and last layer of the backward, its layers between and its first layer run; operators: of a batch (FLOPs, bytes
    moved, kind: a key of Machine.flops).
    """

    setup: Setup
    parameters: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    phases: list[float]
    operators: list[_Operator] = dataclasses.field(repr=False)

    @property
    def step(self) -> float:
        """The highest sum of gradients, activations and buffers of a moment."""
        return max(self.phases)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _, _ in self.operators)

    def peak(self, machine: Machine) -> float:
        """Bytes at the peak, with the process's base."""
        return machine.base + self.weights + self.optimizer + max(self.step, self.gradients)

    def seconds(self, machine: Machine) -> float:
        """Of one optimizer step of all its accumulated batches."""
        batch = sum(max(f / machine.flops[kind], b / machine.bandwidth) for f, b, kind in self.operators)
        # Clipping reads gradients twice and writes them; the update reads them, reads and writes weights and state.
        update = (6 * self.gradients + 2 * self.optimizer) / machine.bandwidth
        return batch * self.setup.gradient_accumulation_steps + update


def plan_step(config: PretrainedConfig, setup: Setup) -> Plan:
    """Predict a training step from a model's configuration.

    Args:
        config: of a causal language model.
        setup: the options.

    Raises:
        ValueError: the configuration has no causal language model, or an option that does not go with it.
        ImportError: peft_config is given without peft.

    Source: the derivation at the top of this module.
    """
    if not _has_like_layers(config):
        return _plan(config, setup)
    few, more = (_plan(config_of_layers(config, range(layers)), setup) for layers in _RUN)
    times = config.num_hidden_layers - _RUN[0]
    linear = ("parameters", "trainable", "weights", "gradients", "optimizer", "activations")
    values: dict[str, Any] = {name: _extended(getattr(few, name), getattr(more, name), times) for name in linear}
    phases = [_extended(one, other, times) for one, other in zip(few.phases, more.phases, strict=True)]
    del phases[_MIDDLE]
    return dataclasses.replace(few, **values, phases=phases, operators=_repeated(few.operators, more.operators, times))


def _extended(few, more, times):
    """Of a value that grows by the same with every further layer."""
    return few + times * (more - few)


def _repeated(few: list[_Operator], more: list[_Operator], times: float) -> list[_Operator]:
    """The operators of `few` and so many times those that `more` has beyond them."""
    beyond = (Counter(more) - Counter(few)).elements()
    return few + [(flops * times, moved * times, kind) for flops, moved, kind in beyond]


@functools.cache
def _like_layers(text: str) -> bool:
    model = _model(AutoConfig.for_model(**json.loads(text)), "float32", _PLANNED)
    shapes = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in decoder_layers(model)]
    return len(shapes) > _RUN[1] and all(one == shapes[0] for one in shapes)


def _has_like_layers(config: PretrainedConfig) -> bool:
    """Whether the model is more layers than are run anyway, all of the same shapes."""
    if getattr(config, "num_hidden_layers", 0) <= _RUN[1]:
        return False
    return _like_layers(config.to_json_string(use_diff=False))


def _plan(config: PretrainedConfig, setup: Setup) -> Plan:
    """`plan_step` of all layers, operator by operator."""
    tracker = _Tracker()
    model = _model(config, setup.dtype, _PLANNED if setup.attention == "mold" else "eager").train()
    parameters = sum(p.numel() for p in model.parameters())
    model = _as_trained(model, setup)
    teacher = None if setup.teacher is None else _model(setup.teacher, setup.teacher_dtype, _PLANNED)
    if teacher is not None and setup.teacher_chunk_size is not None:
        chunk_mlps(teacher, "teacher_chunk_size", setup.teacher_chunk_size, planned=_planned_chunks)
    with FakeTensorMode(), tracker:
        _on_fake_cpu(model)
        if teacher is not None:
            _on_fake_cpu(teacher)
        trained = [p for p in model.parameters() if p.requires_grad]
        tracker.restart()
        weights = tracker.live
        # liger-kernel's is planned as ours; neither is compared with logits, which have no values here.
        kind = "full" if setup.cross_entropy == "full" else "chunked"
        head: Any = make_head(without_adapter(model), kind, check=False)
        if kind == "chunked":
            head.losses = functools.partial(head.losses, function=_PlannedCrossEntropy)
        _mark_layers(model, tracker)
        # Gradients of an earlier batch of the window are there when the next one starts.
        for _ in range(min(2, setup.gradient_accumulation_steps)):
            tracker.restart()
            signals = _signals(teacher, config, setup)
            tracker.next_phase()
            loss = _loss(model, head, setup, signals)
            activations = tracker.live - weights
            tracker.next_phase()
            loss.backward()
            del loss, signals
    optimizer = sum(
        p.numel() * _STATE_BYTES_8BIT[setup.optim]
        if setup.optim in _STATE_BYTES_8BIT
        else p.nbytes * _STATE_BYTES[setup.optim]
        for p in trained
    )
    return Plan(
        setup=setup,
        parameters=parameters,
        trainable=sum(p.numel() for p in trained),
        weights=weights,
        gradients=sum(p.nbytes for p in trained),
        optimizer=optimizer,
        activations=activations,
        phases=[peak - weights for peak in tracker.peaks],
        operators=tracker.operators,
    )


def inference_peak(config: PretrainedConfig, dtype: str, batch: int, length: int, *, cache: bool) -> float:
    """Bytes of weights and the most that a forward without gradients over [batch, length] tokens holds beside them.

    Args:
        config: of a causal language model.
        dtype: of the weights, "float32" or "bfloat16".
        batch, length: tokens.
        cache: whether keys and values are kept, as in generation; without, the output layer is left out, as in an
            extraction of signals.
    """
    if _has_like_layers(config):
        few, more = (
            inference_peak(config_of_layers(config, range(n)), dtype, batch, length, cache=cache) for n in _RUN
        )
        return _extended(few, more, config.num_hidden_layers - _RUN[0])
    tracker = _Tracker()
    model = _model(config, dtype, _PLANNED)
    with FakeTensorMode(), tracker, torch.no_grad():
        _on_fake_cpu(model)
        if cache:
            model(input_ids=torch.zeros(batch, length, dtype=torch.int64), use_cache=True, logits_to_keep=1)
        else:
            _observe(model, batch, length)
    return max(tracker.peaks)


def _model(config, dtype, attention):
    """The model on the meta device: shapes alone."""
    config = copy.deepcopy(config)
    for name in ("attention_dropout", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device("meta"):
        dtype = getattr(torch, dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def _as_trained(model, setup):
    """The student as training makes it from the model: in 4 bits, with its adapter and checkpointing."""
    with torch.device("meta"):
        if setup.load_in_4bit:
            _quantize(model, torch.bfloat16 if setup.bf16 else getattr(torch, setup.dtype))
        if setup.peft_config is not None:
            model = add_adapter(model, copy.deepcopy(setup.peft_config))  # peft writes into it
    if setup.mlp_chunk_size is not None:
        chunk_mlps(without_adapter(model), "mlp_chunk_size", setup.mlp_chunk_size, planned=_planned_chunks)
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


def _on_fake_cpu(model):
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
def _observe(model, batch, length, spans=None):
    """A forward of a teacher, whose signals are its layers' attention alone, [L, B, S, M]."""
    options = {} if spans is None else {"spans": spans, "output_attentions": True}
    ids, mask = (torch.zeros(batch, length, dtype=torch.int64) for _ in range(2))
    out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return None if spans is None else torch.stack(out.attentions)


def _signals(teacher, config, setup):
    """The teacher's attention in a batch, [L1, B, S, M]: what its forward makes, or what was cached."""
    if not setup.trains_attention or setup.attention == "eager":
        return None
    if teacher is not None:
        texts = setup.texts
        some = texts if setup.teacher_chunk_size is None else max(1, setup.teacher_chunk_size // setup.length)
        parts = [min(some, texts - start) for start in range(0, texts, some)]
        return torch.cat([_observe(teacher, part, setup.length, setup.spans) for part in parts], 1)
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


def _loss(model, head, setup, signals):
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


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all live storages, and each operator's FLOPs and bytes moved."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peaks = [0]
        """Of the phases so far."""
        self.operators: list[_Operator] = []
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


def _tracker() -> _Tracker:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next(mode for mode in stack if isinstance(mode, _Tracker))


def _mark_layers(model: PreTrainedModel, tracker: _Tracker) -> None:
    """The backward's phases end where the last layer but one and the second one have their gradients."""
    layers = decoder_layers(without_adapter(model))
    for place in (-2, 1) if len(layers) > 2 else ():
        trained = next((p for p in layers[place].parameters() if p.requires_grad), None)
        if trained is not None:
            trained.register_post_accumulate_grad_hook(lambda _: tracker.next_phase())


class _PlannedCrossEntropy(ChunkedCrossEntropy):
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


def _planned_chunks(forward, tokens, hidden):
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
    tracker.operators[start:] = _repeated(one, tracker.operators[start:], chunks - 1)
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


def _attention_flops(q, products):
    """Of causal attention: 2 products of 2 T^2 D in the forward, 5 in the backward, over half of T x T."""
    batch, heads, length, head_dim = q.shape
    return products * batch * heads * length**2 * head_dim / 2


def _count_attention(q, k, products):
    _tracker().add(_attention_flops(q, products), q.nbytes + k.nbytes, q.dtype, "attention ")


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


AttentionInterface.register(_PLANNED, _planned_attention)
AttentionMaskInterface.register(_PLANNED, lambda *args, **kwargs: None)  # as `mold_mask` finds where nothing is padded


SAVERS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"activation_checkpointing": True},
    "its states in the host's memory": {"activation_checkpointing": True, "offload": True},
    "chunked cross-entropy": {"cross_entropy": "chunked"},
    "MLPs in chunks": {"mlp_chunk_size": 4096},
    "bfloat16 autocast": {"bf16": True},
    "bfloat16 weights": {"dtype": "bfloat16", "bf16": False},
    "8-bit optimizer": {"optim": "adamw_bnb_8bit"},
    "the teacher's mixture alone": {"signal_layers": "mixture"},
    "paragraphs as steps": {"step_unit": "paragraph"},
    "key words of the question": {"key_scope": "question"},
}
"""What saves memory, as changes of a Setup; an adapter is another. The last two change what is learned."""


def largest_length(config: PretrainedConfig, setup: Setup, machine: Machine, memory: float) -> int:
    """The most tokens a sequence may have for the step to fit, to about 2 % (0 where not even two do).

    Peak memory is a maximum of sums of powers of T, so that it grows at a steady or rising rate: a few secants find it.

    Args:
        config, setup: as of `plan_step`; setup.length is where the search starts.
        machine: has the base.
        memory: bytes there are.
    """

    def excess(length: int) -> float:
        return plan_step(config, dataclasses.replace(setup, length=length)).peak(machine) - 0.99 * memory

    first, second = setup.length, 2 * setup.length
    first_excess, second_excess = excess(first), excess(second)
    for _ in range(8):
        rise = (second_excess - first_excess) / (second - first)
        # Where short sequences change nothing, gradients and optimizer alone are the peak.
        length = int(second - second_excess / rise) if rise > 0 else 8 * second
        if length < 2:
            return 0
        first, first_excess = second, second_excess
        second, second_excess = length, excess(length)
        if abs(second_excess) < 0.01 * memory or first == second:
            break
    return second if second_excess <= 0.01 * memory else 0
