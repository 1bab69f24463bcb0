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

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PretrainedConfig

from mold.method.chunked_mlp import chunk_mlps, decoder_layers
from mold.method.signal_settings import SIGNAL_LAYERS
from mold.models import config_of_layers
from mold.planned_step import (
    PLANNED,
    Operator,
    PlannedCrossEntropy,
    Tracker,
    as_trained,
    attention_flops,
    make_signals,
    mark_layers,
    observe,
    on_fake_cpu,
    planned_chunks,
    planned_loss,
    planned_model,
    repeated,
)
from mold.training.adapters import without_adapter
from mold.training.config import MoldConfig, check_choices
from mold.training.heads import make_head
from mold_kernels import attention_with_lse

GIB = 2**30
EFFICIENCY = 0.5
"""Share of a GPU's peak rate and bandwidth that training reaches: assumed."""

_RUN = (3, 4)
"""Layers that are run in place of more like them."""
_MIDDLE = 3
"""The phase of the backward between its first layers and its last ones."""
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
        rates[f"attention {name}"] = attention_flops(q, 4 + 10) / forward_and_backward
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
    operators: list[Operator] = dataclasses.field(repr=False)

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
    return dataclasses.replace(few, **values, phases=phases, operators=repeated(few.operators, more.operators, times))


def _extended(few, more, times):
    """Of a value that grows by the same with every further layer."""
    return few + times * (more - few)


@functools.cache
def _like_layers(text: str) -> bool:
    model = planned_model(AutoConfig.for_model(**json.loads(text)), "float32", PLANNED)
    shapes = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in decoder_layers(model)]
    return len(shapes) > _RUN[1] and all(one == shapes[0] for one in shapes)


def _has_like_layers(config: PretrainedConfig) -> bool:
    """Whether the model is more layers than are run anyway, all of the same shapes."""
    if getattr(config, "num_hidden_layers", 0) <= _RUN[1]:
        return False
    return _like_layers(config.to_json_string(use_diff=False))


def _plan(config: PretrainedConfig, setup: Setup) -> Plan:
    """`plan_step` of all layers, operator by operator."""
    tracker = Tracker()
    model = planned_model(config, setup.dtype, PLANNED if setup.attention == "mold" else "eager").train()
    parameters = sum(p.numel() for p in model.parameters())
    model = as_trained(model, setup)
    teacher = None if setup.teacher is None else planned_model(setup.teacher, setup.teacher_dtype, PLANNED)
    if teacher is not None and setup.teacher_chunk_size is not None:
        chunk_mlps(teacher, "teacher_chunk_size", setup.teacher_chunk_size, planned=planned_chunks)
    with FakeTensorMode(), tracker:
        on_fake_cpu(model)
        if teacher is not None:
            on_fake_cpu(teacher)
        trained = [p for p in model.parameters() if p.requires_grad]
        tracker.restart()
        weights = tracker.live
        # liger-kernel's is planned as ours; neither is compared with logits, which have no values here.
        kind = "full" if setup.cross_entropy == "full" else "chunked"
        head: Any = make_head(without_adapter(model), kind, check=False)
        if kind == "chunked":
            head.losses = functools.partial(head.losses, function=PlannedCrossEntropy)
        mark_layers(model, tracker)
        # Gradients of an earlier batch of the window are there when the next one starts.
        for _ in range(min(2, setup.gradient_accumulation_steps)):
            tracker.restart()
            signals = make_signals(teacher, config, setup)
            tracker.next_phase()
            loss = planned_loss(model, head, setup, signals)
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
    tracker = Tracker()
    model = planned_model(config, dtype, PLANNED)
    with FakeTensorMode(), tracker, torch.no_grad():
        on_fake_cpu(model)
        if cache:
            model(input_ids=torch.zeros(batch, length, dtype=torch.int64), use_cache=True, logits_to_keep=1)
        else:
            observe(model, batch, length)
    return max(tracker.peaks)


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
