"""The child process that quantises a GGUF file and tries it: `python -m dpost_lite.local.quantize SRC DST TYPE`.

ggml ends the whole process on many errors and prints without end, hence a child. With TYPE f16, DST is only tried.
It reads a text from standard input and prints, as its last line, the token ids that llama.cpp makes of it.
"""

import ctypes
import math
import os
import sys


def quantize(source: str, target: str, quant: str) -> None:
    """Quantise the GGUF file `source` into `target`. Raises RuntimeError if llama.cpp reports failure."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    params.nthread = os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def probe(path: str, text: str) -> list[int]:
    """Return the token ids of `text`, after one forward over them. Raises RuntimeError if the logits are not finite."""
    import llama_cpp

    llm = llama_cpp.Llama(path, n_ctx=128, n_batch=64, verbose=False)
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    llm.eval(ids[:64])
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    if not all(math.isfinite(logits[i]) for i in range(llm.n_vocab())):
        raise RuntimeError("the file answers with NaN or infinity")
    llm.close()
    return ids


def main() -> None:
    source, target, quant = sys.argv[1:]
    text = sys.stdin.buffer.read().decode()
    if quant != "f16":
        quantize(source, target, quant)
    ids = probe(target, text)
    sys.stderr.flush()
    print("\n" + " ".join(map(str, ids)), flush=True)


if __name__ == "__main__":
    main()
