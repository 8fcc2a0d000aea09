"""The lock file of a killed dvc goes, any other stays."""

import pytest

from tools.dvc_repair import repair


@pytest.mark.parametrize("content", ["", '{"data/clips": {"write"'])
def test_a_half_written_lock_is_removed(tmp_path, content, capsys):
    path = tmp_path / "rwlock"
    path.write_text(content)
    assert repair(path, patience=0.1)
    assert not path.exists()
    assert "half-written" in capsys.readouterr().err


def test_a_whole_lock_and_no_lock_are_left_alone(tmp_path):
    path = tmp_path / "rwlock"
    assert not repair(path, patience=0.0)
    path.write_text('{"data/clips": {"read": []}}')
    assert not repair(path, patience=0.0)
    assert path.read_text() == '{"data/clips": {"read": []}}'
