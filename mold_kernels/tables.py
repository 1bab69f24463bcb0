"""Which backend of which op takes what: the ops' tables as one.

python -m mold_kernels.tables      # prints it, as docs/backends.md has it
"""

from mold_kernels.attention import ATTENTION_LSE, ATTENTION_WITH_LSE
from mold_kernels.backends import RUNTIMES, Backend, Op, dtype_name, listed
from mold_kernels.layer_mixture_kl import LAYER_MIXTURE_KL
from mold_kernels.span_attention import SPAN_ATTENTION
from mold_kernels.value_pool import VALUE_POOL

OPS = ATTENTION_WITH_LSE, ATTENTION_LSE, SPAN_ATTENTION, VALUE_POOL, LAYER_MIXTURE_KL
HEADER = "op", "backend", "runs on", "dtypes", "options", "limits"
_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def prefer_backend(op: str, backend: str | None) -> None:
    """Make backend="auto" of an op take this backend wherever it can, in this process, and the others where it cannot.

    The "mold" attention of models takes "auto": so they run on an engine that is faster on a card than the table's
    first (`python -m benchmarks.gpu` says which).

    Args:
        op: a public function's name, such as "attention_with_lse".
        backend: a name of the table in docs/backends.md; None: the table's order again.

    Raises:
        ValueError: there is no such op or backend, or the backend cannot run here.
    """
    ops = {one.name: one for one in OPS}
    if op not in ops:
        raise ValueError(f"op: is {op!r}, must be {listed(map(repr, ops))}")
    ops[op].prefer(backend)


def backend_rows() -> list[tuple[str, ...]]:
    """A row for every backend of every op, in the order in which backend="auto" tries them; cells as in `HEADER`."""
    return [_row(op, line) for op in OPS for line in op.backends.values()]


def _row(op: Op, line: Backend) -> tuple[str, ...]:
    runtime = RUNTIMES[line.name]
    devices = ", ".join(_DEVICES[device] for device in runtime.auto or runtime.devices or _DEVICES)
    options = op.options if line.options is None else line.options
    limits = [
        "chosen by name only" if runtime.auto == () else "",
        f"D up to {line.head_dim}" if line.head_dim else "",
        f"gradient on {', '.join(_DEVICES[device] for device in line.gradient)} only" if line.gradient else "",
    ]
    dtypes = ", ".join(map(dtype_name, line.dtypes))
    return op.name, line.name, devices, dtypes, ", ".join(options), ", ".join(filter(None, limits))


def markdown() -> str:
    """The table in Markdown."""
    rows = [(f"`{op}`", f"`{name}`", *others) for op, name, *others in backend_rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
