"""The page: self-contained, escaped, the same bytes twice, and honest about the tier."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from pointcall_attest import entry
from pointcall_attest.report import Report, build, render_html
from pointcall_attest.report.page import MAX_CARDS, duration, segments
from tests.unit.report.sample_log import SampleLog

VOID = {"meta", "br", "rect", "circle"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; asserts that every tag is closed by its own end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def made(log: SampleLog) -> Report:
    return build(log.log, log.checkpoint(), now=log.now)


def busy_log() -> SampleLog:
    log = SampleLog()
    log.recover()
    log.recover(refused_by="guard.rate")
    log.recover(mode="monitor")
    log.recover(outcome="failed", confirmed=False)
    log.recover(actions=())
    log.refuse()
    log.next_epoch()
    return log


def test_the_page_loads_nothing() -> None:
    page = Page(render_html(made(busy_log())))
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"})
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "background"} & set(attributes), tag
        assert not [a for a in attributes if a.startswith("on")], tag
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_style_names_no_address() -> None:
    html = render_html(made(busy_log()))
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_same_report_gives_the_same_bytes() -> None:
    report = made(busy_log())
    assert render_html(report) == render_html(report)


HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m'\"&"


def test_foreign_text_stays_text() -> None:
    log = SampleLog()
    log.append(entry.Refusal(check=HOSTILE, what=HOSTILE, want=HOSTILE, got=HOSTILE, hint=HOSTILE))
    log.recover(detail={"stderr": HOSTILE}, refused_by=HOSTILE)
    html = render_html(made(log))
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "<script>alert(1)</script>\\u{202e}\\u{1b}[31m" in page.text


@pytest.mark.parametrize(
    ("tier", "banner"), [("emulated", "EMULATED"), ("none", "NOT ATTESTED"), ("hardware", "NOT APPRAISED")]
)
def test_the_tier_is_said_first(tier: str, banner: str) -> None:
    text = Page(render_html(made(SampleLog(tier=tier)))).text  # type: ignore[arg-type]
    before = text[: text.index("Is this everything?")]
    for word in ("EMULATED", "NOT ATTESTED", "NOT APPRAISED"):
        assert (word in before) == (word == banner)


def test_a_report_with_a_failed_check_says_no() -> None:
    log = busy_log()
    text = Page(render_html(build(log.log[:-1], log.checkpoint(), now=log.now))).text
    assert "No. 2 of the checks below failed" in text


def test_an_unchecked_report_does_not_say_yes() -> None:
    log = busy_log()
    text = Page(render_html(build(log.log, None, now=log.now))).text
    assert "Not proven." in text
    assert "Yes." not in text


def test_an_empty_log_has_a_page() -> None:
    log = SampleLog(open_epoch=False)
    assert "No run has ended in this log." in Page(render_html(build([], None, now=log.now))).text


def test_only_the_newest_runs_are_drawn_and_the_page_says_so() -> None:
    log = SampleLog()
    for _ in range(MAX_CARDS + 3):
        log.recover()
    page = Page(render_html(made(log)))
    assert sum(t == "article" and "run" in str(a.get("class")).split() for t, a in page.tags) == MAX_CARDS
    assert f"{MAX_CARDS + 3} runs; the newest {MAX_CARDS} are drawn" in page.text


@pytest.mark.parametrize(
    ("ns", "text"),
    [(None, ""), (0, "0 ns"), (999, "999 ns"), (1_000, "1.0 µs"), (41_000, "41 µs"), (999_600, "1.0 ms"),
     (3_300_000, "3.3 ms"), (2_500_000_000, "2.5 s"), (86_400_000_000_000, "86400 s"), (-41_000, "-41 µs")],
)  # fmt: skip
def test_durations_read_well(ns: int | None, text: str) -> None:
    assert duration(ns) == text


def test_gaps_count_from_the_last_step_that_happened() -> None:
    log = SampleLog()
    log.recover(intent=False)
    (run,) = made(log).runs
    assert [(s.name, gap) for s, gap in segments(run)] == [
        ("event", ""),
        ("received", "+41 µs"),
        ("decided", "+7.0 µs"),
        ("intent", ""),
        ("applied", "+3.3 ms"),
        ("confirmed", "+600 µs"),
    ]
