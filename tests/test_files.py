import errno
import os
import shutil

import pytest

from rankgrpo.errors import SaveError
from rankgrpo.files import atomic as files
from rankgrpo.files.atomic import TEMPORARY, atomic_folder, point_link, write_lines


def test_lines_are_written_with_one_line_break_each(tmp_path):
    write_lines(tmp_path / "new" / "rows.jsonl", ["a", "é"])
    assert (tmp_path / "new" / "rows.jsonl").read_bytes() == "a\né\n".encode()


@pytest.mark.parametrize("error", [OSError("broken"), ValueError("from the caller")])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ["old"])

    def lines():
        yield "new"
        raise error

    with pytest.raises(SaveError if isinstance(error, OSError) else ValueError, match=str(error)):
        write_lines(path, lines())
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_text_on_a_really_full_device(tmp_path):
    target = tmp_path / "config.toml"
    write_lines(target, ["old"])
    (tmp_path / f"{TEMPORARY}config.toml").symlink_to("/dev/full")
    with pytest.raises(SaveError, match="the disk is full"):
        write_lines(target, ["new"] * 10000)
    assert target.read_text() == "old\n"


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "final").exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "final") as folder:
        (folder / "a").write_text("2")
        raise ZeroDivisionError

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    with (
        pytest.raises(SaveError, match="the disk is full.*same command"),
        atomic_folder(tmp_path / "final") as folder,
    ):
        (folder / "a").write_text("3")
    assert (tmp_path / "final" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_link_moves_in_one_step(tmp_path):
    for name in ("best-1", "best-2"):
        (tmp_path / name).mkdir()
        point_link(tmp_path / "best", tmp_path / name)
        assert (tmp_path / "best").resolve().name == name


def test_a_link_replaces_the_folder_that_a_copy_made_of_it(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    for name in ("best-1", "best-2"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text(name)
    point_link(run / "best", run / "best-1")
    shutil.copytree(run, copy)  # follows links
    assert (copy / "best").is_dir() and not (copy / "best").is_symlink()
    point_link(copy / "best", copy / "best-2")
    assert (copy / "best" / "config.json").read_text() == "best-2"
    assert sorted(p.name for p in copy.iterdir()) == ["best", "best-1", "best-2"]
