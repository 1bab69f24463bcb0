import importlib
import inspect
import sys
import threading

import pytest

from mold.after_import import _FINDER, after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module, gives its name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(source, name=None):
        names.append(name or f"awaited_{len(names)}_{tmp_path.name}")
        path = tmp_path / f"{names[-1]}.py"
        path.write_text(source)
        importlib.invalidate_caches()
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)
        _FINDER.functions.pop(name, None)


def test_an_import_calls_and_a_module_that_is_there_calls_at_once(module):
    name, seen = module("value = 1"), []
    after_import(name, lambda m: seen.append(m.value))
    assert name not in sys.modules
    assert not seen
    importlib.import_module(name)
    importlib.import_module(name)
    assert seen == [1]
    after_import(name, lambda m: seen.append(-m.value))
    assert seen == [1, -1]
    assert sys.meta_path.count(_FINDER) == 1


def test_a_reload_and_a_second_import_call_again(module):
    name, seen = module("value = 1"), []
    after_import(name, lambda m: seen.append(id(m)))
    first = importlib.import_module(name)
    importlib.reload(first)
    del sys.modules[name]
    second = importlib.import_module(name)
    assert seen == [id(first), id(first), id(second)]


def test_the_module_looks_as_if_nobody_had_waited(module):
    plain, awaited = module("def f():\n    return 1\n"), module("def f():\n    return 1\n")
    after_import(awaited, lambda m: None)
    assert importlib.util.find_spec(awaited).loader.get_source(awaited) == "def f():\n    return 1\n"
    one, two = map(importlib.import_module, (plain, awaited))
    assert type(two.__loader__) is type(one.__loader__) is type(two.__spec__.loader)
    assert inspect.getsource(two.f) == inspect.getsource(one.f)
    assert vars(one).keys() == vars(two).keys()


def test_a_module_that_fails_is_none_and_the_next_import_tries_again(module, tmp_path):
    name, seen = module("raise RuntimeError('no')"), []
    after_import(name, lambda m: seen.append(m.value))
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(name)
    assert name not in sys.modules
    assert not seen
    (tmp_path / f"{name}.py").write_text("value = 'a longer text, so that no cached bytecode fits'")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert len(seen) == 1


def test_what_the_function_raises_is_raised(module):
    name = module("value = 1")
    after_import(name, lambda m: m.missing)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        importlib.import_module(name)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{name}_that_is_not_there")


def test_a_module_that_is_blocked_or_missing_stays_so(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "blocked_module", None)
    for name in ("blocked_module", "missing_module"):
        after_import(name, lambda m: None)
        with pytest.raises(ImportError):
            importlib.import_module(name)
        del _FINDER.functions[name]


def test_a_module_that_another_thread_is_importing_is_waited_for(module):
    """It is in sys.modules already, and not yet what it will be."""
    name = module("import threading\nbegun.set()\ngo_on.wait(10)\nvalue = 1", "awaited_slowly")
    import builtins

    begun, go_on, seen = threading.Event(), threading.Event(), []
    builtins.begun, builtins.go_on = begun, go_on
    try:
        other = threading.Thread(target=importlib.import_module, args=[name])
        other.start()
        assert begun.wait(10)
        threading.Timer(0.2, go_on.set).start()
        after_import(name, lambda m: seen.append(m.value))
        other.join(10)
    finally:
        del builtins.begun, builtins.go_on
    assert seen == [1]


def test_many_threads_import_once(module):
    name, seen = module("import time\ntime.sleep(0.05)\nvalue = 1"), []
    after_import(name, lambda m: seen.append(m.value))
    threads = [threading.Thread(target=importlib.import_module, args=[name]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]
