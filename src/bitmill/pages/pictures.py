"""The pictures of a measurement or a sweep as files of their own, for papers: SVG, and PNG through resvg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitmill.core.errors import Refused
from bitmill.pages import plots
from bitmill.pages.frontier import frontier
from bitmill.pages.heat import heat
from bitmill.pages.paper import on_paper
from bitmill.pages.svg import WIDTH, text
from bitmill.pages.svg import svg as picture

Plain = Mapping[str, Any]
PNG_PIP = "pip install 'bitmill[png]'"


def of_record(record: Plain, weighted: Mapping[str, float] | None = None) -> dict[str, str]:
    """SVG files by name: loss by kind of text, its distribution, by the original's confidence, all weights.

    Args:
        weighted: errors of outputs by tensor.
    """
    found = {
        "kinds": plots.kinds(record),
        "divergence": plots.cumulative([record]),
        "confidence": plots.confidence(record),
    }
    if record["same_basis"]:
        found["weights"] = heat([record], [weighted or {}])[0]
    return {name: on_paper(drawn) for name, drawn in found.items() if drawn}


def of_several(tiers: Sequence[Plain], records: Sequence[Plain], budget: int | None = None) -> dict[str, str]:
    """SVG files by name: size against loss, and all distributions in one picture.

    Args:
        tiers: plain values as :func:`~bitmill.pages.frontier.frontier` wants them.
        records: measurements of the same files, in the same order; fewer leave the distributions out.
    """
    floor = records[0]["floor"] if records else None
    found = {"size-loss": on_paper(frontier(tiers, floor, budget))}
    if records and len(records) == len(tiers):
        names = [str(tier["name"]) for tier in tiers]
        found["divergence"] = on_paper(plots.cumulative(records, names))
    return found


def as_png(svg: str, width: int = 2 * WIDTH) -> bytes:
    """The same picture, ``width`` pixels wide.

    Raises:
        Refused: resvg is not installed, or there is no font to write with.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise Refused("PNG files are made with resvg, which is not installed", fix=PNG_PIP) from error
    with_text, without = (
        bytes(svg_to_bytes(svg_string=on_paper(picture(20, [text(4, 16, said)], "")))) for said in ("M", "")
    )
    if with_text == without:
        raise Refused(
            "there is no font here that a PNG's labels could be written with",
            fix="install DejaVu Sans (Debian: apt install fonts-dejavu-core), or take the SVG files",
        )
    return bytes(svg_to_bytes(svg_string=svg, width=width))
