import errno
import json
import os
import subprocess
import sys

import pytest

from mold.files import append_jsonl, check_writable, cut_torn_line, json_lines, sole_use, write_atomically, write_jsonl

ROWS = [{"id": "a", "text": "½ 五 \n\u2028"}, {"id": "b", "text": None}]


def rows_of(path, **options):
    return [row for _, row in json_lines(path, **options)]


def test_rows_are_written_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    assert [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] == ROWS
    assert rows_of(path) == ROWS
    write_jsonl(path, [])
    assert path.read_bytes() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("mold.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_wherever_a_run_is_killed_whole_rows_stay_and_go_on(tmp_path):
    path = tmp_path / "deep/rows.jsonl"
    for row in ROWS:
        append_jsonl(path, row)
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole, torn = (length >= first) + (length == len(data)), []
        assert rows_of(path, on_torn=lambda torn=torn: torn.append(1)) == ROWS[:whole]
        assert len(torn) == (length not in (0, first, len(data)))
        append_jsonl(path, {"n": 1})
        assert rows_of(path) == [*ROWS[:whole], {"n": 1}]
        path.write_bytes(data[:length])
        cut_torn_line(path)
        assert rows_of(path) == ROWS[:whole]


def test_a_last_line_of_a_file_that_nobody_was_killed_at_needs_no_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\r\n\n{"a": 2}')
    assert list(json_lines(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 1}\n', r"rows\.jsonl:2: is no JSON"),
        (b'{"a": 1}\n\n"a"\n', r"rows\.jsonl:3: is a str, must be an object"),
        (b'{"a": "\xff"}\n', r"rows\.jsonl:1: holds the byte 0xff, must be UTF-8"),
        (None, r"rationales: .*rows\.jsonl does not exist"),
    ],
)
def test_what_is_no_row_is_named(tmp_path, data, message):
    path = tmp_path / "rows.jsonl"
    if data is not None:
        path.write_bytes(data)
    for on_torn in (None, list):
        with pytest.raises(ValueError, match=message):
            rows_of(path, name="rationales", on_torn=on_torn)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mold.files.os.fsync", full)
    for write in (lambda path: write_atomically(path, b"new"), lambda path: append_jsonl(path, {})):
        with pytest.raises(OSError, match=r"No space left on device: .*rows\.jsonl"):
            write(tmp_path / "rows.jsonl")


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (tmp_path / "file.tmp").symlink_to(other)
    write_atomically(tmp_path / "file", b"new")
    assert (other.read_bytes(), (tmp_path / "file").read_bytes()) == (b"kept", b"new")


def test_a_folder_is_held_against_other_processes_until_they_die(tmp_path):
    code = "import sys, time; from pathlib import Path; from mold.files import sole_use\n"
    code += "with sole_use(Path(sys.argv[1]), 'output_dir'): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with (
                pytest.raises(ValueError, match=r"output_dir: .* is in use by another"),
                sole_use(tmp_path, "output_dir"),
            ):
                pass
        finally:
            holder.kill()
    for _ in range(2):
        with sole_use(tmp_path, "output_dir"), sole_use(tmp_path / ".", "output_dir"):
            pass


def test_a_folder_that_cannot_be_written_is_told_before_it_is_made(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "output_dir")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"output_dir: is '{folder}', must be a folder: {tmp_path / 'file'} is a"):
            check_writable(folder, "output_dir")
    asked = []
    monkeypatch.setattr(os, "access", lambda place, mode: asked.append((place, mode)))  # root may write anywhere
    with pytest.raises(ValueError, match=f"output_dir: is '.*b', must be one that can be written: {tmp_path} cannot"):
        check_writable(tmp_path / "a" / "b", "output_dir")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_where_a_line_of_json_breaks_off(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": 2\n{"c": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: is no JSON \(Expecting ',' delimiter, column 8\)"):
        rows_of(tmp_path / "rows.jsonl")
