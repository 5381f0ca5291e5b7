"""nginx and systemd take the files of `slurm/` as they are, but for the names an admin fills in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edif_hpc.fleet import certificates
from tests.support.models import REPO

pytestmark = pytest.mark.fast

SLURM = REPO / "slurm"


def test_nginx_takes_the_site(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if nginx is None:
        pytest.skip("there is no nginx here")
    found = certificates.ensure(tmp_path, "127.0.0.1")
    text = (SLURM / "nginx.conf").read_text()
    text = text.replace("/etc/ssl/NAME.pem", str(found.certificate)).replace("/etc/ssl/NAME.key", str(found.key))
    (tmp_path / "site.conf").write_text(text.replace("server_name NAME", "server_name test"))
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n  access_log off;\n"
        + "".join(f"  {name}_temp_path {tmp_path}/{name};\n" for name in ("proxy", "fastcgi", "uwsgi", "scgi"))
        + f"  client_body_temp_path {tmp_path}/body;\n  include {tmp_path}/site.conf;\n}}\n"
    )
    command = [nginx, "-t", "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    text = (SLURM / "systemd" / "edif-hpc.service").read_text()
    unit = tmp_path / "edif-hpc.service"
    unit.write_text(text.replace("/SHARED/edif_hpc/.venv/bin/edif-hpc", "/bin/true"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--user", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "edif-hpc.service" not in done.stderr, done.stderr
