"""The launcher against a Slurm whose commands are executables on PATH: what it takes for running, ended and unknown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.pools import Pool
from edif_hpc.core.settings import Settings, SlurmSettings
from edif_hpc.fleet.slurm import names, order
from edif_hpc.fleet.slurm.commands import Slurm, SlurmSilent, Unsure
from edif_hpc.fleet.slurm.draft import order_for
from edif_hpc.fleet.slurm.ending import end_allocations
from edif_hpc.fleet.slurm.launcher import SlurmLauncher
from edif_hpc.fleet.slurm.listing import ASK_EVERY_SECONDS, HANGS_SECONDS, Listing

pytestmark = pytest.mark.fast

POOL = Pool(name="main", time="00:10:00")
SBATCH = """#!{python}
import pathlib, re, sys
folder = pathlib.Path({folder!r})
if (folder / "refuse").exists():
    sys.exit("sbatch: error: Batch job submission failed: " + (folder / "refuse").read_text())
name = re.search(r"--job-name=(\\S+)", pathlib.Path(sys.argv[1]).read_text())[1]
with (folder / "queue").open("a") as queue:
    queue.write(f"7|RUNNING|None|2026-11-24T04:00:00|2026-11-24T04:10:00|node1|{{name}}\\n")
print("Submitted batch job 7" if not (folder / "babble").exists() else "Thank you!")
"""
SQUEUE = """#!/bin/sh
[ -e {folder}/silent ] && {{ echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }}
echo asked >> {folder}/asked
cat {folder}/queue
"""
SCANCEL = """#!/bin/sh
echo $@ >> {folder}/cancelled
"""


@dataclass
class Site:
    folder: Path
    launcher: SlurmLauncher
    now: float = 1_000_000.0
    succeeded: list[tuple[int, str]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)

    def later(self, seconds: float = ASK_EVERY_SECONDS) -> None:
        self.now += seconds

    def queue(self, state: str) -> None:
        path = self.folder / "queue"
        path.write_text(path.read_text().replace("|RUNNING|", f"|{state}|").replace("|PENDING|", f"|{state}|"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "queue").touch()
    texts = {"sbatch": SBATCH, "squeue": SQUEUE, "srun": SBATCH, "scancel": SCANCEL}
    for name, text in texts.items():
        (programs / name).write_text(text.format(folder=str(tmp_path), python=sys.executable))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    home = Home(tmp_path / "home").create()
    found = Site(tmp_path, None)  # type: ignore[arg-type]  # made of itself in the next lines
    listing = Listing(Slurm(SlurmSettings(), found.counted.append), home.root, now=lambda: found.now)

    def succeed(what: order.Order, predecessor: str) -> str:
        found.succeeded.append((what.generation, predecessor))
        return "8"

    found.launcher = SlurmLauncher(
        home, POOL, listing, lambda name: order_for(home, Settings(), None, POOL, name), succeed
    )
    return found


def test_what_was_submitted_runs_until_slurm_says_otherwise(site: Site) -> None:
    assert site.launcher.launched() == []
    worker = site.launcher.launch()
    assert [each.worker_id for each in site.launcher.launched()] == [worker]
    site.later()
    assert site.launcher.ended() == []
    site.queue("TIMEOUT")
    site.later()
    (ended,) = site.launcher.ended()
    assert (ended.worker_id, ended.status, ended.cancelled) == (worker, None, False)
    assert site.launcher.launched() == []


def test_an_end_is_told_once_though_the_last_listing_is_old(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    site.later()
    site.launcher.launched()
    name = next(iter(site.launcher._submitted))
    report = order.Report(job_id="7", host="node1", started=site.now, ended=site.now + 3, status=1, cause="no image")
    order.write_report(site.launcher.home.root, name, report)
    assert [ended.cause for ended in site.launcher.ended()] == ["no image"]
    assert (site.launcher.ended(), site.launcher.launched()) == ([], [])


def test_a_person_who_cancels_is_not_a_failure(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    site.queue("CANCELLED")
    site.later()
    (ended,) = site.launcher.ended()
    assert (ended.status, ended.cancelled) == (None, True)


@pytest.mark.parametrize(("nodes", "waited"), [("", "7c0d12"), ("node1", "")])
def test_of_a_cancelled_one_it_is_known_whether_it_had_begun(site: Site, nodes: str, waited: str) -> None:
    """As captured: of one that was cancelled while it waited Slurm tells a start as well, and it is its end."""
    name = names.Name(names.tag(site.launcher.home.root), "main", "7c0d12", 2).allocation
    (site.folder / "queue").write_text(f"9|PENDING|Priority|N/A|N/A||{name}\n")
    site.launcher.launched()
    when = "2026-11-24T04:52:14"
    (site.folder / "queue").write_text(f"9|CANCELLED|Priority|{when}|{when}|{nodes}|{name}\n")
    site.later()
    (ended,) = site.launcher.ended()
    assert (ended.cancelled, ended.waited) == (True, waited)


def test_one_that_died_at_once_died_young_however_late_that_is_seen(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    queue = site.folder / "queue"
    queue.write_text(queue.read_text().replace("04:10:00", "04:00:02").replace("RUNNING", "FAILED"))
    site.now = datetime.fromisoformat("2026-11-24T04:01:05").timestamp()
    (ended,) = site.launcher.ended()
    assert (ended.status, ended.lived_seconds) == (1, 2.0)


def test_while_slurm_is_silent_nothing_ended_and_nothing_is_submitted(site: Site) -> None:
    site.launcher.launched()
    worker = site.launcher.launch()
    (site.folder / "silent").touch()
    (site.folder / "queue").write_text("")
    site.later()
    assert site.launcher.ended() == []
    assert [each.worker_id for each in site.launcher.launched()] == [worker]
    assert "Unable to contact" in site.launcher.trouble()
    with pytest.raises(ComponentError, match="Unable to contact"):
        site.launcher.launch()


def test_after_a_refusal_all_is_known_that_was(site: Site) -> None:
    site.launcher.launched()
    (site.folder / "refuse").write_text("Invalid partition name specified")
    with pytest.raises(ComponentError, match="Invalid partition name specified"):
        site.launcher.launch()
    assert not site.launcher.trouble()


def test_after_no_answer_nothing_is_known_until_slurm_was_asked_again(site: Site) -> None:
    site.launcher.launched()
    (site.folder / "refuse").write_text("Socket timed out on send/recv operation")
    with pytest.raises(Unsure, match="did not tell"):
        site.launcher.launch()
    assert "no answer" in site.launcher.trouble()
    with pytest.raises(SlurmSilent):
        site.launcher.launch()
    site.later()
    site.launcher.launched()
    assert not site.launcher.trouble()


def test_after_an_answer_that_cannot_be_read_it_may_have_been_submitted(site: Site) -> None:
    site.launcher.launched()
    (site.folder / "babble").touch()
    with pytest.raises(Unsure, match="Thank you!"):
        site.launcher.launch()
    assert site.launcher.trouble()
    site.later()
    assert len(site.launcher.launched()) == 1


def test_slurm_is_asked_once_a_minute_however_often_the_fleet_looks(site: Site) -> None:
    for _ in range(50):
        site.launcher.launched()
        site.launcher.ended()
        site.later(1.0)
    assert (site.folder / "asked").read_text().count("asked") == 1


def test_every_command_is_counted_by_its_kind_whatever_the_site_calls_it(site: Site) -> None:
    (site.folder / "bin" / "squeue").rename(site.folder / "bin" / "squeue.tinygpu")
    slurm = Slurm(SlurmSettings(squeue="squeue.tinygpu"), site.counted.append)
    site.launcher.listing.slurm = slurm
    site.launcher.launched()
    site.launcher.launch()
    site.queue("PENDING")
    site.later()
    (site.folder / "silent").touch()
    site.launcher.launched()
    (site.folder / "silent").unlink()
    site.later()
    site.launcher.launched()
    site.launcher.halt()
    assert site.counted == ["squeue", "sbatch", "squeue", "squeue", "scancel"]


def test_another_fleet_finds_what_this_one_submitted(site: Site) -> None:
    site.launcher.launched()
    worker = site.launcher.launch()
    old = site.launcher
    site.launcher = SlurmLauncher(
        old.home, POOL, Listing(old.listing.slurm, old.home.root, lambda: site.now), old.draft, old.succeed
    )
    assert "asked Slurm within the last minute" in site.launcher.trouble()
    site.later()
    assert [each.worker_id for each in site.launcher.launched()] == [worker]


@pytest.mark.parametrize(("silent", "trouble"), [(False, ""), (True, "asked Slurm within the last minute")])
def test_a_fleet_that_is_started_again_asks_slurm_no_more_often(site: Site, silent: bool, trouble: str) -> None:
    """Also when it died without an answer."""
    if silent:
        (site.folder / "silent").touch()
    site.launcher.launched()
    for later in (0, 30, ASK_EVERY_SECONDS - 1):
        again = Listing(site.launcher.listing.slurm, site.launcher.home.root, lambda later=later: site.now + later)  # type: ignore[misc]
        again.refresh()
        assert trouble in again.trouble
        assert bool(again.trouble) is silent
    assert site.counted == ["squeue"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": "now"}', '{"asked": 1000000, "seen": [{"id": 7}]}'])
def test_a_kept_answer_that_cannot_be_read_is_none(site: Site, text: str) -> None:
    path = site.launcher.home.root / "allocations" / "listing.json"
    path.parent.mkdir()
    path.write_text(text)
    again = Listing(site.launcher.listing.slurm, site.launcher.home.root, lambda: site.now)
    again.refresh()
    assert again.known == {}


def test_an_answer_from_before_a_submission_tells_nobody_of_it(site: Site) -> None:
    """What is asked beside the launch may be answered after it."""
    site.launcher.launched()
    site.later()
    asked: list[Callable[[], None]] = []
    listing = site.launcher.listing
    listing._run = asked.append
    site.launcher.launched()
    site.now += 1
    (site.folder / "refuse").write_text("Socket timed out on send/recv operation")
    with pytest.raises(Unsure):
        site.launcher.launch()
    asked.pop()()
    assert listing.known is None
    site.later()
    site.launcher.launched()
    (site.folder / "refuse").unlink()
    asked.pop()()
    assert listing.known == {}
    site.now += ASK_EVERY_SECONDS
    site.launcher.launched()
    site.now += 1
    site.launcher.launch()
    (site.folder / "queue").write_text("")
    asked.pop()()
    again = Listing(listing.slurm, site.launcher.home.root, lambda: site.now)
    assert again.known is None, "this answer is no word about what was submitted after the question"


def test_a_question_that_hangs_holds_nobody_up_and_nothing_is_known_meanwhile(site: Site) -> None:
    asked: list[Callable[[], None]] = []
    old = site.launcher
    listing = Listing(old.listing.slurm, old.home.root, lambda: site.now, run=asked.append)
    site.launcher = SlurmLauncher(old.home, POOL, listing, old.draft, old.succeed)
    site.launcher.launched()
    site.later(HANGS_SECONDS + 1)
    site.launcher.launched()
    assert len(asked) == 1
    assert "has not answered for 11 s" in site.launcher.trouble()
    with pytest.raises(SlurmSilent):
        site.launcher.launch()
    asked.pop()()
    assert site.launcher.trouble() == ""


def test_what_waits_is_taken_back_once_for_each_listing(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    site.queue("PENDING")
    site.later()
    site.launcher.launched()
    for _ in range(5):
        site.launcher.halt()
    assert site.counted.count("scancel") == 1
    site.later()
    site.launcher.launched()
    site.launcher.halt()
    assert site.counted.count("scancel") == 2
    assert (site.folder / "cancelled").read_text() == "--quiet 7\n" * 2


def test_what_somebody_else_got_is_taken_back_by_its_id(site: Site) -> None:
    broken(site)
    site.launcher.succeed = lambda what, predecessor: ""
    site.launcher.launch()
    (name,) = site.launcher._submitted
    (site.folder / "queue").write_text(f"8|PENDING|Priority|N/A|N/A||{name.allocation}\n")
    site.later()
    site.launcher.launched()
    site.launcher.halt()
    assert (site.folder / "cancelled").read_text() == "--quiet 8\n"


def test_one_that_waits_and_vanishes_holds_its_place_no_longer_than_a_listing(site: Site) -> None:
    """Slurm's estimate of a start, days ahead, is not when it was submitted."""
    name = names.first(site.launcher.home.root, "main").allocation
    (site.folder / "queue").write_text(f"9|PENDING|Priority|2099-11-24T04:00:00|N/A||{name}\n")
    assert len(site.launcher.launched()) == 1
    (site.folder / "queue").write_text("")
    site.later()
    site.launcher.ended()
    assert site.launcher.launched() == []


