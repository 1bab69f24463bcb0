import pytest

from mold.data import DEFAULT_TEMPLATE
from mold.signals import SignalSettings, extract_signals
from tests.tiny_runs import BARE, EXAMPLES, TEACHER_TOKENIZER, make_teacher


@pytest.fixture(scope="session")
def signals(tmp_path_factory):
    """Signals of a GPT-2 teacher with another tokenizer than the student has."""
    teacher = make_teacher()
    return extract_signals(
        teacher,
        TEACHER_TOKENIZER,
        [*EXAMPLES, BARE],
        tmp_path_factory.mktemp("signals"),
        SignalSettings.of(teacher, "tiny", DEFAULT_TEMPLATE, "sum"),
        progress=False,
    )
