"""Where a stopped run goes on: `longstride resume RUN`."""

from launch.checkpoint import Checkpoint, CheckpointStore
from launch.run_directory import RunDirectory
from models.errors import UserError


def checkpoint_to_resume(directory: RunDirectory) -> Checkpoint | None:
    """The newest whole checkpoint. None: the run was stopped before its first one and starts over, which is said.

    Raises UserError, before anything is written, if the run has saved checkpoints and none is whole (or may have, when
    its summary does not tell): starting over would erase its history.
    """
    checkpoint = CheckpointStore(directory.checkpoints, keep=1).newest()
    if checkpoint is not None:
        return checkpoint
    otherwise = "put back a whole one, or train under another --name; nothing was changed"
    if any(directory.checkpoints.glob("step-*")):
        raise UserError(f"{directory.checkpoints} has no checkpoint that is whole: {otherwise}")
    if not directory.metrics.exists() or not directory.metrics.read_text():
        return None
    if directory.read_summary().get("checkpoint", "unknown") is not None:
        raise UserError(f"{directory.root} has trained, and {directory.checkpoints} has no checkpoint: {otherwise}")
    print(f"{directory.root} was stopped before its first checkpoint: it starts over, its metrics so far are dropped")
    return None
