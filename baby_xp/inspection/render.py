"""Tokens, numbers, bars and tables as text."""

import itertools
import unicodedata

import numpy as np

from baby_xp.text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a string: its character; a byte that is not ASCII as \\xe9."""
    if tokenizer.kind == "byte" and int(token) > 127:
        return f"\\x{int(token):02x}"
    return tokenizer.decode([int(token)])


def shown(token: str) -> str:
    """A token between quotes, on one line."""
    return f"'{token}'" if token.startswith("\\x") else repr(token)


def glyph(token: str, plain: bool = False) -> str:
    """A token as a single character, for the edge of a map."""
    marks = {" ": "_", "\n": "/", "\t": ">"} if plain else {" ": "␣", "\n": "↵", "\t": "⇥"}
    if token in marks:
        return marks[token]
    single = len(token) == 1 and token.isprintable() and unicodedata.east_asian_width(token) not in "WF"
    return token if single and not unicodedata.combining(token) else "?"


def bar(share: float, width: int, plain: bool = False) -> str:
    """A bar of up to `width` characters, in eighths where the terminal has block characters."""
    if not share > 0:  # NaN has no length either
        return ""
    eighths = round(min(share, 1.0) * width * 8)
    if plain:
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def described(array: np.ndarray) -> list[str]:
    """Shape, mean, standard deviation, least and largest of the finite entries, in words."""
    shape = " x ".join(map(str, array.shape))
    finite = array[np.isfinite(array)].astype(np.float64)
    if not finite.size:
        return [shape, "", "", "", ""]
    return [shape, *map(figure, (np.mean(finite), np.std(finite), np.min(finite), np.max(finite)))]


def figure(number: float) -> str:
    """A number in few characters: with four decimals, or as a power of ten if that is clearer."""
    return f"{number:.4f}" if number == 0 or 1e-3 <= abs(number) < 1e5 else f"{number:.1e}"


def shallow(names: list[str]) -> list[str]:
    """An array's names with that of the model or a block first; none if no such scope names it."""
    own = [name for name in names if "." not in name or (name.startswith("blocks.") and name.count(".") == 2)]
    return [own[0], *(name for name in names if name != own[0])] if own else []


def less_common(first: str, name: str) -> str:
    """A name without the path that it shares with the first one."""
    ours, theirs = first.split(".")[:-1], name.split(".")
    pairs = zip(ours, theirs[:-1], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ".".join(theirs[common - theirs[common].isdecimal() :])  # a block's number alone has no meaning
