"""A killed worker's scratch folder is removed by the next worker."""

from __future__ import annotations

from pathlib import Path

from edif_hpc.core.scratch import OWNER
from tests.support.servers import eventually, redis_server
from tests.worker.started import prepared, worker


def test_the_next_worker_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    temporary, redis_folder = tmp_path / "tmp", tmp_path / "redis"
    temporary.mkdir()
    redis_folder.mkdir()
    with redis_server(redis_folder) as redis:
        home = prepared(tmp_path / "home", redis)

        def folders() -> list[Path]:
            return list(temporary.glob("edif-hpc-worker-*"))

        with worker(home, temporary):
            eventually(lambda: list(temporary.glob(f"*/{OWNER}")), 60.0, "the first worker's folder")
            left = folders()
        assert folders() == left
        with worker(home, temporary):
            eventually(lambda: folders() and folders() != left, 60.0, "the second worker's folder")
            assert len(folders()) == 1
