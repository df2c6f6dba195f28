"""Grids as users run them: in processes, interrupted, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

import geomkit as gk
from geomkit.experiments import running
from geomkit.experiments.grid import load_grid
from geomkit.experiments.methods import METHODS
from geomkit.experiments.results import load_results
from geomkit.experiments.running import run_experiments, stored_results, take_over

SMALL = """
prompts = 8
[arms]
untouched = { method = "untouched" }
SFT = { method = "sft" }
rank1 = { rule = "rank1", anchors = 8 }
[[block]]
scenarios = ["harmful-10"]
lengths = [0.05]
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # in peft


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    return folder, run_experiments("smoke", folder, progress=False)


def test_the_smoke_grid(smoke):
    _, results = smoke
    cells = load_grid("smoke").cells
    assert len(results) == len(cells)
    assert {cell.arm.method for cell in cells} == set(METHODS)
    frame = results.to_frame()
    assert not frame["error"].any()
    measured = frame[["refusal", "over_refusal", "utility", "coherence", "kl", "safety_loss", "distance"]]
    assert measured.notna().all(axis=None)
    means = frame[frame["rate"] == 4].set_index(["scenario", "arm"])["refusal"]
    assert means["harmful-10", "untouched"] == 1
    assert means["harmful-10", "SFT"] <= 0.2  # the attack works, and SPF answers it
    assert means["harmful-10", "rank1"] >= 0.8
    assert frame.loc[frame["arm"] == "rank1", "violations"].eq(0).all()
    assert (frame["triggered_refusal"].notna() == (frame["scenario"] == "backdoor")).all()
    trained = frame[frame["arm"] != "untouched"]
    assert trained["peak_mb"].between(0, 4000).all()
    assert (trained["steps_per_second"] > 0).all()
    assert set(results.attacks()["attack"]) == {
        *(f"prefill {n}" for n in (1, 2, 4, 8)), "role-play", "role-play, system turn", "lower case", "benign first",
        "begins the answer",
    }  # fmt: skip
    assert set(results.refusal_during_training()["arm"]) == {"SFT", "rank1"}
    curves = results.curves().query("rate == 4 and arm == 'rank1'")
    assert np.isfinite(curves[["first_order", "curvature"]]).all(axis=None)


def test_what_is_done_is_not_done_again(smoke):
    folder, results = smoke
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    again = run_experiments("smoke", folder, progress=False, processes=1)
    assert again.records == results.records
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == before


def test_a_cell_gives_the_same_alone_and_in_a_process_of_its_own(smoke, tmp_path):
    _, results = smoke
    alone = run_experiments(_only(load_grid("smoke"), "rank1", "harmful-10"), tmp_path, progress=False, processes=1)
    (there,) = results.where(scenario="harmful-10", arm="rank1").records
    (here,) = alone.records
    assert here["flags"] == there["flags"]
    assert here["curve"] == there["curve"]


def _only(grid, arm, scenario):
    chosen = tuple(cell for cell in grid.cells if (cell.arm.name, cell.scenario) == (arm, scenario))
    return type(grid)(grid.name, chosen)


def test_a_run_that_is_killed_goes_on_where_it_was(small, tmp_path):
    folder = tmp_path / "out"
    script = tmp_path / "run.py"  # a file, as the processes that are started import it again
    script.write_text(
        "import sys\nfrom geomkit.experiments.running import run_experiments\n"
        "if __name__ == '__main__':\n    run_experiments(sys.argv[1], sys.argv[2], processes=2)\n"
    )
    command = [sys.executable, str(script), str(small), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    deadline = time.monotonic() + 120
    while not list(folder.glob("cells/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(started) >= 2
    assert not psutil.wait_procs(started, timeout=30)[1]  # none is left behind
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("cells/*.json")}
    assert done
    results = run_experiments(small, folder, progress=False, processes=1)
    assert results.to_frame()["arm"].tolist() == ["untouched", "SFT", "rank1"]
    assert all((folder / "cells" / name).stat().st_mtime_ns == then for name, then in done.items())


def test_jobs_that_share_a_folder(small, tmp_path):
    """Two at a time, each with its shard; whichever ends last writes the results of all."""
    folder = tmp_path / "out"
    bench = "import sys; from geomkit.cli.main import main; sys.argv[0] = 'geomkit'; main()"
    jobs = [
        subprocess.Popen(  # noqa: S603
            [
                sys.executable, "-c", bench, "bench", "--grid", str(small), "--out", str(folder), "--processes", "1",
                "--shard", f"{number}/2",
            ],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in (1, 2)
    ]  # fmt: skip
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert any(f"wrote {folder / 'results.jsonl.gz'}" in out.replace("\n", "") for out, _ in said)
    assert {path.name.startswith(".") for path in folder.rglob("*")} == {False}
    grid = load_grid(small)
    joined = load_results(folder / "results.jsonl.gz")
    assert [record["cell"] for record in joined.records] == [cell.describe() for cell in grid.cells]
    assert joined.records == stored_results(grid, folder).records
    alone = run_experiments(small, tmp_path / "alone", progress=False, processes=1)
    assert [record["flags"] for record in joined.records] == [record["flags"] for record in alone.records]


def test_results_of_a_grid_that_is_not_complete(small, tmp_path):
    grid = load_grid(small)
    assert not stored_results(grid, tmp_path).records
    run_experiments(grid.shard(2, 2), tmp_path, progress=False, processes=1)
    assert [record["cell"] for record in stored_results(grid, tmp_path).records] == [
        cell.describe() for cell in grid.shard(2, 2).cells
    ]


def test_cells_of_earlier_results_are_not_run_again(small, tmp_path):
    run = run_experiments(small, tmp_path / "earlier", progress=False, processes=1)
    earlier = load_results(run.save(tmp_path / "earlier.jsonl.gz"))
    changed = tmp_path / "changed.toml"
    changed.write_text(SMALL.replace("anchors = 8", "anchors = 7"))
    grid, folder = load_grid(changed), tmp_path / "again"
    assert take_over(earlier, grid, folder) == 2
    assert take_over(earlier, grid, folder) == 0
    results = run_experiments(grid, folder, progress=False, processes=1)
    assert results.records[:2] == earlier.records[:2]  # their times as well
    assert results.records[2] != earlier.records[2]
    with pytest.raises(gk.GeomkitError, match="found none of its cells among 3 of 'small'"):
        take_over(earlier, load_grid("smoke"), folder)


def test_a_cell_that_is_cut_short_is_run_again(small, tmp_path):
    run_experiments(small, tmp_path, progress=False, processes=1)
    path = next(tmp_path.glob("cells/*SFT*"))
    path.write_text(path.read_text()[:50])
    assert not run_experiments(small, tmp_path, progress=False, processes=1).to_frame()["error"].any()
    assert json.loads(path.read_text())["flags"]


def test_a_fine_tune_that_breaks_off_is_a_result(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text(SMALL.replace("lengths = [0.05]", 'lengths = [0.1]\nrates = [1e30]\narms = ["SFT"]'))
    found = run_experiments(path, tmp_path / "out", progress=False, processes=1)
    assert "finite" in found.to_frame()["error"][0]
    assert found.summary()["broke"].tolist() == [1, 1, 1]


def _die(*_):
    os._exit(9)


def test_a_process_that_is_killed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run_cell", _die)
    with pytest.raises(gk.GeomkitError, match="a process was killed"):
        run_experiments(small, tmp_path, progress=False)
