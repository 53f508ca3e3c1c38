"""The lines of progress of a training."""

from dcdit.training.progress import Progress


def test_progress_in_a_log_is_whole_lines_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("dcdit.training.progress.time.monotonic", lambda: clock[0])
    progress = Progress(100, 200)
    for _ in range(100):
        clock[0] += 1
        progress.advance()
        progress.report("loss 1")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0] == "step 110 of 200: loss 1, 0:01:30 left"
    assert lines[-1] == "step 200 of 200: loss 1, 0:00:00 left" and "\r" not in "".join(lines)
