"""The exception tree of dckt.

Every message says what was given, what was expected, and what to do next. Each class also inherits the
built-in exception that a caller would expect, so ``except ValueError`` keeps working for people who do not
know this tree.
"""

from __future__ import annotations

from collections.abc import Sequence


class DcktError(Exception):
    """Anything that dckt refuses. The command line prints it without a traceback and exits with 2."""


class ConfigError(DcktError, ValueError):
    """A setting that is unknown, of the wrong type, or contradicts another one."""


class CorpusError(DcktError, ValueError):
    """A corpus that cannot be used as it is. Lists every mistake that was found, with its line.

    Attributes:
        mistakes: one line of text for each mistake, in the order of the file.
    """

    shown = 50

    def __init__(self, summary: str, mistakes: Sequence[str] = ()) -> None:
        self.mistakes = tuple(mistakes)
        lines = [summary, *(f"  {mistake}" for mistake in self.mistakes[: self.shown])]
        if len(self.mistakes) > self.shown:
            lines.append(f"  ... and {len(self.mistakes) - self.shown} more")
        super().__init__("\n".join(lines))


class ImageError(DcktError, ValueError):
    """A picture that cannot be decoded, or that is refused before it is decoded."""


class TextError(DcktError, ValueError):
    """A text that cannot be encoded, for example one that holds no known word."""


class TrainingError(DcktError, RuntimeError):
    """Training that cannot go on, for example because a loss is not finite."""


class RunError(DcktError, RuntimeError):
    """A run folder that is missing, half written, damaged, or of another version."""


class BundleError(DcktError, ValueError):
    """A model bundle that cannot be written or opened."""


class BundleVersionError(BundleError):
    """A whole bundle, written in a newer format than this version of dckt reads."""


class BundleCorruptError(BundleError):
    """A bundle with a missing, altered or unreadable file."""


class ParityError(DcktError, RuntimeError):
    """An exported model whose retrieval differs from the PyTorch model's; nothing was written."""


class ProviderError(DcktError, RuntimeError):
    """A device or execution provider that was asked for and is not there."""


class IndexFolderError(DcktError, ValueError):
    """An index folder that cannot be written or opened."""


class IndexVersionError(IndexFolderError):
    """A whole index, written in a newer format than this version of dckt reads."""


class IndexCorruptError(IndexFolderError):
    """An index whose truth (the SQLite file) is damaged. A damaged graph is rebuilt and never raises this."""


class ModelMismatchError(IndexFolderError):
    """An index whose vectors were made by another model than the one that it was opened with."""


class ItemError(DcktError, ValueError):
    """An item or array that is refused: a duplicate id, the wrong width, a number that is not finite."""


class UnknownItemError(DcktError, KeyError):
    """An id that the index does not hold."""

    def __str__(self) -> str:
        """The plain message; KeyError would print it in quotes."""
        return str(self.args[0]) if self.args else ""


class MissingExtraError(DcktError, ImportError):
    """A feature whose optional packages are not installed; the message names the extra."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        super().__init__(
            f"{feature} needs the package {missing!r}, which is not installed; "
            f"install it with: pip install 'dckt[{extra}]'"
        )
