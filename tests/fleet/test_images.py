"""Building images with executables on PATH in the place of Apptainer; the real thing is built in tests/cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from edif_hpc.core.errors import ComponentError
from edif_hpc.fleet import images
from edif_hpc.fleet.mirror import through_loopback
from tests.support.models import REPO

pytestmark = pytest.mark.fast

EDIF_HPC = Path(sys.executable).parent / "edif-hpc"
APPTAINER = """#!/bin/bash
echo "$*" >> {folder}/commands
case "$*" in
    *inspect*) echo '{{"data": {{"attributes": {{"labels": {{"org.edif-hpc.kind": "gateway"}}}}}}}}' ;;
    build*)
        [ ! -e {folder}/broken ] || {{ echo "FATAL: no space left on device" >&2; exit 255; }}
        for argument; do case "$argument" in *.sif) echo image > "$argument" ;; esac; done ;;
    test*) echo fine ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("apptainer", "debootstrap"):
        (folder / name).write_text(APPTAINER.format(folder=tmp_path))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    # What is built is not looked into here, and root with few rights would be refused before.
    monkeypatch.setattr(images, "privileges", list)
    monkeypatch.setattr(images, "fetch_wheels", lambda kind, place: {"wheels": str(place), "version": "1"})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sources.list", "# deb http://old/debian x main\ndeb [arch=amd64] http://m.example/debian/ bookworm main\n"),
        ("sources.list.d/debian.sources", "Types: deb\nURIs: http://m.example/debian\nSuites: bookworm\n"),
    ],
)
def test_the_mirror_is_the_machines_own(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "a.sources").write_text("Types: deb\nURIs: http://m.example/debian-security\n")
    (tmp_path / name).write_text(text)
    assert images.debian_mirror(tmp_path) == "http://m.example/debian"


def test_a_machine_without_a_mirror_must_be_told_one(tmp_path: Path) -> None:
    with pytest.raises(ComponentError, match="--arg mirror=URL"):
        images.debian_mirror(tmp_path)


def test_a_build_replaces_the_image_at_the_end_and_leaves_nothing_beside_it(programs: Path) -> None:
    out = programs / "out" / "gateway.sif"
    told: list[str] = []
    built = images.build("gateway", out, {"mirror": "http://m.example/debian"}, told.append)
    assert out.read_text() == "image\n"
    assert [path.name for path in out.parent.iterdir()] == ["gateway.sif"]
    assert built.labels == {"org.edif-hpc.kind": "gateway"}
    assert set(built.seconds) == {"wheels", "image"}
    assert len(told) == 2
    (command, _) = (programs / "commands").read_text().splitlines()
    assert "m.example" not in command, "an image tells where it was built from"
    assert "--build-arg=mirror=http://127.0.0.1:" in command
    assert command.endswith("apptainer/gateway.def")


def test_a_build_reaches_its_mirror_through_loopback(tmp_path: Path) -> None:
    (tmp_path / "dists").mkdir()
    (tmp_path / "dists" / "Release").write_text("Suite: stable\n")
    served = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        with through_loopback(f"http://127.0.0.1:{served.server_port}/") as address:
            assert httpx.get(f"{address}/dists/Release").text == "Suite: stable\n"
            assert httpx.head(f"{address}/dists/Release").headers["content-length"] == "14"
            assert httpx.get(f"{address}/dists/Nothing").status_code == 404
            served.shutdown()
            served.server_close()
            assert httpx.get(f"{address}/dists/Release").status_code == 502
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/dists/Release")
    finally:
        served.server_close()


def test_a_failed_build_keeps_the_old_image_and_says_why(programs: Path) -> None:
    out = programs / "out" / "gateway.sif"
    out.parent.mkdir()
    out.write_text("old")
    (programs / "broken").touch()
    with pytest.raises(ComponentError, match="no space left on device"):
        images.build("gateway", out, {"mirror": "http://m.example/debian"}, lambda words: None)
    assert out.read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["gateway.sif"]


def test_what_is_missing_is_named_before_anything_is_fetched(
    programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "_path", lambda: "/nowhere")
    with pytest.raises(ComponentError, match="There is no apptainer here; install Apptainer"):
        images.build("cpu", tmp_path / "x.sif", {}, lambda words: None)


@pytest.mark.parametrize(("kind", "needed"), [("cpu", True), ("gateway", True), ("cuda", False), ("rocm", False)])
def test_only_what_begins_with_debian_needs_debootstrap(programs: Path, kind: str, needed: bool) -> None:
    (programs / "bin" / "debootstrap").unlink()
    paths = [str(programs / "bin")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_path", lambda: os.pathsep.join(paths))
        if needed:
            with pytest.raises(ComponentError, match="no debootstrap here"):
                images.refuse(images.KINDS[kind], programs / "x.sif")
        else:
            images.refuse(images.KINDS[kind], programs / "x.sif")


@pytest.mark.parametrize("kind", images.KINDS)
def test_every_kind_has_a_definition_with_a_test_and_labels(kind: str) -> None:
    text = (REPO / "apptainer" / images.KINDS[kind].definition).read_text()
    for section in ("%post", "%test", "%labels", "%help", "%runscript", "%environment"):
        assert f"\n{section}\n" in text
    assert "http" not in text, "mirrors are arguments"


@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_pinned_requirements_are_pinned_and_bring_no_torch(kind: str) -> None:
    lines = (REPO / kind / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert not [pin for pin in pins if pin.startswith(("torch", "nvidia", "triton"))]
    assert "nnsight==0.8.1" in pins


def test_the_command_refuses_what_it_does_not_know(programs: Path) -> None:
    for arguments, words in (
        (["build", "mars"], "no image of the kind 'mars'"),
        (["build", "cpu", "--arg", "x"], "NAME="),
    ):
        done = subprocess.run([EDIF_HPC, "image", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert words in done.stderr


def test_check_prints_labels_as_json(programs: Path) -> None:
    (programs / "x.sif").touch()
    done = subprocess.run(
        [EDIF_HPC, "image", "check", str(programs / "x.sif"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["labels"] == {"org.edif-hpc.kind": "gateway"}
