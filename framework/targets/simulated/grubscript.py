"""GRUB's scripting language, as far as a boot script uses it, on a simulated drive.

`images/boot/grub.cfg` is run as it stands, so that what a simulated device does with its variables
is what the real one is told to do. The language is that of the GRUB manual's chapters "Writing full
configuration files directly" and "Commands": words with quotes and variables, functions, `if`, and
the commands below. Whatever is not known here is an error when the script is read or run, never
passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

_TOKEN: Final = re.compile(
    r"""(?P<space>[ \t]+|\\\n)|(?P<comment>\#[^\n]*)|(?P<end>[;\n])"""
    r"""|(?P<word>(?:[^\s;"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+)"""
)
_PIECE: Final = re.compile(
    r"""'(?P<plain>[^']*)'|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>(?:[^"'\\]|\\.)+)"""
)
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+|\?)\}|(\w+|\?))")
_KEYWORDS: Final = frozenset({"if", "then", "elif", "else", "fi", "function", "{", "}"})
_DEEPEST: Final = 50


class ScriptError(ValueError):
    """The script can't be read, or uses what is not known here."""


class Return(Exception):  # noqa: N818 - no error
    """`return`: the end of a function."""

    def __init__(self, status: bool) -> None:
        super().__init__()
        self.status = status


class Part(NamedTuple):
    """A part of a word: text, or a variable's name; `quoted` parts are never split."""

    text: str
    variable: bool
    quoted: bool


Word = tuple[Part, ...]


class Simple(NamedTuple):
    """A command: its words."""

    words: tuple[Word, ...]


class If(NamedTuple):
    """`if`: conditions with what follows them, and what follows when none is true."""

    branches: tuple[tuple[tuple[Statement, ...], tuple[Statement, ...]], ...]
    otherwise: tuple[Statement, ...]


class Function(NamedTuple):
    """`function`: its name and body."""

    name: str
    body: tuple[Statement, ...]


Statement = Simple | If | Function
Command = Callable[[Sequence[str]], bool]
"""A command: it gets its arguments and says whether it succeeded."""


class Script:
    """A script that has been read."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._at = 0
        self.statements = self._block(())
        if self._at < len(self._tokens):
            raise ScriptError(f"{self._tokens[self._at]!r} is not expected there")

    def _block(self, ends: tuple[str, ...]) -> tuple[Statement, ...]:
        found: list[Statement] = []
        while self._at < len(self._tokens):
            word = self._tokens[self._at]
            if word in ";\n":
                self._at += 1
            elif word in ends:
                break
            elif word == "if":
                found.append(self._if())
            elif word == "function":
                name = self._tokens[self._at + 1]
                self._at += 2
                self._expect("{")
                found.append(Function(name, self._block(("}",))))
                self._expect("}")
            elif word in _KEYWORDS:
                raise ScriptError(f"{word!r} is not expected there")
            else:
                found.append(self._simple())
        return tuple(found)

    def _if(self) -> If:
        branches = []
        otherwise: tuple[Statement, ...] = ()
        self._expect("if")
        while True:
            condition = self._block(("then",))
            self._expect("then")
            branches.append((condition, self._block(("elif", "else", "fi"))))
            end = self._next()
            if end == "else":
                otherwise = self._block(("fi",))
                end = self._next()
            if end == "fi":
                return If(tuple(branches), otherwise)

    def _simple(self) -> Simple:
        words = []
        while self._at < len(self._tokens) and self._tokens[self._at] not in ";\n":
            words.append(_word(self._next()))
        return Simple(tuple(words))

    def _next(self) -> str:
        if self._at >= len(self._tokens):
            raise ScriptError("the script ends within an if or a function")
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, word: str) -> None:
        if (found := self._next()) != word:
            raise ScriptError(f"{word!r} is expected, not {found!r}")


class Interpreter:
    """Runs a script: `commands` are what it can call beside `set`, `unset`, `[`, and `return`."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self.variables: dict[str, str] = {}
        self._commands = {**commands, "set": self._set, "unset": self._unset, "[": self._bracket}
        self._functions: dict[str, tuple[Statement, ...]] = {}
        self._arguments: Sequence[str] = ()
        self._status = True
        self._depth = 0

    def run(self, script: Script) -> None:
        """Run the whole script. Raises ScriptError for what is not known here."""
        self._all(script.statements)

    def _all(self, statements: tuple[Statement, ...]) -> bool:
        for statement in statements:
            if isinstance(statement, Simple):
                self._status = self._call(statement)
            elif isinstance(statement, If):
                self._status = self._if(statement)
            else:
                self._functions[statement.name] = statement.body
                self._status = True
        return self._status

    def _if(self, statement: If) -> bool:
        for condition, then in statement.branches:
            if self._all(condition):
                return self._all(then)
        # GRUB's "if" that does nothing has succeeded.
        return self._all(statement.otherwise) if statement.otherwise else True

    def _call(self, command: Simple) -> bool:
        words = [text for word in command.words for text in self._expand(word)]
        if not words:
            return True
        name, *arguments = words
        if name == "return":
            raise Return(arguments[0] == "0" if arguments else self._status)
        if name in self._functions:
            return self._function(self._functions[name], arguments)
        known = self._commands.get(name)
        if known is None:
            raise ScriptError(f"the command {name!r} is not known here")
        return known(arguments)

    def _function(self, body: tuple[Statement, ...], arguments: Sequence[str]) -> bool:
        if self._depth == _DEEPEST:
            raise ScriptError("functions call each other without an end")
        before, self._arguments = self._arguments, arguments
        self._depth += 1
        try:
            return self._all(body)
        except Return as returned:
            return returned.status
        finally:
            self._depth -= 1
            self._arguments = before

    def _expand(self, word: Word) -> list[str]:
        """The words that one word becomes: none if it is an unquoted variable without a value."""
        found: list[str] = []
        joined = False
        for part in word:
            text = self._value(part.text) if part.variable else part.text
            if part.quoted or not part.variable:
                pieces = [text]
            else:
                pieces = text.split()
                if not pieces:
                    continue
            if joined:
                found[-1] += pieces[0]
                found += pieces[1:]
            else:
                found += pieces
            joined = True
        return found

    def _value(self, name: str) -> str:
        if name.isdigit():
            number = int(name)
            return self._arguments[number - 1] if 0 < number <= len(self._arguments) else ""
        if name == "?":
            return str(int(not self._status))
        return self.variables.get(name, "")

    def _set(self, arguments: Sequence[str]) -> bool:
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if not equals:
                raise ScriptError(f"set {argument}: there is no =")
            self.variables[name] = value
        return True

    def _unset(self, arguments: Sequence[str]) -> bool:
        for name in arguments:
            self.variables.pop(name, None)
        return True

    def _bracket(self, arguments: Sequence[str]) -> bool:
        if arguments[-1:] != ["]"]:
            raise ScriptError("a [ without its ]")
        return _test(list(arguments[:-1]))


