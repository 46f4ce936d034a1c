"""Code in solutions: the `Writer` that runs a block when its fence closes, and inserts what it printed.

The model writes text and code in the format of `code_format`. At the closing fence the row waits for the sandbox, and
its neighbours go on. Earlier blocks of the same solution run again first, so that nothing is kept between blocks but
the answer itself: a resumed or step-controlled sample, whose prefix holds code, is in the state that it was in.
"""

from collections.abc import Callable
from concurrent.futures import Future

from dpost_lite.problems.code_format import CODE_START, FENCE, inserted_text
from dpost_lite.problems.forcing import PENDING, Insertion, Pending
from dpost_lite.sandbox.base import Ran, Sandbox, keeps_state


class CodeWriter(Insertion):
    """The `Writer` for solutions with code. `text_of` and `encode` as in `Insertion`, `text(ids)` decodes many tokens.

    At most `max_blocks` blocks of a solution are run, none of more than `max_chars` characters. `encode` must take the
    names of special tokens as plain text: it is given what a block printed.
    """

    def __init__(
        self,
        text_of: Callable[[int], str],
        encode: Callable[[str], list[int]],
        text: Callable[[list[int]], str],
        sandbox: Sandbox,
        *,
        max_blocks: int,
        max_chars: int,
    ) -> None:
        super().__init__(text_of, encode)
        self.text = text
        self.sandbox = sandbox
        self.max_blocks = max_blocks
        self.max_chars = max_chars

    def row(self) -> "RowCoder":
        """Return the state machine of a new, empty row."""
        return RowCoder(self)


class RowCoder:
    """The `RowWriter` for solutions with code: it answers when the block has run.

    `num_calculated` counts blocks that ran without an error, `num_refused` the others.
    """

    __slots__ = (
        "_block", "_closed", "_code", "_earlier", "_ids", "_line", "_running", "_window", "_writer", "num_calculated",
        "num_refused",
    )  # fmt: skip

    def __init__(self, writer: CodeWriter) -> None:
        self._writer = writer
        self._line: str | None = ""  # outside of code: the current line while it may become `CODE_START`
        self._code: str | None = None  # the text of an open block
        self._block = ""  # the block that closed last
        self._closed = ""  # the text of its last line's tokens, fence included
        self._ids: list[int] = []  # the tokens of an open block, from the one that completes its first line
        self._window: list[int] = []  # those of its current line
        self._earlier: list[str] = []  # blocks whose variables later ones see
        self._running: Future[Ran] | None = None
        self.num_calculated = 0
        self.num_refused = 0

    def push(self, token_id: int) -> list[int] | Pending | None:
        """Answer the newest token: None to keep it, or PENDING if it closes a block, which then runs."""
        piece = self._writer.text_of(token_id)
        if self._code is not None:
            before = len(self._code)
            self._code += piece
            self._ids.append(token_id)
            self._window.append(token_id)
        elif (self._line is None and "\n" not in piece) or (start := self._started(piece)) is None:
            return None
        else:
            before, self._code, self._ids = 0, start, [token_id]
            self._window = [token_id] if start else []
        return self._look_for_fence(token_id, before)

    def poll(self) -> list[int] | Pending | None:
        """Return the ids that replace the token for which `push` returned PENDING, or PENDING while the block runs."""
        assert self._running is not None
        if not self._running.done():
            return PENDING
        ran, self._running = self._running.result(), None
        if keeps_state(ran, self._writer.sandbox.limits):
            self._earlier.append(self._block)
        return self._insert(ran)

    def _started(self, piece: str) -> str | None:
        """Outside of code, read a piece; return the start of the code if it completes a line that opens a block."""
        text = ("?" if self._line is None else self._line) + piece
        while "\n" in text:
            line, _, text = text.partition("\n")
            if line + "\n" == CODE_START:
                return text
        self._line = text if CODE_START.startswith(text) else None
        return None

    def _look_for_fence(self, token_id: int, before: int) -> list[int] | Pending | None:
        """In code whose text from `before` on is new, look for a line that begins with a fence."""
        assert self._code is not None
        line_start = self._code.rfind("\n", 0, before) + 1
        fence = ("\n" + self._code).find("\n" + FENCE, line_start)
        if fence >= 0:
            return self._close(fence)
        piece = self._code[before:]
        if "\n" in piece:
            self._window = [] if piece.endswith("\n") else [token_id]
        return None

    def _close(self, fence: int) -> list[int] | Pending | None:
        """Run the block that ends before position `fence` of the code."""
        assert self._code is not None
        surplus = len(self._code) - fence - len(FENCE)
        self._block, self._code, self._line = self._whole(self._code[:fence]), None, ""
        text = "".join(map(self._writer.text_of, self._window))
        self._closed = text[: len(text) - surplus]
        max_blocks, max_chars = self._writer.max_blocks, self._writer.max_chars
        if self.num_calculated + self.num_refused >= max_blocks:
            return self._insert(_refused(f"at most {max_blocks} blocks of a solution are run"))
        if len(self._block) > max_chars:
            return self._insert(_refused(f"a block of more than {max_chars} characters is not run"))
        self._running = self._writer.sandbox.run(tuple(self._earlier), self._block)
        return PENDING

    def _whole(self, block: str) -> str:
        """Return the block's text where a character spans tokens, which have no text of their own then."""
        if "\N{REPLACEMENT CHARACTER}" not in block:
            return block
        text = self._writer.text(self._ids)
        code = "\n" + text[text.find("\n") + 1 :]
        fence = code.find("\n" + FENCE)
        return code[1 : fence + 1] if fence >= 0 else block

    def _insert(self, ran: Ran) -> list[int] | None:
        """Return the ids that replace the newest token: those of the fence and of what the block printed.

        Characters that the vocabulary has no tokens for become question marks.
        """
        self.num_refused += bool(ran.error)
        self.num_calculated += not ran.error
        window, self._window = self._window, []
        for output in (ran.text, ran.text.encode("ascii", "replace").decode()):
            if ids := self._writer.replacement(window, self._closed + inserted_text(output)):
                return ids
        return None


def _refused(message: str) -> Ran:
    return Ran(f"RuntimeError: {message}", f"RuntimeError: {message}")
