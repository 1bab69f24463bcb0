import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mold.data import formulas
from mold.data.answers import judge_answer

HOSTILE = [
    "10^1000000000",
    r"\binom{1000000000}{500000000}",
    "9999999!",
    "9^{9^{9}}",
    "2**2**2**2**9",
    "((((9^9)^9)^9)^9)^9",
    r"\sum_{n=1}^{10^9} \sqrt{n}",
    "(x+1)^{1000}",
    "(x+y+z)^{30}(a+b+c)^{30}",
    "(((3!)!)!)!",
    "1" * 100_000,
    "(" * 5000 + ")" * 5000,
    r"\sqrt{" * 200 + "2" + "}" * 200,
]


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("2**10", "1024", True),
        ("(7, 6)", "(7,6)", True),
        ("(6,7)", "(7,6)", False),
        ("√2", r"\sqrt{2}", True),
        ("2^{2^{3}}", "256", True),
        ("3+2x", "2x+3", True),
    ],
)
def test_formulas_are_compared(found, expected, same):
    assert formulas.same_formula(found, expected) is same


def test_hostile_formulas_end():
    begun = time.process_time()
    for number in range(1000 // len(HOSTILE)):
        for formula in HOSTILE:
            assert judge_answer(formula, str(number)) is not True
    assert time.process_time() - begun < 60


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for another process's limits")
def test_what_gets_past_the_check_ends_and_the_judges_memory_is_bounded():
    formulas_past = [HOSTILE[0], HOSTILE[1], HOSTILE[3], HOSTILE[8], "10^{10^{11}}"]
    code = (
        "import resource; from mold.data import formulas; formulas.is_small = lambda formula: True\n"
        f"for formula in {formulas_past!r}: assert formulas.same_formula(formula, '5') is not True\n"
        "assert formulas.same_formula('4^{2}', '16')\n"
        "limit = resource.prlimit(formulas._JUDGE._process.pid, resource.RLIMIT_AS)[0]; formulas._JUDGE.end()\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, limit, formulas.MEMORY_BYTES)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    most, limit, told = map(int, done.stdout.split())
    assert 0 < most <= limit == told


def test_a_formula_that_takes_too_long_is_not_judged_and_the_next_one_is(monkeypatch):
    monkeypatch.setattr(formulas, "is_small", lambda formula: True)
    formulas.same_formula.cache_clear()
    assert formulas.same_formula("(x+y+z)^{30}(a+b+c)^{31}", "5") is None
    assert formulas.same_formula("2^{4}", "16")


def test_threads_and_forks_ask_at_the_same_time():
    verdicts = []
    threads = [
        threading.Thread(
            target=lambda n=n: verdicts.append(formulas.same_formula(f"{n}^{{2}}", str(n * n))), daemon=True
        )
        for n in range(20, 32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_judges_and_leaves_its_parents_alone():
    code = (
        "import os; from mold.data.formulas import same_formula; assert same_formula('3^{2}', '9'); child = os.fork()\n"
        "if child == 0: os._exit(0 if same_formula('4^{2}', '16') else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0; assert same_formula('5^{2}', '25')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_the_judge_ends_with_a_killed_parent():
    code = (
        "import time; from mold.data import formulas; formulas.same_formula('3^{2}', '9')\n"
        "print(formulas._JUDGE._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    judge = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{judge}/status").read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {judge} outlived its parent")
