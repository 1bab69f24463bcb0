"""Formulas compared by math-verify, in a process of its own that a hostile formula cannot hold.

math-verify reads and compares LaTeX, powers, lists, sets, intervals, equations and matrices. sympy below it may
compute for ever or fill the memory ("10^{10^{9}}"), so a formula is first checked for its size and then judged by
another process, whose time and memory the system limits. That process is started for the first formula and kept: it
runs this file, which imports nothing of mold, so nothing of the parent (threads, torch, locks) is in it. It ends when
its input does, that is with the parent at the latest.
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading

try:
    import resource
except ImportError:  # Windows: the parent's limit of time remains
    resource = None  # type: ignore[assignment]

CPU_SECONDS = 2  # of one verdict; ordinary ones take 0.01 to 0.6
WALL_SECONDS = 20  # for a machine that gives the process no time
MEMORY_BYTES = 2**30

_MOST_CHARACTERS = 400
_MOST_DEPTH = 12
_MOST_MULTIPLIED = 30
# sympy evaluates these without a bound: integrals, sums over ranges, limits.
_UNBOUNDED = re.compile(r"\\(?:i*int|oint|sum|prod|lim|bigcup|bigcap)(?![a-z])|\\(?:def|newcommand|loop)")
_POWER = re.compile(r"(?:\^|\*\*)\s*(?=(.))", re.DOTALL)
_FACTORIAL = re.compile(r"(\d{4,}|[)\]}!]|\.\d+)\s*!|!{2}")
_SMALL_TOWER = re.compile(r"\{?(\d)(?:\^|\*\*)\{?(\d)\}{0,2}")
_BINOMIAL = re.compile(r"\\[dt]?binom|\\choose")
_OPENING, _CLOSING = "([{", ")]}"


@functools.lru_cache(maxsize=4096)
def same_formula(found: str, expected: str) -> bool | None:
    """Whether two formulas are equal, None where that cannot be judged within the limits.

    Args:
        found: the formula to judge, in LaTeX or as one types it, without dollar signs.
        expected: the right one. Not symmetric: an equation "x = 5" is equal to an expected 5 (see math_verify.verify).

    Raises:
        ValueError: math-verify cannot be imported.
    """
    if not (is_small(found) and is_small(expected)):
        return None
    return _JUDGE.ask(_typed(found), _typed(expected))


def is_small(formula: str) -> bool:
    """Whether a formula can be given to sympy: it is short, and its powers, factorials and binomials are small.

    Exponents go up to 999, those above brackets, which sympy multiplies out, to a product of 30; an exponent holds no
    powers or factorials of numbers but small ones.
    """
    if len(formula) > _MOST_CHARACTERS or _UNBOUNDED.search(formula) or _FACTORIAL.search(formula):
        return False
    depth = deepest = 0
    for char in formula:
        depth += (char in _OPENING) - (char in _CLOSING)
        deepest = max(deepest, depth)
    if deepest > _MOST_DEPTH:
        return False
    if _BINOMIAL.search(formula) and re.search(r"\d{4}", formula):
        return False
    multiplied_out = 1
    for power in _POWER.finditer(formula):
        exponent = _operand(formula, power.end())
        if tower := _SMALL_TOWER.fullmatch(exponent):
            exponent = str(int(tower[1]) ** int(tower[2]))
        if re.search(r"\d{4}|\d[.,]\d{3}|[eE]\d", exponent):
            return False
        if re.search(r"[\^!]|\*\*|binom", exponent) and (re.search(r"\d{2}", exponent) or not _unknown(exponent)):
            return False
        if formula[: power.start()].rstrip()[-1:] in (")", "]", "}"):
            multiplied_out *= max([1, *map(int, re.findall(r"\d+", exponent))])
            if multiplied_out > _MOST_MULTIPLIED:
                return False
    return True


def _operand(formula: str, start: int) -> str:
    """What an exponent's sign takes: a group, or everything that a careless reader could take for the exponent."""
    if formula[start : start + 1] not in _OPENING or start == len(formula):
        return re.match(r"[-+]?[\w.\\!^*{}()]*", formula[start:])[0]  # type: ignore[index]  # matches anything
    depth = 0
    for place in range(start, len(formula)):
        depth += (formula[place] in _OPENING) - (formula[place] in _CLOSING)
        if depth == 0:
            # 2^{3}^{4} and 2^(3)! go on.
            on = re.match(r"\s*(?:(?:\^|\*\*|!)[\w{}().\\^!*]*)?", formula[place + 1 :])
            return formula[start : place + 1] + (on[0] if on else "")
    return formula[start:]


