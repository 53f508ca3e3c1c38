"""Files that cannot be written: a full disk names the file, and a link to nothing is refused beforehand."""

import errno
from pathlib import Path

import pytest
from small_sampling import tiny

from dcdit.checkpoints.folder import save_checkpoint
from dcdit.cli import main
from dcdit.errors import DataError
from dcdit.files import check_folder, replacing
from dcdit.training.state import Metrics


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def replace(file):
    with replacing(file) as temporary:
        temporary.write_bytes(b"")


@pytest.mark.parametrize(
    "name, write",
    [
        ("metrics.jsonl", lambda file: Metrics(file.parent, 0).write({"step": 1})),
        ("model", lambda folder: save_checkpoint(folder, tiny(), {})),
        ("last", replace),
    ],
)
def test_a_full_disk_names_the_file(name, write, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr("dcdit.training.state.json.dumps", full)  # in place of the stream's own write
    with pytest.raises(OSError) as caught:
        write(tmp_path / name)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir() if file.name != "metrics.jsonl"] == []


@pytest.mark.parametrize("inside", ["", "below/it"])
def test_a_link_to_nothing_is_no_output(inside, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match="link is a link to nothing"):
        check_folder(tmp_path / "link" / inside)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "~nobodyhere/a.yaml"],
        ["train", "digits.yaml", "output=~nobodyhere/a"],
        ["train", "digits.yaml", "init=~nobodyhere/a"],
        ["info", "~nobodyhere/a"],
        ["sample", "~nobodyhere/a"],
        ["sample", "digits", "--output", "~nobodyhere/a"],
        ["convert", "~nobodyhere/a", "b.pt"],
        ["data", "check", "~nobodyhere/a"],
        ["evaluate", "~nobodyhere/a", "--reference", "b"],
        ["upcycle", "--from", "~nobodyhere/a", "digits.yaml"],
    ],
)
def test_a_home_folder_that_is_not_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text("model: {preset: digits}")
    try:
        status = main(words)
    except SystemExit as left:  # argparse's
        status = left.code
    text = capsys.readouterr().err
    assert status == 2 and "~nobodyhere/a" in text and "there is no such home folder" in text
    assert text.count("\n") == 1 and [file.name for file in tmp_path.iterdir()] == ["digits.yaml"]
