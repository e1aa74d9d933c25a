"""The date in a chat template is fixed, whichever way the template asks for it."""

from __future__ import annotations

from datetime import datetime

import pytest

from snake_lora_pl.errors import UserError
from snake_lora_pl.models.chat_template import parse_date, renders_date, with_date

DATE = datetime(2025, 3, 1)


@pytest.mark.parametrize(
    ("template", "fixed"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "{{ '01 Mar 2025' }}"),
        ('{{ strftime_now( "%Y-%m-%d" ) }}', "{{ '2025-03-01' }}"),
        (
            '{% if strftime_now is defined %}{% set d = strftime_now("%H:%M") %}{% endif %}',
            "{% if strftime_now is defined %}{% set d = '00:00' %}{% endif %}",
        ),
        ("no date", "no date"),
    ],
)
def test_calls_with_a_literal_format_become_the_date(template: str, fixed: str) -> None:
    assert with_date(template, DATE) == fixed
    assert not renders_date(fixed)


@pytest.mark.parametrize("template", ["{{ strftime_now(format) }}", "{% set now = strftime_now %}{{ now('%Y') }}"])
def test_date_in_a_computed_format_is_an_error(template: str) -> None:
    assert renders_date(template)
    with pytest.raises(UserError, match=r"data\.template=instruction"):
        with_date(template, DATE)


def test_date_is_parsed_to_midnight() -> None:
    assert parse_date("2025-03-01") == DATE
    assert parse_date(None).time() == DATE.time()
