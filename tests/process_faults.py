"""Faults that can befall any process of the fault matrix: of the torch host, and of vLLM."""

import os
import signal
import time

SLOW_SECONDS = 3.0


def befall(fault: str) -> None:
    """Let the fault of that name befall this process; others are the matrix's own."""
    match fault:
        case "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(0)
        case "exception in user code":
            raise ValueError("mine")
        case "slow":
            time.sleep(SLOW_SECONDS)
