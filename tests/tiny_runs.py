"""A tiny training run: examples, student, teacher, trainer."""

import json

from mold import MoldConfig, MoldTrainer
from mold.data.examples import Example
from mold.data.problems import generate_problems
from tests.tiny_models import make_model, plain_attention
from tests.tiny_tokenizers import make_tokenizer

STUDENT_TOKENIZER, TEACHER_TOKENIZER = make_tokenizer("smollm"), make_tokenizer("gpt2")
EXAMPLES = generate_problems(12, seed=4)
BARE = Example("bare", "Who came first?", "The hen came first.", "the hen")


def make_student(family="llama", seed=0, **options):
    options = {"vocab": len(STUDENT_TOKENIZER), "initializer_range": 0.05} | options
    return make_model(family, seed=seed, attention=plain_attention(family), **options)


def make_teacher():
    """Another family, tokenizer, depth and width than the student has."""
    return make_model("gpt2", vocab=len(TEACHER_TOKENIZER), layers=5, heads=6, seed=8)


def online_teacher(teacher=None):
    """What a trainer takes to run the teacher beside the student."""
    return {"teacher_model": teacher or make_teacher(), "teacher_processing_class": TEACHER_TOKENIZER}


def make_trainer(
    folder, signals, student=None, examples=EXAMPLES, eval_examples=EXAMPLES[:5], trainer_options=None, **options
):
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "row_norm": "l1",
        "beta": 2.0,
        "seed": 3,
    } | options
    return MoldTrainer(
        student or make_student(),
        MoldConfig(**options),
        examples,
        eval_examples,
        processing_class=STUDENT_TOKENIZER,
        signals=signals,
        **trainer_options or {},
    )


def weights(trainer):
    named = {**dict(trainer.model.named_parameters()), **dict(trainer.mold_loss.named_parameters())}
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
