"""No step waits for a GPU: nothing is read back, and nothing is made on the host and copied to it.

There is none here. A step runs on tensors that have shapes and a device and no values (torch's FakeTensorMode):
whatever needs a value, `.item()`, `.tolist()`, `bool(tensor)`, `.nonzero()` or an index of booleans, is an error there.
"""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from mold_kernels._triton import tiles
from mold_kernels.backends import RUNTIMES, Runtime
from tests.tiny_runs import BARE, EXAMPLES, make_trainer, online_teacher

GPU = "meta"
WAITS = DataDependentOutputException, DynamicOutputShapeException


class FromTheHost(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers on the device: the copy waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        name = getattr(function, "__name__", "")
        copies = name in ("tensor", "as_tensor", "new_tensor") or (
            name in ("to", "cuda") and not (kwargs or {}).get("non_blocking") and args[0].device.type == "cpu"
        )
        if copies and made.device.type == GPU:
            raise AssertionError(f"{name}: copies to the device and waits")
        return made


@pytest.fixture
def gpu(monkeypatch):
    """The Triton backends take tensors without values, as if they lay on a GPU."""
    monkeypatch.setitem(RUNTIMES, "triton", Runtime((GPU,), lambda: None, (GPU,)))
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    # torch has no autocast for them.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)


def on_gpu(tensor):
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
    return torch.nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake


def move(module):
    moved = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved.setdefault(id(tensor), on_gpu(tensor))


def step(trainer, monkeypatch):
    """A training step of the first examples, with what comes after the backward."""
    examples = list(trainer.train_dataset)[:3]
    batch = trainer.data_collator(examples)
    monkeypatch.setattr(type(trainer.args), "device", property(lambda self: torch.device(GPU)))
    with FakeTensorMode(), FromTheHost():
        for module in (trainer.model, trainer.mold_loss, *([trainer.teacher.model] if trainer.teacher else [])):
            move(module)
        trainer._reset_window()
        batch = {name: on_gpu(tensor) for name, tensor in batch.items()}
        loss = trainer.training_step(trainer.model, batch, torch.ones(3, dtype=torch.int64, device=GPU))
        trainer._clip_grad_norm(trainer.model)
    return loss


CASES = {
    "padded": {},
    "no attention": {"beta": 0.0},
    "chunked": {"cross_entropy": "chunked"},
    "padding-free": {"padding_free": True},
    "left": {"padding_side": "left"},
    "visible": {"row_norm": "softmax", "row_keys": "visible"},
    "layers left out": {"mol_teacher_layers_left_out": [0, 2], "mol_student_layers_left_out": [1]},
    "single layer": {"method": "single_layer"},
    "two tasks": {"mol_two_tasks": True},
    # To save the random state it is read back, which is transformers' default.
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
}


@pytest.mark.filterwarnings("error:.*no fast backend")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_no_step_waits(gpu, monkeypatch, tmp_path, signals, options):
    trainer = make_trainer(tmp_path, signals, examples=[*EXAMPLES[:2], BARE], **options)
    assert step(trainer, monkeypatch).device.type == GPU


def test_no_step_waits_for_a_teacher_beside_the_student(gpu, monkeypatch, tmp_path):
    trainer = make_trainer(tmp_path, None, trainer_options=online_teacher())
    assert step(trainer, monkeypatch).device.type == GPU


@pytest.mark.parametrize(
    "look",
    [
        lambda loss: loss.item(),
        lambda loss: loss.tolist(),
        lambda loss: bool(torch.isfinite(loss)),
        lambda loss: loss[loss > 0],
        lambda loss: torch.tensor([1, 2], device=loss.device),
    ],
    ids=["item", "tolist", "bool", "boolean index", "from the host"],
)
def test_a_step_that_waits_is_found(gpu, monkeypatch, tmp_path, signals, look):
    trainer = make_trainer(tmp_path, signals)
    weigh = trainer._weigh

    def waiting(*arguments):
        loss = weigh(*arguments)
        look(loss)
        return loss

    monkeypatch.setattr(trainer, "_weigh", waiting)
    with pytest.raises((*WAITS, AssertionError)):
        step(trainer, monkeypatch)
