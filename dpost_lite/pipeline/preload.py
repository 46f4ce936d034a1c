"""What a CPU's stages import, for the server that they are forked from (pipeline/worker.py); nothing else imports this.

What cannot be imported is told by the stage that needs it.
"""

import contextlib
import importlib
import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server too, while it imports; the command decides

for _name in ("torch", "bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"):
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
