"""The same blocks as a PDF: A4 pages, the standard fonts, tables that break across pages, inner links.

Guarantees: no fonts, scripts or outside references are embedded; the same blocks give the same bytes; every
link leads to a place in the document. Records are listed by their line only; in full they are in the HTML.
It sets no accessibility tags.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.ledger.document import (
    COLOURS,
    Block,
    Cell,
    Chart,
    Heading,
    Link,
    Mark,
    Record,
    Table,
    Text,
    chart_ticks,
    place_labels,
)

_WIDTH, _HEIGHT, _MARGIN = 595.0, 842.0, 48.0
_BODY = _WIDTH - 2 * _MARGIN
_HELVETICA = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556,
    556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778,
    722, 278, 500, 667, 556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278,
    278, 278, 469, 556, 333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556,
    556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
)  # fmt: skip
_HELVETICA_BOLD = (
    278, 333, 474, 556, 556, 889, 722, 238, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556,
    556, 556, 556, 556, 556, 556, 333, 333, 584, 584, 584, 611, 975, 722, 722, 722, 722, 667, 611, 778,
    722, 278, 556, 722, 611, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 333,
    278, 333, 584, 556, 333, 556, 611, 556, 611, 556, 333, 611, 611, 278, 278, 556, 278, 889, 611, 611,
    611, 611, 389, 556, 333, 611, 556, 778, 556, 556, 500, 389, 280, 389, 584,
)  # fmt: skip
_TONES = {"good": "#1d6b3c", "bad": "#a61b1b", "open": "#7a5b00"}
_INK, _LINK, _FAINT = "#1c2430", "#0b5fa5", "#8a93a0"


@dataclass(frozen=True)
class _Word:
    text: str
    colour: str = _INK
    bold: bool = False
    anchor: str = ""


@dataclass
class _Page:
    commands: list[str] = field(default_factory=list)
    links: list[tuple[float, float, float, float, str]] = field(default_factory=list)


@dataclass
class _Canvas:
    """Pages being filled from the top; `y` is where the next line goes."""

    pages: list[_Page] = field(default_factory=lambda: [_Page()])
    y: float = _HEIGHT - _MARGIN
    anchors: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def page(self) -> _Page:
        return self.pages[-1]

    def need(self, height: float) -> bool:
        """Start a page unless `height` still fits; says whether it did start one."""
        if self.y - height >= _MARGIN:
            return False
        self.pages.append(_Page())
        self.y = _HEIGHT - _MARGIN
        return True

    def mark(self, anchor: str) -> None:
        if anchor:
            self.anchors.setdefault(anchor, (len(self.pages) - 1, self.y))

    def words(self, x: float, y: float, words: Sequence[_Word], size: float) -> None:
        for word in words:
            width = _width(word.text, size, bold=word.bold)
            font = "F2" if word.bold else "F1"
            place = f"/{font} {size:g} Tf {x:.2f} {y:.2f} Td"
            self.page.commands.append(f"BT {_rgb(word.colour)} rg {place} ({_escaped(word.text)}) Tj ET")
            if word.anchor:
                self.page.links.append((x, y - 2, x + width, y + size, word.anchor))
            x += width + _width(" ", size)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 0.5) -> None:
        if len(points) > 1:
            path = " ".join(f"{x:.2f} {y:.2f} {'l' if i else 'm'}" for i, (x, y) in enumerate(points))
            self.page.commands.append(f"{_rgb(colour)} RG {width:g} w {path} S")


def render_pdf(title: str, blocks: Sequence[Block]) -> bytes:
    """Render blocks as a PDF 1.4 document."""
    canvas = _Canvas()
    for block in blocks:
        if isinstance(block, Heading):
            _heading(canvas, block)
        elif isinstance(block, Text):
            _paragraph(canvas, block.parts, 9.5)
            canvas.y -= 4
        elif isinstance(block, Table):
            _table(canvas, block)
        elif isinstance(block, Chart):
            _chart(canvas, block)
        else:
            _record(canvas, block)
    return _document(title, canvas)


def _heading(canvas: _Canvas, block: Heading) -> None:
    size = {1: 19.0, 2: 13.5}.get(block.level, 10.5)
    before = {1: 0.0, 2: 18.0}.get(block.level, 10.0)
    canvas.need(before + size + 60)
    canvas.y -= before + size
    canvas.mark(block.anchor)
    for line in _wrap([_Word(word, bold=True) for word in block.text.split()], _BODY, size):
        canvas.words(_MARGIN, canvas.y, line, size)
        canvas.y -= size * 1.25
    canvas.y -= 2


def _paragraph(canvas: _Canvas, parts: Cell, size: float) -> None:
    for line in _wrap(list(_words(parts)), _BODY, size):
        canvas.need(size * 1.35)
        canvas.y -= size * 1.35
        canvas.words(_MARGIN, canvas.y, line, size)


def _record(canvas: _Canvas, block: Record) -> None:
    size = 7.5
    for number, line in enumerate(_wrap([_Word(w) for w in block.summary.split()], _BODY, size)):
        canvas.need(size * 1.4)
        if number == 0:
            canvas.mark(block.anchor)
        canvas.y -= size * 1.4
        canvas.words(_MARGIN, canvas.y, line, size)


def _table(canvas: _Canvas, table: Table) -> None:
    size, leading, gap = 8.2, 10.4, 6.0
    total = sum(table.widths)
    widths = [_BODY * w / total for w in table.widths]

    def row(cells: Sequence[Cell], *, bold: bool = False) -> list[list[list[_Word]]]:
        return [
            _wrap(list(_words(cell, bold=bold, colour=_FAINT if bold else _INK)), width - gap, size)
            for cell, width in zip(cells, widths, strict=True)
        ]

    def draw(wrapped: list[list[list[_Word]]]) -> None:
        top, x = canvas.y, _MARGIN
        for lines, width in zip(wrapped, widths, strict=True):
            for number, line in enumerate(lines):
                canvas.words(x, top - leading * (number + 1) + 1, line, size)
            x += width
        canvas.y = top - leading * max(1, *(len(lines) for lines in wrapped)) - 4
        canvas.line([(_MARGIN, canvas.y + 1), (_MARGIN + _BODY, canvas.y + 1)], "#d9dde3")

    head = row(table.columns, bold=True)
    canvas.y -= 3
    canvas.need(4 * leading)
    draw(head)
    for number, cells in enumerate(table.rows):
        wrapped = row(cells)
        if canvas.need(leading * max(1, *(len(lines) for lines in wrapped)) + 6):
            draw(head)
        if table.anchors:
            canvas.mark(table.anchors[number])
        draw(wrapped)
    canvas.y -= 6


def _chart(canvas: _Canvas, chart: Chart) -> None:
    height, left, right = 150.0, 30.0, 80.0
    canvas.need(height + 40)
    base, width, x0 = canvas.y - height - 8, _BODY - left - right, _MARGIN + left
    ys = [y for _, points in chart.series for _, y in points] + [value for _, value in chart.limits]
    ticks = chart_ticks(max([*ys, 1e-9]))
    top_x = max([x for _, points in chart.series for x, _ in points] + [1.0])

    def at(x: float, y: float) -> tuple[float, float]:
        return x0 + width * x / top_x, base + height * y / ticks[-1]

    for value in ticks:
        y = at(0, value)[1]
        canvas.line([(x0, y), (x0 + width, y)], "#e0e4ea")
        canvas.words(x0 - 5 - _width(f"{value:g}", 7.5), y - 2.5, [_Word(f"{value:g}", _FAINT)], 7.5)
    for name, value in chart.limits:
        y = at(0, value)[1]
        canvas.line([(x0, y), (x0 + width, y)], _TONES["bad"])
        canvas.words(x0 + width + 5, y - 2.5, [_Word(name, _TONES["bad"])], 8)
    drawn = [(number, name, points) for number, (name, points) in enumerate(chart.series) if points]
    ends = place_labels(
        [at(*points[-1])[1] for _, _, points in drawn], apart=9, lowest=base, highest=base + height
    )
    for (number, name, points), y_end in zip(drawn, ends, strict=True):
        colour = COLOURS[number % len(COLOURS)]
        canvas.line([at(*point) for point in points], colour, 1.4)
        canvas.words(x0 + width + 5, y_end - 2.5, [_Word(name, colour)], 8)
    canvas.words(x0, base - 11, [_Word(f"{chart.x} 0 to {top_x:g}; {chart.y}", _FAINT)], 8)
    canvas.y = base - 24
    canvas.words(_MARGIN, canvas.y, [_Word(chart.title)], 8.2)
    canvas.y -= 8


def _words(cell: Cell, *, bold: bool = False, colour: str = _INK) -> Iterator[_Word]:
    if isinstance(cell, tuple):
        for part in cell:
            yield from _words(part, bold=bold, colour=colour)
    elif isinstance(cell, Link):
        for word in cell.text.split():
            yield _Word(word, _LINK, bold, cell.anchor)
    elif isinstance(cell, Mark):
        for word in cell.text.split():
            yield _Word(word, _TONES[cell.tone], True)
    else:
        for word in cell.split():
            yield _Word(word, colour, bold)


def _wrap(words: list[_Word], width: float, size: float) -> list[list[_Word]]:
    """Break words into lines of at most `width`; a word that is longer is cut."""
    lines: list[list[_Word]] = []
    line: list[_Word] = []
    used = 0.0
    space = _width(" ", size)
    for word in (piece for whole in words for piece in _cut(whole, width, size)):
        needed = _width(word.text, size, bold=word.bold)
        if line and used + space + needed > width:
            lines.append(line)
            line, used = [], 0.0
        used += needed + (space if line else 0.0)
        line.append(word)
    return [*lines, line] if line else lines or [[]]


def _cut(word: _Word, width: float, size: float) -> Iterator[_Word]:
    start = 0
    for end in range(1, len(word.text) + 1):
        if end - start > 1 and _width(word.text[start:end], size, bold=word.bold) > width:
            yield _Word(word.text[start : end - 1], word.colour, word.bold, word.anchor)
            start = end - 1
    yield _Word(word.text[start:], word.colour, word.bold, word.anchor)


def _width(text: str, size: float, *, bold: bool = False) -> float:
    widths = _HELVETICA_BOLD if bold else _HELVETICA
    return sum(widths[ord(c) - 32] if 32 <= ord(c) < 127 else 556 for c in text) * size / 1000


def _rgb(colour: str) -> str:
    return " ".join(f"{int(colour[i : i + 2], 16) / 255:.3f}" for i in (1, 3, 5))


def _escaped(text: str) -> str:
    raw = text.encode("cp1252", errors="replace").decode("latin-1")
    escaped = raw.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return "".join(c if ord(c) < 127 else f"\\{ord(c):03o}" for c in escaped)


def _document(title: str, canvas: _Canvas) -> bytes:
    """Assemble objects: 1 catalog, 2 pages, 3 and 4 fonts, 5 information, then page and content pairs."""
    count = len(canvas.pages)
    page_ids = [6 + 2 * number for number in range(count)]
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /%s /Encoding /WinAnsiEncoding >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (count, b" ".join(b"%d 0 R" % i for i in page_ids)),
        font % b"Helvetica",
        font % b"Helvetica-Bold",
        b"<< /Title (%s) /Producer (FedRad) >>" % _escaped(title).encode("ascii"),
    ]
    for number, page in enumerate(canvas.pages):
        footer = f"{title}   {number + 1} of {count}"
        page.commands.append(
            f"BT {_rgb(_FAINT)} rg /F1 7.5 Tf {_MARGIN:g} {_MARGIN - 20:g} Td ({_escaped(footer)}) Tj ET"
        )
        links = b" ".join(
            _annotation(link, canvas, page_ids) for link in page.links if link[4] in canvas.anchors
        )
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %g %g] /Contents %d 0 R /Annots [%s] "
            b"/Resources << /Font << /F1 3 0 R /F2 4 0 R >> >> >>"
            % (_WIDTH, _HEIGHT, page_ids[number] + 1, links)
        )
        stream = zlib.compress("\n".join(page.commands).encode("ascii"), 9)
        objects.append(
            b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream)
        )
    data = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"trailer\n<< /Size %d /Root 1 0 R /Info 5 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        start,
    )
    return bytes(data)


def _annotation(
    link: tuple[float, float, float, float, str], canvas: _Canvas, page_ids: Sequence[int]
) -> bytes:
    x0, y0, x1, y1, anchor = link
    page, y = canvas.anchors[anchor]
    return (
        b"<< /Type /Annot /Subtype /Link /Border [0 0 0] /Rect [%.2f %.2f %.2f %.2f] "
        b"/Dest [%d 0 R /XYZ 0 %.2f 0] >>" % (x0, y0, x1, y1, page_ids[page], y + 12)
    )
