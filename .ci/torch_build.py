"""Install torch into the Python that runs this, and keep it from being replaced.

On Linux without an NVIDIA GPU it is a CPU build, so that no gigabytes of CUDA are pulled in. A
torch that is installed and new enough stays. The environment variable TORCH holds pip arguments to
use instead of the choice made here. The version that stands at the end goes to the constraints
file named as the only argument.
"""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 11)
# A local version, which the Python Package Index does not have: no CUDA build can match it.
CPU_BUILD = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NO_CPU_BUILD = f"""\
no CPU build ({CPU_BUILD}) could be installed, and a CUDA build is not taken without a GPU. \
Is there a network, and does {CPU_INDEX} answer? For another build: make setup TORCH='torch ...'"""


def installed() -> str | None:
    """The version of torch in this Python, or None."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def new_enough(version: str) -> bool:
    """Whether that version of torch is one the project works with."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, which a CUDA build of torch could use."""
    if Path("/dev/nvidia0").exists():
        return True
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and b"GPU" in found.stdout


def pip_install(*arguments: str, quiet: bool = False) -> bool:
    """Whether `pip install` succeeded with these arguments."""
    command = [sys.executable, "-m", "pip", "install", *arguments]
    return subprocess.run(command, capture_output=quiet, check=False).returncode == 0


def install_cpu_build() -> bool:
    """Whether the CPU build could be installed, from pip's own sources or else PyTorch's index."""
    if pip_install("--dry-run", "--no-deps", CPU_BUILD, quiet=True):
        return pip_install("--no-deps", CPU_BUILD)
    return pip_install("--no-deps", "--extra-index-url", CPU_INDEX, CPU_BUILD)


def main(constraints: Path) -> str | None:
    """Install torch where it is missing; return what went wrong, if anything did."""
    wanted = os.environ.get("TORCH", "").strip()
    version = installed()
    constraints.write_text("")
    if wanted:
        print(f"== torch: TORCH asks for {wanted}", flush=True)
        if not pip_install(*shlex.split(wanted)):
            return f"pip could not install what TORCH asks for: {wanted}"
    elif version and new_enough(version):
        print(f"== torch: {version} is installed and stays", flush=True)
    elif not sys.platform.startswith("linux"):
        print("== torch: the usual build for this system, with the project", flush=True)
        return None
    elif has_nvidia_gpu():
        print("== torch: an NVIDIA GPU is here: the usual CUDA build, with the project", flush=True)
        return None
    else:
        print(f"== torch: no NVIDIA GPU is here: the CPU build, {CPU_BUILD}", flush=True)
        if not install_cpu_build():
            return NO_CPU_BUILD
    version = installed()
    if not version or not new_enough(version):
        return f"torch>={OLDEST[0]}.{OLDEST[1]} is needed, found {version or 'none'}"
    constraints.write_text(f"torch=={version}\n")
    return None


if __name__ == "__main__":
    problem = main(Path(sys.argv[1]))
    sys.exit(problem and f"make: torch: {problem}")
