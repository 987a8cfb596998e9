"""`setup.sh` of a node, with stand-ins for what would change the machine or reach the network."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    # As root only what stays in the test's folder is done.
    "sudo": """case "$1" in
        mkdir | chown) "$@" ;;
        tee) echo "sudo $*: $(cat)" >>"$LOG" ;;
        *) echo "sudo $*" >>"$LOG" ;;
        esac""",
    "dpkg": "exit 1",
    "mountpoint": "exit 1",
    "lspci": "true",
    "python3": """[ "$2" = venv ] && mkdir -p "$3/bin" && ln -sf "$STUBS/pip" "$3/bin/python" &&
        ln -sf "$STUBS/uv" "$3/bin/uv\"""",
    "pip": 'echo "pip $*" >>"$LOG"',
    "uv": """echo "uv $*" >>"$LOG"
        [ "$1" != venv ] || mkdir -p .venv/bin "$UV_PYTHON_INSTALL_DIR/cpython"
        [ "$1" != pip ] || echo "$RANDOM$RANDOM" >.venv/installed""",
}


class Node:
    """A machine of a cluster: a home with the code, and the shared folder."""

    def __init__(self, home: Path, shared: Path) -> None:
        self.home, self.code = home, home / "feta-sweep"
        settings = home / ".config" / "feta-sweep"
        settings.mkdir(parents=True)
        for name in ("master.secret", "ray.token"):
            (settings / name).write_text("made for the test")
        text = "FETA_SWEEP_NFS=host:/share\nFETA_SWEEP_BUCKET=s3://b\n"
        (settings / "cluster.env").write_text(text)
        (home / ".bashrc").write_text("return\n")
        shutil.copytree(ROOT / "clusters", self.code / "clusters")
        for name in ("constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.code)
        environment = self.code / "clusters" / "environment.sh"
        text = environment.read_text()
        assert "FETA_SWEEP_MOUNT=/mnt/feta-sweep\n" in text
        environment.write_text(text.replace("/mnt/feta-sweep\n", f"{shared}\n"))
        self.log, self.stubs = home / "log", home / "stubs"
        self.stubs.mkdir()
        for name, body in STAND_INS.items():
            (self.stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (self.stubs / name).chmod(0o755)

    def set_up(self) -> str:
        """Runs it; returns what was done on the machine."""
        self.log.write_text("")
        ended = subprocess.run(
            ["bash", self.code / "clusters" / "setup.sh", "aws"],
            env={
                "HOME": str(self.home),
                "PATH": f"{self.stubs}:{os.environ['PATH']}",
                "LOG": str(self.log),
                "STUBS": str(self.stubs),
            },
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return self.log.read_text()

    @property
    def installed(self) -> str:
        return (self.code / ".venv" / "installed").read_text()


@pytest.fixture
def nodes(tmp_path):
    if not shutil.which("zstd"):
        pytest.skip("no zstd found: apt-get install -y zstd")
    shared = tmp_path / "shared"
    return [Node(tmp_path / name, shared) for name in ("head", "worker")]


def test_one_node_installs_and_all_others_unpack_the_same(nodes):
    head, worker = nodes
    done = head.set_up()
    assert "uv venv -q --managed-python --python 3.11 .venv" in done
    assert "--constraint constraints.txt --editable .[images,sweep,aws]" in done
    done = worker.set_up()
    assert "pip" not in done
    assert "uv" not in done
    assert worker.installed == head.installed
    assert (worker.code / ".python" / "cpython").is_dir()

    for node in nodes:
        before = node.installed
        assert "pip" not in node.set_up()
        assert node.installed == before

    before = head.installed
    for node in nodes:  # As `ray up` does with changed code.
        with (node.code / "constraints.txt").open("a") as file:
            file.write("other==1\n")
    assert "uv pip install" in head.set_up()
    assert "uv" not in worker.set_up()
    assert head.installed == worker.installed != before


def test_the_folder_is_mounted_with_locks_that_end_with_a_machine_and_again_at_boot(nodes):
    done = nodes[0].set_up()
    assert "sudo mount -t nfs -o vers=4.1,hard,noatime host:/share " in done
    assert "sudo tee -a /etc/fstab: host:/share " in done
    first = (nodes[0].home / ".bashrc").read_text().splitlines()[0]
    assert first == '. "$HOME/feta-sweep/clusters/environment.sh"'


def test_setup_names_what_is_missing(tmp_path):
    ended = subprocess.run(
        ["bash", ROOT / "clusters" / "setup.sh", "aws"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "master.secret is missing or empty" in ended.stderr


SERVER = """#!/usr/bin/env python3
import sqlite3, sys
assert sys.argv[sys.argv.index("--workers") + 1] == "1"
address = sys.argv[sys.argv.index("--backend-store-uri") + 1]
store = sqlite3.connect(address.removeprefix("sqlite:///"))
store.execute("create table if not exists runs (name text)")
store.execute("insert into runs values ('one')")
store.commit()
"""


def test_mlflows_database_lies_on_the_heads_disk_and_outlives_it(tmp_path):
    (tmp_path / "mlflow").write_text(SERVER)
    # The server is up as soon as it has made its store.
    (tmp_path / "curl").write_text(
        "#!/usr/bin/env bash\n[ -e started ] || { touch started; exit 7; }\n"
    )
    for name in ("mlflow", "curl"):
        (tmp_path / name).chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()

    def rows(home: Path) -> list[tuple[str]]:
        """Of the copy, after a head of this home has started and lived for a moment."""
        home.mkdir()
        environment = {
            "HOME": str(home),
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "FETA_SWEEP_MOUNT": str(shared),
            "FETA_SWEEP_BUCKET": "s3://b",
            "FETA_SWEEP_COPY_SECONDS": "0.3",
        }
        began = time.time()
        subprocess.run(["bash", ROOT / "clusters" / "mlflow.sh"], env=environment, check=True)
        copy = shared / "mlflow.db"
        while not copy.exists() or copy.stat().st_mtime < began + 1:  # Of a store that is ready.
            assert time.time() < began + 60
            time.sleep(0.1)
        (home / "mlflow.db").unlink()
        subprocess.run(["flock", "--timeout=20", home / "mlflow-copy.lock", "true"], check=True)
        assert not (home / "mlflow.db").exists()
        return sqlite3.connect(copy).execute("select * from runs").fetchall()

    assert rows(tmp_path / "first") == [("one",)]
    assert rows(tmp_path / "second") == [("one",)] * 2
    assert [path.name for path in shared.iterdir()] == ["mlflow.db"]
