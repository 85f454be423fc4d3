"""Links machine code to an image: bytes that run wherever they lie in memory, without a library that loads them.

A compiler writes an object file: sections, and relocations, the places whose value depends on where sections will
lie. LLVM's own loader resolves them in each process, and takes tens of megabytes. But code that reaches everything
relative to its own address needs to know distances alone, and these are fixed once the sections lie one after the
other. Processes then share the pages of one file, which nobody writes to: kernels have no variables of their own.

Formats: System V ABI, ELF-64; for the relocations, its AMD64 supplement.
"""

import struct
from typing import NamedTuple

PROGBITS, SYMBOLS, RELOCATIONS, NOBITS = 1, 2, 4, 8
"""Types of sections; what lies in one of NOBITS is all zeros."""
ALLOCATED = 2
"""The flag of sections that a program needs in memory."""
DISTANCES = 2, 4
"""R_X86_64_PC32 and R_X86_64_PLT32: from this place to a symbol, in 32 bits."""
GLOBAL = 1
"""How a symbol is bound that others may use."""

ZEROS = """
define ptr @memset(ptr %to, i32 %byte, i64 %size) {
  %low = trunc i32 %byte to i8
  call { ptr, i64 } asm sideeffect "rep stosb", "={di},={cx},{al},0,1,~{memory}"(i8 %low, ptr %to, i64 %size)
  ret ptr %to
}
"""
"""The function of the C library that LLVM calls to fill memory, which an image must have itself."""


class Section(NamedTuple):
    """A section header."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


class Symbol(NamedTuple):
    """An entry of a table of symbols. value: the place in its section."""

    name: int
    binding: int
    other: int
    section: int
    value: int
    size: int


def linked(elf: bytes) -> tuple[bytes, dict[str, int]]:
    """An object file for x86-64 -> the image, and the place of each global symbol in it.

    Raises ValueError for what cannot be in an image: a symbol without a place, a relocation that needs an address.
    """
    sections = _sections(elf)
    image, places = bytearray(), {}
    for number, section in enumerate(sections):
        if section.flags & ALLOCATED and section.type in (PROGBITS, NOBITS):
            image += bytes(-len(image) % max(1, section.align))
            places[number] = len(image)
            image += _content(elf, section) if section.type == PROGBITS else bytes(section.size)
    (table,) = (section for section in sections if section.type == SYMBOLS)
    names, symbols = _content(elf, sections[table.link]), _symbols(elf, table)

    def place_of(symbol: Symbol) -> int:
        if symbol.section not in places:
            raise ValueError(f"{_text(names, symbol.name)} has no place in an image")
        return places[symbol.section] + symbol.value

    for section in sections:
        if section.type == RELOCATIONS and section.info in places:
            for offset, info, addend in struct.iter_unpack("<QQq", _content(elf, section)):
                place, symbol = places[section.info] + offset, symbols[info >> 32]
                if info % 2**32 not in DISTANCES:
                    raise ValueError(f"an image cannot have relocations of type {info % 2**32}")
                struct.pack_into("<i", image, place, place_of(symbol) + addend - place)
    exported = (one for one in symbols if one.binding >> 4 == GLOBAL and one.section in places)
    return bytes(image), {_text(names, one.name): place_of(one) for one in exported}


def _sections(elf: bytes) -> list[Section]:
    (begin,), (size, number) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    return [Section(*struct.unpack_from("<IIQQQQIIQQ", elf, begin + size * i)) for i in range(number)]


def _symbols(elf: bytes, table: Section) -> list[Symbol]:
    return [Symbol(*fields) for fields in struct.iter_unpack("<IBBHQQ", _content(elf, table))]


def _content(elf: bytes, section: Section) -> bytes:
    return elf[section.offset : section.offset + section.size]


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(0, at)].decode()
