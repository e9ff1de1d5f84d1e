"""Files are there whole, or are what they were."""

from pathlib import Path

import pytest

from mixkvq.files import write_whole


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "rows.json"
    write_whole(path, "old")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.json"
    write_whole(path, "old")

    def full(self: Path, text: str, **_: str) -> None:
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path):
    path, link = tmp_path / "rows.json", tmp_path / "link.json"
    path.write_text("old")
    link.symlink_to(path)
    write_whole(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_what_is_no_file_is_written_to(capfd: pytest.CaptureFixture[str]):
    write_whole(Path("/dev/stdout"), "rows")
    assert capfd.readouterr().out == "rows"
