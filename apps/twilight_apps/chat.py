"""``hf-twilight chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from . import tables
from .chat_partners import Partner, Usage
from .session import USER_ERRORS, message

HELP = """/new            begin again
/system TEXT    say what the model shall be, and begin again
/undo           take back the last question and its answer
/exit           leave (or Ctrl-D)"""


@dataclass
class Chat:
    """A conversation.

    Args:
        partner: who answers.
        system: what it shall be; None for its own default.
    """

    partner: Partner
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> int:
        """Talk until the person leaves, or input ends.

        Returns:
            Answers that failed.
        """
        console, failures = tables.output(), 0
        is_interactive = sys.stdin.isatty()
        if is_interactive:
            with suppress(ImportError):  # importing it gives input() its history, where there is one
                import readline  # noqa: F401

            console.print(f"[bold]{self.partner.name}[/] [dim]at {self.partner.place}[/]", highlight=False)
            console.print("[dim]/help lists commands. Ctrl-C stops an answer, Ctrl-D leaves.[/]\n")
        while (text := self._read(console, is_interactive)) is not None:
            if text.startswith("/"):
                if not self._obey(console, text):
                    break
            elif text:
                failures += not self._ask(console, text)
        return failures

    def _read(self, console: Console, is_interactive: bool) -> str | None:
        """Return the next line; None at the end."""
        try:
            if is_interactive:
                return input("you > ").strip()  # no colours: readline would count them as columns
            line = sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None
        if line:
            console.print(Text.assemble(("you", "bold cyan"), (" > ", "dim"), line.strip()), soft_wrap=True)
        return line.strip() if line else None

    def _obey(self, console: Console, text: str) -> bool:
        """Follow a command; return whether the conversation goes on."""
        command, _, argument = text.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/new":
            self.turns.clear()
        elif command == "/undo":
            del self.turns[-2:]
        elif command == "/system" and argument.strip():
            self.system = argument.strip()
            self.turns.clear()
        else:
            console.print(HELP, style="dim", highlight=False, markup=False)
            return True
        console.print(f"{len(self.turns) // 2} earlier answers", style="dim", highlight=False)
        return True

    def _ask(self, console: Console, text: str) -> bool:
        """Ask and print the answer as it comes; return whether there was one."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = {"role": "user", "content": text}
        console.print(Text.assemble((self.partner.name, "bold green"), (" > ", "dim")), end="")
        start, first, parts, note = time.perf_counter(), 0.0, [], ""
        pieces = self.partner.answer([*system, *self.turns, question])
        try:
            for piece in pieces:
                first = first or time.perf_counter()
                parts.append(piece)
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            note = "stopped; "
        except (*USER_ERRORS, RuntimeError) as error:
            console.print(f"error: {message(error)}", style="red", markup=False, highlight=False, soft_wrap=True)
            return False
        finally:
            if hasattr(pieces, "close"):
                pieces.close()  # cancels what was not read
        self.turns += [question, {"role": "assistant", "content": "".join(parts)}]
        console.print()
        if first:
            console.print(
                f"{note}{_speed(self.partner.usage, start, first, len(parts))}\n", style="dim", highlight=False
            )
        return True


def _speed(usage: Usage | None, start: float, first: float, num_pieces: int) -> str:
    """Say how fast an answer came; without the partner's usage a piece counts as a token."""
    tokens = num_pieces if usage is None else usage.answer_tokens
    seconds = time.perf_counter() - first
    text = f"{tokens} tokens, first after {first - start:.2f} s"
    if tokens > 1 and seconds > 0:
        text += f", then {(tokens - 1) / seconds:.1f} a second"
    if usage is not None and usage.cached_tokens:
        text += f"; {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached"
    return text
