"""Text for a terminal: in colour and as wide as it is, or plain where the stream is a file or knows only ASCII."""
import os
import shutil
import textwrap

from support.program import printable


class Terminal:
    def __init__(self, stream):
        self.coloured = stream.isatty() and "NO_COLOR" not in os.environ
        self.fine = "utf" in (stream.encoding or "").lower()
        self.width = min(shutil.get_terminal_size((80, 24)).columns, 100)

    def paint(self, text: str, colour: str, bold: bool = False) -> str:
        red, green, blue = bytes.fromhex(colour[1:])
        return f"\x1b[{'1;' * bold}38;2;{red};{green};{blue}m{text}\x1b[0m" if self.coloured else text

    def lines(self, text: str, indent: int = 2) -> list[str]:
        """Text of any origin, cut to the width and indented, its later lines a little more."""
        return textwrap.wrap(printable(text), self.width - 2, initial_indent=" " * indent,
                             subsequent_indent=" " * (indent + 2))

    def bar(self, share: float, width: int) -> str:
        eighths = round(share * width * 8)
        return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if self.fine else "#" * round(share * width)

    def gauge(self, name: str, value: float) -> str:
        """A scale from -1 to 1 with a mark."""
        line, mark = ("─", "●") if self.fine else ("-", "o")
        place = round((value + 1) * 4)
        return f"{name:9} {line * place}{mark}{line * (8 - place)} {value:+.2f}"

    def beside(self, parts: list[str]) -> list[str]:
        """Short texts in one line, or in one line each where that is too long."""
        line = "  " + "   ".join(parts)
        return [line] if len(line) <= self.width - 2 else ["  " + part for part in parts]
