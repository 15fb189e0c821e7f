"""`python pretend_gpu_worker.py COMMAND ...`: the openunirl command on a pretended GPU (pretend_gpu.py)."""

import sys
from unittest import mock

from accelerate import PartialState

from openunirl import answer, generate
from openunirl.cli import main
from pretend_gpu import OnGpu, pretend_gpu

if __name__ == "__main__":
    with pretend_gpu() as gpu:
        PartialState(cpu=True).device = gpu
        for module in (answer, generate):
            mock.patch.object(module, "best_device", lambda: gpu).start()
        code = main(sys.argv[1:])
    assert OnGpu.made > 1000, f"the command made {OnGpu.made} tensors there: it worked on the CPU"
    sys.exit(code)
