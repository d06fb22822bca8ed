"""The lock of the state folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamlearn.errors import ConfigError, StateLockedError
from streamlearn.state.paths import StatePaths, state_lock


class TestLock:
    def test_a_second_owner_is_refused(self, tmp_path: Path) -> None:
        """The message has the pid of the first. Once the first has ended, the lock is free."""
        paths = StatePaths(tmp_path / "new" / "state")

        with state_lock(paths):
            with pytest.raises(StateLockedError, match=f"pid {os.getpid()} owns"), state_lock(paths):
                pass
            with pytest.raises(StateLockedError), state_lock(paths):
                pass
        with state_lock(paths):
            pass

    def test_a_killed_owner_leaves_no_lock(self, tmp_path: Path) -> None:
        """The file stays, but its pid does not matter."""
        (tmp_path / "lock").write_text("1")

        with state_lock(StatePaths(tmp_path)):
            assert (tmp_path / "lock").read_text() == str(os.getpid())

    def test_a_folder_that_cannot_be_created_is_a_config_error(self, tmp_path: Path) -> None:
        """The message has the setting and its value."""
        (tmp_path / "file").write_text("")

        with (
            pytest.raises(ConfigError, match=r"state\.dir = .*file/state"),
            state_lock(StatePaths(tmp_path / "file" / "state")),
        ):
            pass
