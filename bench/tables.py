"""Tables of text."""


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, aligned so that it reads well as plain text; all rows have the same keys."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * width for width in widths], *([row[name] for name in names] for row in rows)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
