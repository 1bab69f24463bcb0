"""LoRA on a chat model, on one GPU: conversations, trained in the model's own chat format.

    python examples/lora_chat.py --dataset chats.jsonl    # Qwen2.5 from the hub: 1.5B teaches 0.5B
    python examples/lora_chat.py --teacher smollm2-135m-instruct --student smollm2-135m-instruct    # no network

Rows hold `messages` (or `prompt` and `completion`), the last of which is a rationale that ends in the answer. Without
--dataset the conversations are made of generated problems. The teacher is done when its signals are extracted, so it
is never in memory together with the student; the adapter, the router and the tokenizer are what is saved.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import set_seed

import mold
from mold.data.chat import choose_template
from mold.data.examples import split_examples
from mold.evaluation.predictions import generate_predictions, score
from mold.files import write_jsonl


def conversations(folder: Path, count: int) -> Path:
    """A file of generated problems as conversations."""
    rows = []
    for problem in mold.generate_problems(count):
        said = f"{problem.rationale}\nAnswer: {problem.answer}"
        turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": said}]
        rows.append({"id": problem.id, "messages": turns})
    path = folder / "chats.jsonl"
    write_jsonl(path, rows)
    return path


def main() -> None:
    """Extract, train the adapter, and ask the held-out questions before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held_out", type=int, default=32)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/lora-chat"))
    chosen = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    examples, report = mold.read_examples(chosen.dataset or conversations(chosen.output_dir, 8 * chosen.held_out))
    print(f"data: {report}")
    train, held_out = split_examples(examples, chosen.held_out, seed=0)

    teacher, tokenizer = mold.load_model(chosen.teacher, dtype=dtype)
    template = choose_template(None, examples, tokenizer)
    settings = mold.SignalSettings.of(teacher, chosen.teacher, template)
    signals = mold.extract_signals(teacher.to(device), tokenizer, examples, chosen.output_dir / "signals", settings)
    del teacher

    set_seed(0)
    student, tokenizer = mold.load_model(chosen.student, dtype=dtype)
    args = mold.MoldConfig(
        str(chosen.output_dir),
        max_steps=chosen.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        logging_steps=max(1, chosen.steps // 20),
        cross_entropy="chunked",
        bf16=gpu,
        use_cpu=not gpu,
        report_to="none",
    )
    trainer = mold.MoldTrainer(
        student,
        args,
        train,
        held_out,
        processing_class=tokenizer,
        signals=signals,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )

    def ask(when: str) -> None:
        found = score(generate_predictions(trainer.model, tokenizer, held_out, trainer.template, max_new_tokens=256))
        shares = "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * found[name] for name in ("accuracy", "low", "high")))
        print(f"accuracy {when} training, on {found['total']} held-out questions, with its 95 % interval: {shares}")

    ask("before")
    trainer.train()
    ask("after")
    trainer.save_model()
    print(f"saved to {chosen.output_dir}")


if __name__ == "__main__":
    main()
