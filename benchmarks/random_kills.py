"""Does what is killed at random moments, and started again until it ends, leave what an undisturbed run leaves?

    python -m benchmarks.random_kills                         # 20 kills of each kind
    python -m benchmarks.random_kills --kinds extract --kills 5

Each start of a command is killed (SIGKILL) at a moment drawn uniformly from the time that an undisturbed run takes, its
imports included, unless it ends before. Once it has ended every file it left is compared with the undisturbed one's,
byte by byte but for times: seconds in JSON, and the pages that show them. Then a new folder is begun, until there were
so many kills. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from mold.commands.run import DONE
from mold.data.problems import generate_problems
from mold.files import LOCK
from mold.report.page import merged_metrics
from tests.mold.command_line import flags
from tests.tiny_models import make_model
from tests.tiny_tokenizers import make_tokenizer

_TAUGHT = {"dataset": "../problems.jsonl", "teacher_model_name_or_path": "../teacher"}
_EXTRACT = _TAUGHT | {"extract_shard_size": 2, "extract_batch_size": 2, "output_dir": "out", "disable_tqdm": True}
_TRAIN = _TAUGHT | {
    "signals_dir": "../taught/out/signals",
    "model_name_or_path": "../student",
    "num_eval": 4,
    "max_new_tokens": 4,
    "logging_steps": 3,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "output_dir": "out",
}
# The last batch of an epoch is a small one, and a window of two does not divide the batches.
_EPOCHS = {"gradient_accumulation_steps": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
KINDS = {
    "max_steps": ["train", *flags(_TRAIN | {"max_steps": 60, "save_steps": 3})],
    "epochs": ["train", *flags(_TRAIN | _EPOCHS | {"num_train_epochs": 16, "load_best_model_at_end": True})],
    "extract": ["extract", *flags(_EXTRACT)],
    "run": ["run", "../recipe.yaml"],
}
"""A name, and the command as it is given in a folder beside the models."""
RECIPE = {
    "output_dir": "out",
    "data": {"own": {"dataset": "../problems.jsonl", "train": 30, "test": 4}},
    "options": {key: value for key, value in _TRAIN.items() if key not in ("dataset", "output_dir", "signals_dir")},
    "train": {"max_steps": 30, "save_steps": 3},
    "variants": {"rationales": {"method": "rationales"}, "mixture": {}},
    "seeds": [0],
}


def prepare(folder: Path) -> None:
    """A teacher, a student, data and a recipe."""
    tokenizer = make_tokenizer("smollm")
    # With dropout the random generator's state decides what is learned.
    student = {"layers": 3, "resid_pdrop": 0.1}
    for name, family, options in (("teacher", "qwen3", {"layers": 5}), ("student", "gpt2", student)):
        model = make_model(family, vocab=len(tokenizer), initializer_range=0.05, attention="eager", **options)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [json.dumps(vars(example)) + "\n" for example in generate_problems(39, seed=6)]
    (folder / "problems.jsonl").write_text("".join(rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


def ends(kind: str, folder: Path, kill_after: float | None = None) -> bool:
    """Whether the command ended by itself, well; it is killed after so many seconds."""
    folder.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[1])
    with open(folder / "log", "w") as log:
        try:
            # Not a pipe: what outlives the killed process would hold it open.
            done = subprocess.run(
                [sys.executable, "-m", "mold.commands.cli", *map(str, KINDS[kind])],
                cwd=folder,
                stdout=log,
                stderr=log,
                check=False,
                timeout=kill_after,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode:
        raise SystemExit(f"{kind} in {folder} failed:\n{(folder / 'log').read_text()[-4000:]}")
    return True


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not key.startswith("seconds")}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def content(path: Path):
    """What must be the same of a file, whenever and however often it was written."""
    if path.name == "metrics.jsonl":
        return _timeless(merged_metrics(path, []))
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_bytes()))
    return path.read_bytes()


def different(one: Path, other: Path) -> list[str]:
    """The files that differ, or are in one folder alone."""
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    timed = (LOCK, DONE, "report.html")
    return sorted(
        name
        for name in files[0] | files[1]
        if not name.endswith(timed)
        and not (name in files[0] & files[1] and content(one / name) == content(other / name))
    )


def newest(folder: Path) -> str:
    """What was written last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return str(max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(folder)) if files else "nothing"


def kill(kind: str, folder: Path, kills: int, rng: random.Random) -> int:
    """Kill a kind so often; prints every kill and every end, and returns how many ends were not the undisturbed one."""
    start = time.perf_counter()
    ends(kind, folder / f"{kind}-undisturbed")
    seconds = time.perf_counter() - start
    killed, wrong, ended, finished = 0, 0, 0, False
    print(f"{kind}: {seconds:.1f} s undisturbed", flush=True)
    while killed < kills or not finished:
        place = folder / f"{kind}-killed-{ended}"
        begun = place.exists()
        moment, start = rng.uniform(0, seconds) if killed < kills else None, time.perf_counter()
        if finished := ends(kind, place, moment):
            if not begun:  # how loaded the machine is changes
                seconds = time.perf_counter() - start
            differs = different(folder / f"{kind}-undisturbed" / "out", place / "out")
            ended, wrong = ended + 1, wrong + bool(differs)
            print(f"{kind}: ended, {', '.join(differs) + ' differ' if differs else 'equal'}", flush=True)
        else:
            killed += 1
            print(f"{kind}: killed after {moment:4.1f} s, last written: {newest(place / 'out')}", flush=True)
    print(f"{kind}: {killed} kills, {killed + ended} starts, {ended} ended, {wrong} of them different", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the runs, to look at what differs; a temporary one if not given")
    chosen = parser.parse_args()
    rng = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(chosen.folder or made)
        prepare(folder)
        if {"max_steps", "epochs"} & set(chosen.kinds):
            ends("extract", folder / "taught")
        return int(any([kill(kind, folder, chosen.kills, rng) for kind in chosen.kinds]))


if __name__ == "__main__":
    sys.exit(main())