def _unknown(exponent: str) -> bool:
    return bool(re.search(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", exponent))


_AS_LATEX = str.maketrans(
    {"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "−": "-", "–": "-", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty "}
)


def _typed(formula: str) -> str:
    """In LaTeX, what texts have as signs or as one types it: 2**3, 10^12, 2 x 3, √2, sqrt(2)."""
    formula = re.sub(r"(?<=[\d)])\s*\*\*\s*|\^\s*", "^", formula.replace("\u2062", ""))
    formula = re.sub(r"\^\(([^()]*)\)|\^([-+]?\d{2,}|[-+]\w)", lambda found: f"^{{{found[1] or found[2]}}}", formula)
    formula = re.sub(r"(?<=[\d)])\s*[x*]\s*(?=[\d(])", r"\\times ", formula)
    formula = re.sub(r"√\s*(\d+|\w)|√\s*\(([^()]*)\)", lambda found: rf"\sqrt{{{found[1] or found[2]}}}", formula)
    formula = re.sub(r"(?<![\\A-Za-z])(pi|infty|inf|infinity)(?![A-Za-z])", lambda f: _NAMED[f[1]], formula)
    return formula.translate(_AS_LATEX)


_NAMED = {"pi": r"\pi ", "infty": r"\infty ", "inf": r"\infty ", "infinity": r"\infty "}


# --- the parent's side ---


class _Judge:
    """The process that judges: started when needed, started again when a formula has ended it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, found: str, expected: str) -> bool | None:
        request = json.dumps([found, expected]).encode() + b"\n"
        with self._lock:
            process = self._running()
            # A timer and no select: pipes of every system can be read so.
            limit = threading.Timer(WALL_SECONDS, process.kill)
            limit.daemon = True
            limit.start()
            try:
                process.stdin.write(request)
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            except BaseException:  # an interrupt between question and answer: the next one would read this one's
                self.end()
                raise
            finally:
                limit.cancel()
            if not answer.endswith(b"\n"):
                self.end()
                return None
            return json.loads(answer)

    def _running(self) -> subprocess.Popen:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.end()
        # The parent's own search path, whatever put it there; -P: the folder of this file is no part of it.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        if self._process.stdout.readline() != b"ready\n":
            self.end()
            raise ValueError("math-verify: cannot be imported by a process of its own; must be installed (math-verify)")
        return self._process

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def forget(self) -> None:
        """In a forked child: the process is the parent's, and its pipes held here would outlive the parent."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # it is no child of this process: never waited for
            process.stdin.close()
            process.stdout.close()


# --- the process itself ---


class _OutOfTime(BaseException):
    """Nothing between here and sympy catches it."""


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    # Only this pipe speaks to the parent: whatever else prints goes nowhere.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    logging.disable(logging.CRITICAL)
    _judge(r"\frac{1}{2}", "0.5")  # the first parse builds its tables
    _limit_memory()
    answers.write(b"ready\n")
    for request in sys.stdin.buffer:
        try:
            _limit_time(CPU_SECONDS)
            verdict = _judge(*json.loads(request))
        except (_OutOfTime, RecursionError, MemoryError):
            verdict = None
        finally:
            _limit_time(0)
        answers.write(json.dumps(verdict).encode() + b"\n")


def _judge(found: str, expected: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Ours are the limits of time: the library's own need the main thread's signals.
    options = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback", "parsing_timeout": None}
    right, other = parse(f"${expected}$", **options), parse(f"${found}$", **options)
    return bool(right and other) and bool(verify(right, other, timeout_seconds=None))


def _limit_memory() -> None:
    if resource is not None:
        signal.signal(signal.SIGVTALRM, _out_of_time)
        _set_limit(resource.RLIMIT_AS, MEMORY_BYTES)
        _set_limit(resource.RLIMIT_CORE, 0)


def _limit_time(seconds: int) -> None:
    """An exception after so many seconds of computing, the end two seconds later; none at 0."""
    if resource is not None:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        if seconds:
            # One step of C code, such as a power of integers, sees no exception: the system ends it.
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            _set_limit(resource.RLIMIT_CPU, int(used) + seconds + 2)


def _set_limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _out_of_time(number, frame):
    raise _OutOfTime


if __name__ == "__main__":
    _serve()
else:
    _JUDGE = _Judge()
    atexit.register(_JUDGE.end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_JUDGE.forget)
