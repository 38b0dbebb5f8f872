"""schemathesis: what an OpenAPI document allows, and much that it does not, is answered as it says."""

import subprocess
import sys
import tempfile
from pathlib import Path

# What a schema cannot say: a moment within the model's time, ids that differ within a batch. Such a request fits the
# schema and is refused.
BEYOND_A_SCHEMA = "positive_data_acceptance"


def conforms(document: str, url: str, key: str, *without: str, paths: str = "") -> None:
    """Fails with schemathesis' report unless the service at `url` does what `document` (a file or URL) says; checks in
    `without` are left out. With `paths`, only those that begin so are tried.
    """
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        document,
        "--url",
        url,
        "--header",
        f"X-API-Key: {key}",
        "--checks",
        "all",
        "--exclude-checks",
        ",".join((BEYOND_A_SCHEMA, *without)),
        "--max-examples",
        "50",
        "--seed",
        "7",
        "--no-color",
        *(("--include-path-regex", f"^{paths}") if paths else ()),
    ]
    with tempfile.TemporaryDirectory() as scratch:  # it keeps a diary where it runs
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=scratch)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
