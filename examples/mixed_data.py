"""A student of a CSV file and of a file of conversations, mixed: each file's columns are found by themselves.

    python examples/mixed_data.py --teacher smollm2-135m-instruct

It writes both files, and does what the command line does with them:

    mold extract --dataset problems.csv chats.jsonl --template "..." --teacher_model_name_or_path ... --output_dir ...
    mold train   --dataset problems.csv chats.jsonl --template "..." --student_num_layers 4 ... --output_dir ...

The template must be given where conversations stand among other rows: one run writes all its texts in one way.
"""

import argparse
import csv
from pathlib import Path

import mold
from mold.commands import extract, train
from mold.data.examples import DEFAULT_TEMPLATE
from mold.files import write_jsonl


def write_data(folder: Path) -> list[str]:
    """24 problems in a CSV file, and 24 as conversations, four of which are in both."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = mold.generate_problems(44)
    with (folder / "problems.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "rationale", "answer"])
        rows.writerows([p.question, p.rationale, p.answer] for p in problems[:24])
    chats = []
    for problem in problems[20:]:
        said = f"{problem.rationale}\nAnswer: {problem.answer}"
        turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": said}]
        chats.append({"messages": turns})
    write_jsonl(folder / "chats.jsonl", chats)
    return [str(folder / "problems.csv"), str(folder / "chats.jsonl")]


def main() -> None:
    """Write the files, extract the teacher's signals of both, train on both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--steps", default="4")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mixed-data"))
    chosen = parser.parse_args()
    data = ["--dataset", *write_data(chosen.output_dir / "data"), "--template", DEFAULT_TEMPLATE]
    common = ["--teacher_model_name_or_path", chosen.teacher, "--output_dir", str(chosen.output_dir)]
    extract.main([*data, *common])
    student = ["--student_num_layers", "4", "--max_steps", chosen.steps, "--num_eval", "8", "--max_new_tokens", "64"]
    train.main([*data, *common, *student, "--report_to", "none"])


if __name__ == "__main__":
    main()