def test_a_lineage_that_has_ended_is_not_continued(site: Site) -> None:
    broken(site)
    site.launcher.succeed = lambda what, predecessor: None
    assert site.launcher.launch().endswith("-g1")


def test_one_that_broke_is_continued_also_after_a_silence_in_which_slurm_is_not_pressed(site: Site) -> None:
    broken(site)
    tried: list[str] = []

    def silent(what: order.Order, predecessor: str) -> str:
        tried.append(predecessor)
        raise SlurmSilent("squeue did not answer.")

    succeed, site.launcher.succeed = site.launcher.succeed, silent
    for _ in range(5):
        with pytest.raises(SlurmSilent, match="squeue did not answer"):
            site.launcher.launch()
    assert tried == ["7"]
    site.launcher.succeed = succeed
    site.later()
    site.launcher.launched()
    assert site.launcher.launch().endswith("-g2")


def test_what_somebody_else_is_getting_is_no_failure_if_it_never_shows(site: Site) -> None:
    broken(site)
    site.launcher.succeed = lambda what, predecessor: ""
    assert site.launcher.launch().endswith("-g2")
    site.later(ASK_EVERY_SECONDS + 1)
    assert [(ended.status, ended.cancelled) for ended in site.launcher.ended()] == [(None, False)]


@pytest.mark.parametrize(
    ("served", "longest", "lived"), [(False, 400.0, 0.0), (True, 11.0, 11.0), (True, 400.0, 400.0)]
)
def test_one_that_never_served_died_young(site: Site, served: bool, longest: float, lived: float) -> None:
    site.launcher.launched()
    site.launcher.launch()
    name = next(iter(site.launcher._submitted))
    report = order.Report(job_id="7", host="node1", started=site.now - 500, ended=site.now, status=1, cause="it broke")
    report.served, report.longest = served, longest
    order.write_report(site.launcher.home.root, name, report)
    assert [ended.lived_seconds for ended in site.launcher.ended()] == [lived]


