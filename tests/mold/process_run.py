"""What test_processes starts, in one process and in two: extraction, then trainings whose batches are the same."""

import copy
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

from mold.data.examples import DEFAULT_TEMPLATE
from mold.method.extraction import extract_signals
from mold.method.signal_settings import SignalSettings
from tests.tiny_runs import BARE, EXAMPLES, TEACHER_TOKENIZER, make_student, make_teacher, make_trainer, weights

RUNS = {
    "plain": {},
    "uneven": {"examples": [BARE, *EXAMPLES[:3]], "per_device_train_batch_size": 1, "max_grad_norm": 0.1},
    "savers": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "padding_free": True,
        "cross_entropy": "chunked",
    },
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
}
"""Options of each training; a process of two has half of `per_device_train_batch_size`, 2 where it is not given."""


def main(folder):
    state = PartialState(cpu=True)
    teacher = make_teacher().double()
    signals = extract_signals(
        teacher,
        TEACHER_TOKENIZER,
        [*EXAMPLES, BARE],
        folder / "signals",
        SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, "sum"),
        batch_size=2,
        shard_size=3,
        progress=False,
    )
    for name, options in RUNS.items():
        options = {"per_device_train_batch_size": 2} | options
        options["per_device_train_batch_size"] *= 2 // state.num_processes
        torch.manual_seed(5)
        trainer = make_trainer(
            folder / name,
            signals,
            make_student(layers=2, dtype=torch.float64),
            options.pop("examples", EXAMPLES),
            [*EXAMPLES[:4], BARE],
            trainer_options={"peft_config": copy.deepcopy(options.pop("peft_config", None))},
            use_cpu=True,
            optim="sgd",
            learning_rate=1e-2,
            max_steps=3,
            save_strategy="steps",
            save_steps=2,
            **options,
        )
        trainer.mold_loss.double()
        with torch.no_grad():
            torch.nn.init.normal_(trainer.mold_loss.router.projection.weight, std=2.0)
        trainer.train()
        evaluated = trainer.evaluate()
        save_file(weights(trainer), folder / name / f"weights-{state.process_index}.safetensors")
        if state.is_main_process:
            (folder / name / "evaluated.json").write_text(json.dumps(evaluated))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
