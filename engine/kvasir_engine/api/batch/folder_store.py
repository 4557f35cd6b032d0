"""Files and batches in a folder of this machine, which one process uses at a time."""

from pathlib import Path

from kvasir_engine.api.batch.file_store import FileStore
from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits
from kvasir_engine.api.batch.job_store import JobStore


class FolderStore:
    """See BatchStore."""

    failing = "disk", "disk"

    def __init__(self, path: Path, limits: BatchLimits | None = None) -> None:
        """Raises UserError."""
        limits = limits or BatchLimits()
        self._folder = BatchFolder(path)
        self.files = FileStore(self._folder, limits)
        self.jobs = JobStore(self._folder, self.files, limits)

    async def tidy(self) -> None:
        """See BatchStore: opening the folder did."""

    def close(self) -> None:
        """Unlock the folder for other processes."""
        self._folder.close()
