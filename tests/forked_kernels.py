"""The conftest.py of the solved chapters: their kernels are forks of one process which
has imported what most of them import, and nothing else. It saves each five seconds.
"""

import multiprocessing
import os
import signal
import sys
import time

from jupyter_client.provisioning import local_provisioner

# a kernel sets it before a chapter imports matplotlib
os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "ipykernel.kernelapp",
        "matplotlib.pyplot",
        "torch._dynamo",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


def run_kernel(arguments, folder, environment):
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from ipykernel.kernelapp import launch_new_instance

    sys.argv = ["ipykernel_launcher", *arguments]
    launch_new_instance()


class Kernel:
    """A fork, with what Jupyter asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command, cwd, env, **options):
        launcher = command.index("ipykernel_launcher")
        started = command[launcher + 1 :], cwd, env
        self.process = FORKS.Process(target=run_kernel, args=started)
        self.process.start()
        self.pid = self.process.pid
        # Jupyter ends a kernel's whole group, which must not be that of the tests
        while os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


local_provisioner.launch_kernel = Kernel
