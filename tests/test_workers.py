"""Workers elsewhere: what is wrong with them is said at once."""

import pytest

from mep.pipeline import workers
from mep.pipeline.cli import main
from mep.pipeline.workers import on_workers

pytest.importorskip("distributed", reason="dask.distributed is not installed")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer(address):
    with pytest.raises(ValueError, match="no Dask scheduler answers at"):
        with on_workers(address, wait=1):
            pytest.fail("went on without workers")


def test_a_scheduler_without_workers_and_a_folder_that_they_do_not_see(tmp_path, monkeypatch):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=0, processes=False, dashboard_address=None, silence_logs=50
    ) as cluster:
        with pytest.raises(ValueError, match="has no workers"):
            with on_workers(cluster.scheduler_address):
                pytest.fail("went on without workers")
        cluster.scale(1)
        cluster.wait_for_workers(1)
        monkeypatch.setattr(workers, "_sees", lambda folder: False)
        with pytest.raises(ValueError, match="doesn't see the folder"):
            with on_workers(cluster.scheduler_address, folder=tmp_path / "f"):
                pytest.fail("went on without a folder")


def test_the_shell_says_it_in_a_line(capsys):
    assert main(["run", "--data", "digits", "--dask", "nonsense://x", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no Dask scheduler answers" in err
