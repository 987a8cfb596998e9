"""Store of MLflow: its address, and whether it can be used from here.

MLflow reads its settings when it is imported, so import this module before it.
"""

import logging
import os
import re
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A call to a server that is away fails in seconds, not minutes: the mirror tries again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sqlalchemy import create_engine, make_url

from core.errors import ConfigError, UserError
from core.io.files import write_first
from core.io.mounts import network_file_system

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # The mirror tells.

ACTIVE = "active"
"""State of what was not deleted."""
_DATA_BASES = ("sqlite", "postgresql", "mysql", "mssql")
_LOCKED = 15
"""Seconds that a data base file may be locked by another process."""
_PACKAGES = {
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob",
}
"""What provides a driver that is not called like its package."""


def tracking_uri(storage: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or SQLite in the storage folder.

    The path of a data base file is absolute, as a sweep changes the working directory.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not given:
        return _sqlite(storage, "mlflow.db")
    if re.match(r"sqlite:///[^/:]", given):
        return _sqlite(Path.cwd(), given.removeprefix("sqlite:///"))
    return given


def _sqlite(folder: Path, file: str) -> str:
    """Address of a file, its own name as SQLAlchemy reads it, in a folder of any name."""
    quoted = str(folder).replace("%", "%25").replace("?", "%3F")
    # Without the driver's name MLflow would also make a folder of the quoted name.
    driver = "" if quoted == str(folder) else "+pysqlite"
    return f"sqlite{driver}:///{quoted}/{file}"


def file_of(uri: str) -> Path | None:
    """The file of a data base; None for one that is no file."""
    path = make_url(uri).database if uri.startswith("sqlite") else None
    return Path(path) if path and path != ":memory:" else None


@contextmanager
def usable(uri: str) -> Generator[None]:
    """Turns what MLflow, a driver or a connection raises into one line with a remedy.

    Raises:
        ConfigError: the block raised another error than a user's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = without_user(uri)
        raise ConfigError(
            f"MLflow at '{where}' does not answer as it should ({reason(error)}): "
            f"{_remedy(uri, error)}"
        ) from error


def reason(error: Exception) -> str:
    """An error's first sentence, of a data base's driver rather than of SQLAlchemy."""
    text = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {without_user(text).partition('. ')[0][:300]}"


def _remedy(uri: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        package = str(error.name).partition(".")[0]
        return f"pip install {_PACKAGES.get(package, package)}"
    if "database schema" in str(error):
        return (
            f"copy the data base, then run `{_mlflow()} db upgrade {_shell_word(uri)}`, or use the "
            "version of MLflow that wrote it"
        )
    if "maintenance mode" in str(error):
        return (
            f"run `{_mlflow()} migrate-filestore --help`, unset MLFLOW_TRACKING_URI, or set it to "
            "sqlite:///FILE"
        )
    if uri.startswith("http"):
        return (
            "start the server, correct MLFLOW_TRACKING_URI, or allow this host with --allowed-hosts"
        )
    if uri.startswith("sqlite"):
        return "stop what holds the file, restore it, or name another in MLFLOW_TRACKING_URI"
    return (
        "start the data base, or correct MLFLOW_TRACKING_URI: http://HOST:PORT, sqlite:///FILE, "
        "or another data base that MLflow takes"
    )


def reachable(uri: str) -> None:
    """Asks a tracking server, or a data base, for a sign of life.

    Raises:
        ConfigError: it does not answer, or refuses.
    """
    with usable(uri):
        if uri.startswith("http"):
            page = f"{without_user(uri).rstrip('/')}/health"
            with urllib.request.urlopen(page, timeout=10) as answer:
                answer.read()
        elif uri.startswith(_DATA_BASES):
            _connect(uri)
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _make(path: Path) -> None:
    """Makes a data base whole or not at all, as MLflow does not go on with some of its tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = _sqlite(folder, path.name)
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        with suppress(OSError):  # SQLite says better why it cannot be there.
            write_first(path, (folder / path.name).read_bytes(), private=False)


def _connect(uri: str) -> None:
    """Opens a data base, a file for writing: MLflow would try again for minutes.

    Raises:
        Exception: what SQLAlchemy and the driver raise.
        ConfigError: the data base would vanish with this process, or lies where SQLite's own
            documentation warns of damage.
    """
    is_file = uri.startswith("sqlite")
    if is_file:
        if (path := file_of(uri)) is None:
            raise ConfigError(f"MLFLOW_TRACKING_URI={uri} keeps nothing: name a file in it")
        if kind := network_file_system(path.parent):
            raise ConfigError(
                f"MLflow's SQLite '{path}' lies on a network file system ({kind}), where SQLite "
                "can be damaged: set MLFLOW_TRACKING_URI=sqlite:////FOLDER-ON-A-LOCAL-DISK/mlflow."
                "db, or to a server's address"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
    engine = create_engine(uri, connect_args={"timeout": _LOCKED} if is_file else {})
    try:
        with engine.connect() as connection:
            if is_file:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                connection.exec_driver_sql("ROLLBACK")
    finally:
        engine.dispose()


def open_experiment(uri: str, name: str, storage: Path, create: bool = True) -> str:
    """Id of the experiment; creates it, and the data base, if there is none.

    Args:
        create: False leaves what is not there, and the id empty, as for a selection before its end:
            when something was created would tell how long its trials took, so how many there were.

    Raises:
        ConfigError: MLflow cannot be used, the experiment was deleted, or the place of its files
            cannot be written from here.
    """
    with usable(uri):
        file = None if create else file_of(uri)
        if file is not None and not file.exists():
            _connect(uri)
            file.unlink()
            return ""
        reachable(uri)
        experiment = find_experiment(uri, name, storage, create)
        if experiment is None:
            return ""
        if experiment.lifecycle_stage != ACTIVE:
            raise ConfigError(
                f"experiment={name!r} was deleted in MLflow: restore it by "
                f"`MLFLOW_TRACKING_URI={_shell_word(uri)} {_mlflow()} experiments restore -x "
                f"{experiment.experiment_id}`, or choose another with experiment=NAME"
            )
        _require_artifacts(uri, experiment)
    return experiment.experiment_id


def find_experiment(uri: str, name: str, storage: Path, create: bool = True) -> Experiment | None:
    """The experiment, also if it was deleted; created if there is none, or None.

    Raises:
        MlflowException: MLflow does not answer, or refuses.
    """
    client = MlflowClient(tracking_uri=uri)
    if create and client.get_experiment_by_name(name) is None:
        artifacts = None if uri.startswith("http") else (storage / "mlartifacts").as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # Not of language models.
        try:
            client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # By another driver.
                raise
    return client.get_experiment_by_name(name)


def _require_artifacts(uri: str, experiment: Experiment) -> None:
    """Finds out before training whether files can be uploaded from here.

    Raises:
        ConfigError: their store is of a kind without its package, or does not answer.
    """
    location = experiment.artifact_location
    try:
        if is_local_uri(location, is_tracking_or_registry_uri=False):
            folder = Path(local_file_uri_to_path(location))
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        else:
            get_artifact_repository(location, tracking_uri=uri).list_artifacts()
    except Exception as error:
        remedy = "give access to it, or choose another with experiment=NAME"
        remedy = _remedy(uri, error) if isinstance(error, ImportError) else remedy
        raise ConfigError(
            f"experiment={experiment.name!r} of MLflow keeps files at '{without_user(location)}', "
            f"which cannot be used from here ({reason(error)}): {remedy}"
        ) from error


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on this data; never shows a password."""
    if uri.startswith("http"):
        return f"open {without_user(uri)}"
    return f"{_mlflow()} ui --backend-store-uri {_shell_word(uri)}"


def _mlflow() -> str:
    """MLflow's program, as a word for a shell."""
    program = Path(sys.executable).with_name("mlflow")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.quote(str(program))


def _shell_word(uri: str) -> str:
    return shlex.quote(uri) if uri == without_user(uri) else '"$MLFLOW_TRACKING_URI"'


def without_user(uri: str) -> str:
    """An address, or a text with some, without names and passwords."""
    return re.sub(r"(?<=://)[^/\s]*@", "", uri)
