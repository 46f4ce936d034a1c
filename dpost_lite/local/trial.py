"""Child process that tests a GGUF file: `python -m dpost_lite.local.trial FILE on|off`, with extra buffers on or off.

It evaluates the text from standard input as a prompt, then one more token as in decoding, and prints the text's token
ids as its last line. Without arguments it only loads llama.cpp and prints the processor features it was built for.
"""

import math
import sys
from pathlib import Path

from dpost_lite.errors import DpostError
from dpost_lite.local.llama import open_gguf, read_prompt

NUM_CONTEXT, NUM_PROMPT = 128, 64  # tokens


def probe(path: Path, text: str, *, extra_buffers: bool) -> list[int]:
    """Evaluate `text` and one more token; return the token ids of `text`. Raises RuntimeError for non-finite logits."""
    import llama_cpp

    llm = open_gguf(path, extra_buffers=extra_buffers, n_ctx=NUM_CONTEXT)
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    for new in (read_prompt(llm, ids[:NUM_PROMPT]), ids[:1]):
        llm.eval(new)
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        if not all(math.isfinite(logits[i]) for i in range(llm.n_vocab())):
            raise RuntimeError("the logits contain NaN or infinity")
    llm.close()
    return ids


def main() -> None:
    if len(sys.argv) == 1:
        import llama_cpp

        print(llama_cpp.llama_print_system_info().decode(errors="replace"))
        return
    path, extra_buffers = sys.argv[1:]
    try:
        ids = probe(Path(path), sys.stdin.buffer.read().decode(), extra_buffers=extra_buffers == "on")
    except Exception as error:  # one line for the parent's error message
        sys.exit(f"{error}" if isinstance(error, DpostError) else f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    print("\n" + " ".join(map(str, ids)), flush=True)


if __name__ == "__main__":
    main()
