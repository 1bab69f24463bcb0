"""Train on reasoning traces of 8,000 to 16,000 tokens, on a CPU: paragraphs are steps, the question has the key words.

    python examples/reasoning_traces.py                                 # SmolLM2-135M teaches four of its layers
    python examples/reasoning_traces.py --write_only                    # the file of traces alone

A trace solves a sheet of our generated problems inside <think> ... </think>: it reads each again, calculates, slips and
finds it, checks by undoing, tries the number that leads nowhere, and adds up; then it answers in a sentence. The file
is made anew from its seed. What follows is what the command line does:

    mold extract --dataset traces.jsonl --step_unit paragraph --key_scope question --signal_layers mixture ...
    mold train   --dataset traces.jsonl ... --activation_checkpointing true --cross_entropy chunked
"""

import argparse
import operator
import random
import re
from collections.abc import Iterator
from pathlib import Path

import mold
from mold.commands import extract, train
from mold.data.segmentation import find_numbers, split_sentences
from mold.files import write_jsonl

THOUGHTS = "{question}{assistant}<think>\n{rationale}\n</think>\n\nAnswer: {answer}"
UNDO = {"+": ("-", operator.sub), "-": ("+", operator.add), "*": ("/", operator.floordiv), "/": ("*", operator.mul)}


def write_traces(path: Path, count: int, problems: tuple[int, int], seed: int) -> None:
    """`count` conversations, each of a sheet of between `problems` problems; the same for the same seed."""
    rng = random.Random(seed)
    sizes = [rng.randint(*problems) for _ in range(count)]
    every = iter(mold.generate_problems(sum(sizes), seed))
    rows = []
    for number, size in enumerate(sizes):
        sheet = [next(every) for _ in range(size)]
        listed = "\n".join(f"{place}. {problem.question}" for place, problem in enumerate(sheet, 1))
        total = sum(int(problem.answer) for problem in sheet)
        thought = "\n\n".join(paragraphs(sheet, rng))
        said = f"<think>\n{thought}\n</think>\n\nThe {size} results add up to $\\boxed{{{total}}}$."
        asked = f"Solve the {size} problems below. The answer is the sum of their results.\n\n{listed}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"id": f"sheet-{seed}-{number}", "messages": turns})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def paragraphs(sheet: list[mold.Example], rng: random.Random) -> Iterator[str]:
    """What is thought about a sheet of problems."""
    total, so_far = 0, []
    yield f"There are {len(sheet)} problems here. I take them one by one and keep the sum."
    for place, problem in enumerate(sheet, 1):
        yield from one_problem(place, problem, rng)
        total += int(problem.answer)
        so_far.append(problem.answer)
        if place > 1:
            yield f"With problem {place} the sum is {total - int(problem.answer)} + {problem.answer} = {total}."
        if place % 8 == 0:
            yield f"Before I go on, the results until now: {', '.join(so_far)}. Added again they are {total}."
    yield f"All {len(sheet)} are done. Once more in one line: {' + '.join(so_far)} = {total}."
    yield f"The last number of the running sum was {total} too, so I am sure of it."


def one_problem(place: int, problem: mold.Example, rng: random.Random) -> Iterator[str]:
    """Reading, calculating with slips and checks, a dead end, and the whole once more."""
    *facts, task = sentences(problem.question)
    steps = sentences(problem.rationale)
    used = set(numbers(" ".join(steps)))
    stray = next(fact for fact in facts if not used & set(numbers(fact)))
    (distractor,) = numbers(stray)
    yield f"{rng.choice(['Problem', 'Now problem', 'Next is problem'])} {place}. I read: {' '.join(facts)}"
    begun = rng.choice(["So I look for one number.", "Let me see what leads there.", "Step by step."])
    yield f"Asked is: {task} {begun}"
    for step in steps:
        terms, result = equation(step)
        if rng.random() < 0.3:
            wrong = result + rng.choice([1, 2, 10])
            yield f"{terms} = {wrong}? {found_out(terms, wrong, result)}"
        yield f"{step} {rng.choice(['Check', 'Backwards', 'To be sure'])}: {undone(terms, result)}"
    if rng.random() < 0.5:
        added = f"{problem.answer} + {distractor} = {int(problem.answer) + distractor}"
        yield f"Wait. {stray} Does that belong in it, as {added}? No, nothing that is asked depends on it. I go back."
    else:
        yield f"{stray} The {distractor} is asked for nowhere, so I leave it out."
    again = ", then ".join(f"{terms} = {result}" for terms, result in map(equation, steps))
    yield f"The same without words: {again}. {task} The result of problem {place} is {problem.answer}."


def sentences(text: str) -> list[str]:
    return [text[slice(*span)] for span in split_sentences(text)]


def numbers(text: str) -> list[int]:
    return [int(text[slice(*span)]) for span in find_numbers(text)]


def equation(step: str) -> tuple[str, int]:
    """("4 * 9", 36) of "Priya has 4 * 9 = 36 marbles."."""
    terms, result = re.search(r"(\d+(?: [-+*/] \d+)+) = \$?(\d+)", step).groups()
    return terms, int(result)


def undone(terms: str, result: int) -> str:
    """The operations of `terms` taken back from their result, until the first number is there again."""
    first, *others = terms.split()
    lines, value = [], result
    for sign, number in reversed([*zip(others[::2], others[1::2], strict=True)]):
        back, function = UNDO[sign]
        lines.append(f"{value} {back} {number} = {function(value, int(number))}")
        value = function(value, int(number))
    return f"{' and '.join(lines)}, where it began with {first}."


def found_out(terms: str, wrong: int, right: int) -> str:
    """What the last operation of `terms`, taken back, says of a wrong result."""
    *_, sign, number = terms.split()
    back, function = UNDO[sign]
    return f"Taking it back, {wrong} {back} {number} is not {function(right, int(number))}. So it is {right}."


def main() -> None:
    """Write the traces, extract the mixture of the teacher's layers, train a student of some of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5, help="traces; one is held out")
    parser.add_argument("--problems", type=int, nargs=2, default=(19, 36), help="fewest and most of a trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--layers", default="4", help="of the student, evenly spread over the teacher's")
    parser.add_argument("--steps", default="4")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reasoning-traces"))
    parser.add_argument("--write_only", action="store_true")
    chosen = parser.parse_args()
    if chosen.count < 2 or not 1 <= chosen.problems[0] <= chosen.problems[1]:
        parser.error("--count must be at least 2, --problems a number and one that is not smaller")
    data = chosen.output_dir / "traces.jsonl"
    write_traces(data, chosen.count, tuple(chosen.problems), chosen.seed)
    if chosen.write_only:
        return
    both = ["--dataset", str(data), "--template", THOUGHTS, "--max_length", "16384", "--output_dir"]
    both += [str(chosen.output_dir), "--teacher_model_name_or_path", chosen.teacher]
    both += ["--step_unit", "paragraph", "--key_scope", "question"]
    extract.main([*both, "--signal_layers", "mixture", "--signal_dtype", "float16", "--extract_batch_size", "1"])
    student = ["--student_num_layers", chosen.layers, "--max_steps", chosen.steps]
    loss = ["--row_norm", "l1", "--learning_rate", "5e-4"]
    savers = ["--activation_checkpointing", "true", "--cross_entropy", "chunked"]
    batches = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--logging_steps", "1"]
    held_out = ["--num_eval", "1", "--max_new_tokens", "32", "--predict_before", "false"]
    train.main([*both, *student, *loss, *savers, *batches, *held_out, "--report_to", "none"])


if __name__ == "__main__":
    main()