def test_a_sweep_passes_over_what_goes_meanwhile(site: Site) -> None:
    """Drafts, of which another thread or another pool's launch makes files."""
    home = site.launcher.home
    folder = order.folder(home.root)
    folder.mkdir()

    def write(number: int) -> None:
        home.write_private(folder / f"{number % 10}.json", "{}")

    with ThreadPoolExecutor(1) as thread:
        writing = [thread.submit(write, number) for number in range(500)]
        while not all(each.done() for each in writing):
            order.sweep(home.root)


def test_down_cancels_this_homes_allocations_and_no_others(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    with (site.folder / "queue").open("a") as queue:
        other = names.first(Path("/another/home"), "main").allocation
        queue.write(f"8|RUNNING|None|N/A|N/A|node1|{other}\n9|RUNNING|None|N/A|N/A|node1|interactive\n")
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        site.queue("CANCELLED")

    end_allocations(site.launcher.home.root, Slurm(SlurmSettings()), tell)
    assert (site.folder / "cancelled").read_text() == "--quiet 7\n"
    assert told == ["cancelling 1 allocations …"]


def broken(site: Site) -> None:
    """An allocation whose node failed 540 s after its start."""
    site.launcher.launched()
    site.launcher.launch()
    site.later()
    site.launcher.launched()
    site.now = datetime.fromisoformat("2026-11-24T04:09:00").timestamp()
    site.queue("NODE_FAIL")
    site.launcher.ended()


def test_what_broke_late_is_continued_and_what_broke_young_begins_anew(site: Site) -> None:
    site.launcher.launched()
    site.launcher.launch()
    site.later()
    site.launcher.launched()
    site.now = datetime.fromisoformat("2026-11-24T04:09:00").timestamp()  # 540 s after its start
    site.queue("NODE_FAIL")
    assert [ended.status for ended in site.launcher.ended()] == [1]
    assert site.launcher.launch().endswith("-g2")
    assert site.succeeded == [(2, "7")]
    assert site.launcher.launch().endswith("-g1"), "one that broke is continued once"