def _test(arguments: list[str]) -> bool:
    """`[ ... ]`: -a binds closer than -o."""
    for join, how in (("-o", any), ("-a", all)):
        if join in arguments:
            parts: list[list[str]] = [[]]
            for argument in arguments:
                if argument == join:
                    parts.append([])
                else:
                    parts[-1].append(argument)
            return how(_test(part) for part in parts)
    if arguments[:1] == ["!"]:
        return not _test(arguments[1:])
    if len(arguments) == 3 and arguments[1] in _COMPARED:
        return _COMPARED[arguments[1]](arguments[0], arguments[2])
    if len(arguments) == 2 and arguments[0] in ("-n", "-z"):
        return bool(arguments[1]) == (arguments[0] == "-n")
    if len(arguments) < 2:
        return bool(arguments and arguments[0])
    raise ScriptError(f"[ {' '.join(arguments)} ] is not known here")


def _number(text: str) -> int:
    match = re.match(r"\s*-?\d+", text)
    return int(match[0]) if match else 0


_COMPARED: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "=": lambda one, two: one == two,
    "==": lambda one, two: one == two,
    "!=": lambda one, two: one != two,
    "-eq": lambda one, two: _number(one) == _number(two),
    "-ne": lambda one, two: _number(one) != _number(two),
    "-ge": lambda one, two: _number(one) >= _number(two),
    "-gt": lambda one, two: _number(one) > _number(two),
    "-le": lambda one, two: _number(one) <= _number(two),
    "-lt": lambda one, two: _number(one) < _number(two),
}


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ScriptError(f"line {text.count(chr(10), 0, at) + 1} can't be read")
        at = match.end()
        if match["end"] or match["word"]:
            found.append(match[0])
    return found


def _word(word: str) -> Word:
    parts: list[Part] = []
    for piece in _PIECE.finditer(word):
        if piece["plain"] is not None:
            parts.append(Part(piece["plain"], False, True))
            continue
        quoted = piece["quoted"] is not None
        text = piece["quoted"] if quoted else piece["bare"]
        at = 0
        for variable in _VARIABLE.finditer(text):
            parts += _text(text[at : variable.start()], quoted)
            parts.append(Part(variable[1] or variable[2], True, quoted))
            at = variable.end()
        rest = text[at:]
        # An empty pair of quotes is a word, too.
        parts += _text(rest, quoted) if rest or not quoted or at else [Part("", False, True)]
    return tuple(parts)


def _text(text: str, quoted: bool) -> list[Part]:
    return [Part(re.sub(r"\\(.)", r"\1", text), False, quoted)] if text else []
