"""Samplers of the reverse process, by the names that `SchedulerConfig.name` takes."""

from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.schedulers.ddim import DDIM
from models.diffusion.schedulers.ddpm import DDPM
from models.diffusion.schedulers.dpm_solver import DPMSolver
from models.diffusion.schedulers.euler import Euler
from models.diffusion.schedulers.pndm import PNDM
from models.diffusion.schedulers.scheduler import Scheduler

__all__ = ["DDIM", "DDPM", "PNDM", "SCHEDULERS", "DPMSolver", "Euler", "Scheduler", "make_scheduler"]

SCHEDULERS: dict[str, type[Scheduler]] = {"ddpm": DDPM, "ddim": DDIM, "pndm": PNDM, "euler": Euler, "dpm++": DPMSolver}


def make_scheduler(config: SchedulerConfig, steps: int) -> Scheduler:
    """A scheduler for one pass of `steps` steps. Raises UserError if the training schedule has fewer."""
    return SCHEDULERS[config.name](config, steps)
