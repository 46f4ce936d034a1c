"""Imports shared by CPU stages, for the server they are forked from (worker.py); nothing else imports this module.

Import errors surface in the stage that needs the package.
"""

import contextlib
import importlib
import signal

from dpost_lite.system.quiet import stderr_to

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server too, while it imports; the command decides

for _name in ("torch", "bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"):
    with contextlib.suppress(Exception), stderr_to():
        importlib.import_module(_name)
