"""A plugin for nbval: kernels that are reached by sockets in files. Jupyter looks for free TCP ports before a kernel
takes them, and another of the processes that test side by side may be quicker.
"""

import tempfile

import nbval.kernel
from jupyter_client.manager import KernelManager


class FileKernelManager(KernelManager):
    def __init__(self, **given: object) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kernel-")
        super().__init__(transport="ipc", ip=f"{self._folder.name}/socket", **given)


def pytest_configure() -> None:
    nbval.kernel.KernelManager = FileKernelManager
