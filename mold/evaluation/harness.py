"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model in memory. Needs the extra: mold-distill[lm-eval]."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mold.extras import missing_extra


class Tasks:
    """What to ask.

    Args:
        names: of the harness's tasks or groups.
        include_path: a folder of more tasks (YAML files), None has none.
        shots: solved examples before each question; None: as the task says.
        limit: questions of each task; None: all.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a name is unknown.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | os.PathLike | None = None,
        *,
        shots: int | None = None,
        limit: int | None = None,
    ):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise missing_extra("lm_eval_tasks", "lm-eval", "lm-eval") from error
        if include_path is not None and not os.path.isdir(include_path):
            raise ValueError(f"lm_eval_include_path: {include_path} does not exist, must be a folder of tasks")
        self.names, self.shots, self.limit = list(names), shots, limit
        self.manager = TaskManager(include_path=include_path and str(include_path))
        if unknown := set(names).difference(self.manager.all_tasks):
            raise ValueError(
                f"lm_eval_tasks: the harness knows no {', '.join(sorted(unknown))}; `lm-eval ls tasks` lists its tasks"
            )


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, *, batch_size: int = 16
) -> list[dict]:
    """What the harness finds, without its samples.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: what to ask.
        batch_size: questions a batch.

    Returns:
        An entry a task and metric: task, metric (with its filter, such as "exact_match,strict-match"), value and
        stderr (None where the harness has none), shots (None of a group) and total (questions).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        HFLM(model.eval(), tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks.names,
        num_fewshot=tasks.shots,
        limit=tasks.limit,
        task_manager=tasks.manager,
        log_samples=False,
    )
    entries = []
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            entries.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else name,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "shots": found["n-shot"].get(task),
                    "total": found["n-samples"].get(task, {}).get("effective"),
                }
            )
    return entries
