"""Programs that the tests run apart from the project's own environment."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def missing(message: str) -> None:
    """Skips the test, or fails it where CI says that nothing may be skipped."""
    pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Workers of pytest-xdist make a thing once, not at the same time."""
    with (PROJECT / f".venv/{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def environment(name: str, lock: str) -> Path:
    """The programs of a lock in tests/, in an environment of their own: they pin what the project pins differently."""
    folder = PROJECT / ".venv" / name
    with one_at_a_time(name):
        for command in (
            ["venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)],
            ["pip", "sync", "--quiet", "--require-hashes", "--python", str(folder), str(PROJECT / "tests" / lock)],
        ):
            done = subprocess.run([sys.executable, "-m", "uv", *command], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
    return folder / "bin"


def by_go(name: str, version: str, build: Callable[[Path], None]) -> Path:
    """A Go program of this version, which `build` writes where it is told."""
    built = PROJECT / ".venv/go" / version / name
    with one_at_a_time(name):
        if not built.exists():
            if not shutil.which("go"):
                missing(f"{name} is built with go, which is not installed: sudo apt-get install golang-go")
            build(built)
    return built


def go_program(module: str) -> Path:
    """A Go program, built from its module; `PATH/cmd/NAME@VERSION`."""

    def install(built: Path) -> None:
        done = subprocess.run(
            ["go", "install", module],
            env=os.environ | {"GOBIN": str(built.parent)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr

    path, version = module.split("@")
    return by_go(path.split("/")[-1], version, install)


def go_main(module: str, package: str, digest: str) -> Path:
    """A Go program whose module replaces others, which `go install` refuses: built in a copy of the module, which must
    have this digest (h1:...). With an empty cache it takes about ten minutes of two cores.
    """

    def build(built: Path) -> None:
        said = subprocess.run(["go", "mod", "download", "-json", module], capture_output=True, text=True, timeout=600)
        assert said.returncode == 0, said.stdout + said.stderr
        found = json.loads(said.stdout)
        assert found["Sum"] == digest, f"{module} is {found['Sum']}, not {digest}"
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(found["Dir"], copy, dirs_exist_ok=True, copy_function=shutil.copyfile)
            done = subprocess.run(
                ["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", str(built), f"./{package}"],
                cwd=copy,
                env=os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"},
                capture_output=True,
                text=True,
                timeout=5400,
            )
            assert done.returncode == 0, done.stderr[-3000:]

    return by_go(package.split("/")[-1], module.split("@")[1], build)


def terraform_init(folder: Path, configuration: Path) -> dict[str, str]:
    """Initialises a Terraform configuration; the environment for what follows. Its provider comes from a folder of
    plugins, if there is one, or from the registry. Neither is in a package that the tests could install, so only
    GitHub's runner must have both.
    """

    def without(message: str) -> None:
        pytest.fail(message) if os.environ.get("GITHUB_ACTIONS") == "true" else pytest.skip(message)

    if not shutil.which("terraform"):
        without("terraform is not installed: https://developer.hashicorp.com/terraform/install")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "AWS_"))} | {
        "TF_IN_AUTOMATION": "1",
        "CHECKPOINT_DISABLE": "1",
    }
    named = os.environ.get("FRAUD_TERRAFORM_PLUGINS")
    mirrors = [Path(named)] if named else [path.parent for path in Path("/opt").glob("*/registry.terraform.io")]
    if mirrors:
        configuration.write_text(
            f'provider_installation {{\n  filesystem_mirror {{\n    path = "{mirrors[0]}"\n  }}\n}}\n'
        )
        environ["TF_CLI_CONFIG_FILE"] = str(configuration)
    done = subprocess.run(
        ["terraform", f"-chdir={folder}", "init", "-backend=false", "-input=false", "-no-color"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        without(f"terraform init: {done.stderr[-1000:]} (FRAUD_TERRAFORM_PLUGINS names a folder of providers)")
    return environ
