"""One table of backends an op: what each takes, where it runs, what is missing and why, how one is chosen.

An op is a public function. Its table has a line a backend, fastest first; all lines that have a backward pass share one
torch operator, which is named after the op and takes the backend's name last.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from mold_kernels import _triton, cuda, native
from mold_kernels.operators import register_gradient, register_operator

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Runtime:
    """Where a backend runs, whatever the op.

    devices: torch device types; None means every one.
    why_missing: returns None where it can run here, otherwise the reason.
    auto: the devices on which backend="auto" may choose it; None means all of `devices`, empty: only by name.
    """

    devices: tuple[str, ...] | None = None
    why_missing: Callable[[], str | None] = lambda: None
    auto: tuple[str, ...] | None = None


def _why_no_fa4() -> str | None:
    missing = importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None
    return "the package flash-attn-4 is not installed" if missing else None


RUNTIMES = {
    "native": Runtime(("cpu",), native.why_missing),
    "aten": Runtime(("cpu",)),  # torch's own flash attention for the CPU
    "triton": Runtime(_triton.DEVICES, _triton.why_missing, ("cuda",)),
    "cuda": Runtime(("cuda",), cuda.why_missing, ()),  # type: ignore[has-type]  # cached, in a circle of imports
    "flex": Runtime(auto=()),  # torch's FlexAttention
    "fa4": Runtime(("cuda",), _why_no_fa4, ()),  # flash-attn-4
    "torch": Runtime(),
    "reference": Runtime(),
}


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None where it can run here, otherwise with the reason why it cannot."""
    return {name: runtime.why_missing() for name, runtime in RUNTIMES.items()}


@dataclass(frozen=True)
class Backend:
    """One line of an op's table.

    name: of `RUNTIMES`.
    forward, backward: take what the op's operator takes. Without a backward, forward is a plain PyTorch function with
        the op's public arguments, which autograd differentiates.
    dtypes: of the op's tensors.
    options: those of the op's options that it has; None means all.
    head_dim: the largest D, None where there is no limit.
    gradient: device types on which it has a gradient; None means wherever it runs.
    """

    name: str
    forward: Callable
    backward: Callable | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    options: tuple[str, ...] | None = None
    head_dim: int | None = None
    gradient: tuple[str, ...] | None = None

    @classmethod
    def of_triton(cls, module: str, name: str, dtypes=_triton.DTYPES, **limits) -> Backend:
        """The line of NAME_forward and NAME_backward in mold_kernels._triton.MODULE, imported when they are called."""
        forward, backward = (lazily(f"_triton.{module}", f"{name}_{way}") for way in ("forward", "backward"))
        return cls("triton", forward, backward, dtypes, **limits)

    def refusal(self, tensor: torch.Tensor, given: Collection[str], needs_gradient: bool) -> str | None:
        """Why it cannot compute the op of tensors like this one with the given options here; None where it can."""
        runtime, device = RUNTIMES[self.name], tensor.device.type
        if runtime.devices is not None and device not in runtime.devices:
            return f"{self.name} runs on {listed(runtime.devices)}"
        if tensor.dtype not in self.dtypes:
            return f"{self.name} takes {listed(map(dtype_name, self.dtypes))}"
        if self.head_dim is not None and tensor.shape[-1] > self.head_dim:
            return f"{self.name} takes head dimensions up to {self.head_dim}"
        if lacking := sorted(set(given) - set(given if self.options is None else self.options)):
            return f"{self.name} does not have {listed(lacking)}"
        if needs_gradient and self.gradient is not None and device not in self.gradient:
            return f"{self.name} has a gradient on {listed(self.gradient)} only"
        reason = runtime.why_missing()
        return reason and f"{self.name}: {reason}"

    def is_automatic(self, device: torch.device) -> bool:
        """Whether "auto" may choose it on the device."""
        auto = RUNTIMES[self.name].auto
        return auto is None or device.type in auto


