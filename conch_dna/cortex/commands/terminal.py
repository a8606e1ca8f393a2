"""A chat with neurons in a terminal, or line by line through a pipe.

Knows a suite, what it answers and what is recorded of it; nothing of how answers come about. To add
a command: a method of `TerminalChat` and its entry in COMMANDS.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from conch_dna.cortex.answer import Answer
from conch_dna.cortex.commands.status import who_answered
from conch_dna.cortex.neuron import Chat, CortexSuite, Delta
from conch_dna.cortex.options import AskOptions
from conch_dna.errors import ConchError
from conch_dna.retraining.pipeline import TrainingPipeline
from conch_dna.training.settings import EGO

# What could move the cursor, recolour the screen or ring: an answer is text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
OWN = "own"


def visible(text: str) -> str:
    """Text without characters that steer a terminal."""
    return _CONTROL.sub("", text)


class Screen:
    """Where answers and remarks go: answers to standard output, remarks to standard error.

    Attributes:
        out: For answers.
        notes: For all else.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.out: Console = Console(highlight=False, soft_wrap=True)
        self.notes: Console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A part of an answer, as it is where nobody watches."""
        shown = visible(text) if self.out.is_terminal else text
        self.out.file.write(shown)
        self.out.file.flush()

    def note(self, text: str) -> None:
        """A dim remark on a line of its own."""
        self.notes.print(visible(text), style="dim", markup=False)

    def show(self, deltas: Iterable[Delta], waiting: str) -> Answer:
        """Say an answer as it comes, and then who gave it.

        Args:
            deltas: The answer's parts.
            waiting: A remark that stands until the first one, where somebody watches.
        """
        answer = None
        begun = False
        try:
            with self.notes.status(waiting) as status:
                for delta in deltas:
                    if delta.text:
                        status.stop()
                        begun = True
                        self.say(delta.text)
                    answer = delta.answer
        finally:
            # Whatever comes next begins on a line of its own.
            if begun:
                self.say("\n")
        assert answer is not None
        if not begun:
            self.say("\n")
        self.note(who_answered(answer))
        return answer


@dataclass
class Exchange:
    """The newest exchange, which can be judged.

    Attributes:
        conversation: Up to the answer.
        answer: The answer to it.
        problem: What is wrong with the answer, in words.
    """

    conversation: list[dict[str, str]]
    answer: Answer
    problem: str = ""


class TerminalChat:
    """A conversation with commands.

    Args:
        suite: Who answers.
        domain: Whose neuron comes first.
        options: Of every question.
        pipeline: Where verdicts are recorded.
        screen: Where everything is shown.
    """

    def __init__(
        self,
        suite: CortexSuite,
        domain: str,
        options: AskOptions,
        *,
        pipeline: TrainingPipeline,
        screen: Screen,
    ) -> None:
        self.suite = suite
        self.pipeline = pipeline
        self.screen = screen
        self.chat = Chat(suite[domain], options)
        self.last: Exchange | None = None
        self._notes_shown = 0

    def run(self) -> None:
        """Answer line by line until the input or the user ends."""
        read = self._reader()
        self._tell_notes()
        while True:
            answering = False
            try:
                line = read().strip()
                answering = True
                if self.take(line):
                    return
            except EOFError:
                return
            except ConchError as error:
                self.screen.note(f"error: {error}")
            except KeyboardInterrupt:
                self.screen.note(
                    "stopped; the conversation is as it was before the question"
                    if answering
                    else "/quit or the end of input (Ctrl-D) ends the chat"
                )
            self._tell_notes()

    def _reader(self) -> Callable[[], str]:
        """What gives the next line: with a line editor where a person types."""
        if not (sys.stdin.isatty() and self.screen.out.is_terminal):
            return _piped_line
        try:
            import readline
        except ImportError:
            pass
        else:
            readline.set_completer_delims(" ")
            readline.set_completer(self.complete)
            readline.parse_and_bind("tab: complete")
        self.screen.note(f"{self.chat.neuron.domain} answers; /help shows the commands")
        return lambda: input(f"{self.chat.neuron.domain}> ")

    def complete(self, text: str, number: int) -> str | None:
        """The `number`-th word that begins with a text, for the line editor."""
        words = [f"/{name}" for name in COMMANDS] if text.startswith("/") else self.suite.domains
        fitting = [word for word in words if word.startswith(text)]
        return fitting[number] if number < len(fitting) else None

    def _tell_notes(self) -> None:
        for note in self.suite.notes[self._notes_shown :]:
            self.screen.note(note)
        self._notes_shown = len(self.suite.notes)

    def take(self, line: str) -> bool:
        """Answer a question or do a command.

        Returns:
            Whether the chat is at its end.

        Raises:
            ConchError: It cannot be done; the conversation is as it was.
        """
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._ask(line.removeprefix("/"))
            return False
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return True
        if name not in COMMANDS:
            raise ConchError(f"there is no /{name}: /help shows the commands")
        COMMANDS[name].do(self, rest.strip())
        return False

    def _ask(self, text: str, **changes: str) -> None:
        conversation = [*self.chat.messages, {"role": "user", "content": text}]
        waiting = f"{EGO if changes else self.chat.neuron.domain} answers"
        answer = self.screen.show(self.chat.say(text, **changes), waiting)
        self.last = Exchange(conversation, answer)

    # Commands

    def _help(self, rest: str) -> None:
        for name, command in {**COMMANDS, "quit": _QUIT}.items():
            self.screen.note(f"{f'/{name} {command.takes}'.rstrip():<18} {command.help}")
        self.screen.note("//text asks a question that begins with a slash")

    def _domain(self, rest: str) -> None:
        if not rest:
            raise ConchError(f"name one of {', '.join(self.suite.domains)}: /domain NAME")
        self.chat.neuron = self.suite[rest]
        self.screen.note(f"{rest} answers from here on; it knows what was said")

    def _domains(self, rest: str) -> None:
        for row in self.suite.status():
            here = "*" if row["domain"] == self.chat.neuron.domain else " "
            form = "JSON" if row["structured"] else "text"
            sure = "calibrated" if row["calibrated"] else "not calibrated"
            self.screen.note(f"{here} {row['domain']}: {form}, {sure}, {row['adapter']}")

    def _system(self, rest: str) -> None:
        if rest:
            system = None if rest == OWN else rest
            self.chat.options = replace(self.chat.options, system=system)
        system = self.chat.options.system
        own = self.suite.domain(self.chat.neuron.domain).system or "none"
        self.screen.note(f"the domain's own: {own}" if system is None else system)

    def _reset(self, rest: str) -> None:
        self.chat.messages = []
        self.last = None
        self.screen.note("a new conversation")

    def _ego(self, rest: str) -> None:
        last = self._newest()
        if self.suite.ego is None:
            raise ConchError("there is no EGO to ask: start the chat with --ego MODEL")
        before = self.chat.messages
        self.chat.messages = list(last.conversation[:-1])
        try:
            self._ask(last.conversation[-1]["content"], hand_over="always")
        except (ConchError, KeyboardInterrupt):
            self.chat.messages = before
            raise

    def _good(self, rest: str) -> None:
        last = self._newest()
        answer = last.answer
        new = self.pipeline.record_success(
            answer.domain,
            last.conversation,
            answer.text,
            confidence=answer.confidence,
            by=answer.answered_by,
            finish_reason=answer.finish_reason,
        )
        self._recorded(new, "a good answer")

    def _bad(self, rest: str) -> None:
        last = self._newest()
        if not rest:
            raise ConchError("say what is wrong with the answer: /bad PROBLEM")
        last.problem = rest
        if self.suite.ego is None:
            raise ConchError(
                "there is no EGO to correct the answer: say yourself what should have been said "
                "with /better TEXT, or start the chat with --ego MODEL"
            )
        with self.screen.notes.status("EGO corrects the answer"):
            correction = self.suite.ego.correct_failure(
                last.answer.domain, last.conversation, last.answer.text, rest
            )
        self.screen.say(f"{correction.text}\n")
        self._correct(last, correction.text, correction.finish_reason)

    def _better(self, rest: str) -> None:
        last = self._newest()
        if not rest:
            raise ConchError("say what should have been said: /better TEXT")
        self._correct(last, rest, "stop")

    def _correct(self, last: Exchange, better: str, finish_reason: str) -> None:
        answer = last.answer
        new = self.pipeline.record_correction(
            answer.domain,
            last.conversation,
            answer.text,
            better,
            problem=last.problem,
            confidence=answer.confidence,
            by=answer.answered_by,
            finish_reason=finish_reason,
        )
        # The conversation goes on from what should have been said.
        self.chat.messages = [*last.conversation, {"role": "assistant", "content": better}]
        self._recorded(new, "a correction")

    def _newest(self) -> Exchange:
        if self.last is None:
            raise ConchError("there is no answer yet: ask something first")
        return self.last

    def _recorded(self, new: bool, what: str) -> None:
        assert self.last is not None
        domain = self.last.answer.domain
        outcome = f"recorded as {what} of {domain}" if new else "that is recorded already"
        self.screen.note(f"{outcome}; {self.pipeline.should_retrain(domain).reason}")


def _piped_line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return decoded(line, "a line of standard input")


def decoded(content: bytes, what: str) -> str:
    """Bytes as text.

    Args:
        content: UTF-8.
        what: They are, for the message.

    Raises:
        ConchError: They are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConchError(f"{what} is not UTF-8 ({error}): convert it") from error


class Command(NamedTuple):
    """What a command takes, what it does in words, and what does it."""

    takes: str
    help: str
    do: Callable[[TerminalChat, str], None]


_QUIT = Command("", "end the chat", lambda chat, rest: None)
COMMANDS = {
    "domain": Command("NAME", "let another neuron answer", TerminalChat._domain),
    "domains": Command("", "show all neurons", TerminalChat._domains),
    "system": Command(
        "[TEXT]", f"another system prompt; {OWN} for the domain's", TerminalChat._system
    ),
    "ego": Command("", "let EGO answer the last question", TerminalChat._ego),
    "good": Command("", "record the last answer as a good one", TerminalChat._good),
    "bad": Command("PROBLEM", "let EGO correct it, and record that", TerminalChat._bad),
    "better": Command("TEXT", "record what should have been said", TerminalChat._better),
    "reset": Command("", "begin a new conversation", TerminalChat._reset),
    "help": Command("", "show the commands", TerminalChat._help),
}