class Op:
    """A public function's table of backends and their torch operator `mold_kernels::name`.

    Args:
        name: of the public function.
        inputs: of the operator, as in a torch schema: "Tensor q, float scale". The backend's name follows them.
        outputs: likewise, named: "Tensor out, Tensor lse".
        backends: the table, fastest first.
        fake: makes the outputs, without memory, of the inputs.
        options: names of the public function's options that a backend may lack.
        gradients: names of the inputs that have one; "" where the op is not differentiable.
        kept: names of the inputs and outputs that a backward takes after the outputs' gradients (of which any may be
            None): tensors, then at most one list of tensors, then others.
        fake_backward: makes the gradients of the kept.
        auxiliary: how many of the last outputs are there for the backward only and have no gradient.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        outputs: str,
        backends: Sequence[Backend],
        fake: Callable,
        *,
        options: tuple[str, ...] = (),
        gradients: str = "",
        kept: str = "",
        fake_backward: Callable | None = None,
        auxiliary: int = 0,
    ):
        self.name, self.options, self.fake = name, options, fake
        self.backends = {line.name: line for line in backends}
        self.preferred: str | None = None
        results = ", ".join(declared.split()[0] for declared in outputs.split(", "))
        self.operator = register_operator(
            f"{name}({inputs}, str backend) -> ({results})",
            lambda *arguments: self._run(arguments, fake, lambda line: line.forward),
            fake,
        )
        if gradients:
            declarations = [*inputs.split(", "), *outputs.split(", ")]
            self._make_differentiable(declarations, outputs.count(",") + 1, gradients, kept, fake_backward, auxiliary)

    def choose(
        self, requested: str, tensor: torch.Tensor, options: Mapping[str, object] | None = None, needs_gradient=False
    ) -> Backend:
        """The line that computes the op.

        Args:
            requested: a backend's name, which is used or refused, never replaced; or "auto": the first line that can.
            tensor: device, dtype and last dimension of the op's tensors.
            options: the values of the op's options; one that is None is not given.
            needs_gradient: whether the result will be differentiated.

        Raises:
            ValueError: the backend cannot do that here; says why, and which can.
        """
        given = [name for name, value in (options or {}).items() if value is not None]
        for line in self.backends.values() if self.preferred is None else self._preferred_first():
            asked = requested in (line.name, "auto") and (
                line.name in (requested, self.preferred) or line.is_automatic(tensor.device)
            )
            if asked and line.refusal(tensor, given, needs_gradient) is None:
                if requested == "auto" and line.name == "reference":
                    case = _case(tensor, given)
                    warnings.warn(
                        f"{self.name}: no fast backend here takes {case}; the reference stores T x T scores",
                        stacklevel=3,
                    )
                return line

        refusals = {name: line.refusal(tensor, given, needs_gradient) for name, line in self.backends.items()}
        usable = [name for name, refusal in refusals.items() if refusal is None]
        if any(self.backends[name].is_automatic(tensor.device) for name in usable):
            usable.insert(0, "auto")
        if requested == "auto":
            reason = "; ".join(filter(None, refusals.values()))
        else:
            reason = refusals.get(requested) or f"{self.name} has no backend of that name"
        raise ValueError(
            f"backend: is {requested!r}, must be {listed(map(repr, usable)) or 'nothing'} for {self.name} of "
            f"{_case(tensor, given)}: {reason}"
        )

    def prefer(self, name: str | None) -> None:
        """See `mold_kernels.prefer_backend`."""
        if name is not None:
            if name not in self.backends:
                raise ValueError(f"backend: is {name!r}, must be {listed(map(repr, self.backends))} for {self.name}")
            if reason := RUNTIMES[name].why_missing():
                raise ValueError(f"backend: is {name!r}, must be one that can run here: {reason}")
        self.preferred = name

    def _preferred_first(self) -> list[Backend]:
        return sorted(self.backends.values(), key=lambda line: line.name != self.preferred)

    def __call__(self, *arguments):
        """What the operator gives of these arguments, the last a backend's name; without it where nobody would see it.

        Two dispatches into Python take as long as the kernel of a decoded token does.
        """
        if _unseen(arguments):
            return self._run(arguments, self.fake, lambda line: line.forward)
        return self.operator(*arguments)

    def _run(self, arguments, fake, function):
        """An operator's implementation. What is made of nothing is zeros: no kernel sees an empty tensor."""
        if all(argument.numel() for argument in arguments if isinstance(argument, torch.Tensor)):
            return function(self.backends[arguments[-1]])(*arguments[:-1])
        outputs = fake(*arguments)
        return outputs.zero_() if isinstance(outputs, torch.Tensor) else tuple(output.zero_() for output in outputs)

    def _make_differentiable(self, declarations, outputs, gradients, kept, fake_backward, auxiliary):
        names = [declared.split()[1] for declared in declarations]
        inputs, incoming = len(names) - outputs, names[len(names) - outputs : len(names) - auxiliary]
        places = [names.index(name) for name in kept.split(", ")]
        kinds = [declarations[place].split()[0] for place in places]
        tensors = sum(kind in ("Tensor", "Tensor?") for kind in kinds)
        has_list = "Tensor[]" in kinds
        targets = [names.index(name) for name in gradients.split(", ")]
        arguments = ", ".join(
            [*(f"Tensor? grad_{name}" for name in incoming), *(declarations[place] for place in places)]
        )
        operator = register_operator(
            f"{self.name}_backward({arguments}, str backend) -> ({', '.join(['Tensor'] * len(targets))})",
            lambda *arguments: self._run(arguments, fake_backward, lambda line: line.backward),
            fake_backward,
        )

        def keep(ctx, arguments, output):
            output = output if isinstance(output, tuple) else (output,)
            values = [*arguments[:-1], *output]
            values = [values[place] for place in places]
            ctx.save_for_backward(*values[:tensors], *(values[tensors] if has_list else ()))
            ctx.others, ctx.backend = values[tensors + has_list :], arguments[-1]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[outputs - auxiliary :])

        def differentiate(ctx, *grads):
            grads, result = grads[: outputs - auxiliary], [None] * (inputs + 1)
            if any(grad is not None for grad in grads):
                saved = ctx.saved_tensors
                values = [*saved[:tensors], *([list(saved[tensors:])] if has_list else [])]
                computed = operator(*grads, *values, *ctx.others, ctx.backend)
                computed = computed if len(targets) > 1 else (computed,)
                for target, gradient in zip(targets, computed, strict=True):
                    result[target] = gradient
            return tuple(result)

        register_gradient(self.operator, keep, differentiate)


def _case(tensor, given) -> str:
    return f"{' with '.join(filter(None, (dtype_name(tensor.dtype), ' and '.join(given))))} on {tensor.device.type}"


def _unseen(arguments) -> bool:
    """Whether neither a gradient, a graph, a mode, a transform nor a profiler asks for the operator."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return all(type(x) in _PLAIN for x in tensors)


_PLAIN = torch.Tensor, torch.nn.Parameter


def lazily(module: str, name: str) -> Callable:
    """The function mold_kernels.`module`.`name`, whose module is imported when it is called."""

    def function(*arguments):
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(*arguments)

    return function


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def listed(names) -> str:
    """ "a, b or c"."""
    *others, last = [*names] or [""]
    return f"{', '.join(others)} or {last}" if others else last
