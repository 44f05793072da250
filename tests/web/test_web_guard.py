"""Who may ask, and who may not: names, other sites' pages, the token."""

from __future__ import annotations

import pytest
from blockstream_web.guard import COOKIE, Guard, is_loopback

MARK = {"X_Blockstream": "1"}


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST.:{port}", "studio.example"]
)
def test_its_own_names_are_answered(shared, host):
    assert shared.ask("GET", "/", Host=host.format(port=shared.port)).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "10.0.0.1", "", "[::1"]
)
def test_a_name_that_was_pointed_here_is_not(shared, host):
    assert shared.ask("GET", "/api/presets", Host=host).status == 421


def test_where_it_listens_on_all_addresses_each_is_its_own(serve):
    with serve(any_address=True, token="t" * 20) as served:
        cookie = f"{COOKIE}={'t' * 20}"
        assert served.ask("GET", "/", Host="10.0.0.1:80", Cookie=cookie).status == 200
        assert served.ask("GET", "/", Host="evil.example", Cookie=cookie).status == 421


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_sites_page_gets_nothing_but_the_page(shared, site):
    asked = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate"}
    assert shared.ask("GET", "/", **asked).status == 200
    assert shared.ask("GET", "/", **{**asked, "Sec_Fetch_Mode": "no-cors"}).status == 403
    assert shared.ask("GET", "/compare/0001/0002", **asked).status == 403
    assert shared.ask("GET", "/api/events", **asked).status == 403
    assert shared.ask("POST", "/api/plan", b"{}", **asked, **MARK).status == 403


def test_what_changes_something_needs_the_mark_and_our_own_page(shared):
    assert shared.ask("POST", "/api/runs", b"{}").status == 403
    assert shared.ask("DELETE", "/api/runs/0001").status == 403
    assert shared.ask("POST", "/api/runs", b"{}", Origin="http://evil.example", **MARK).status == 403
    assert shared.ask("POST", "/api/runs", b"{}", Origin="null", **MARK).status == 403
    own = f"http://127.0.0.1:{shared.port}"
    assert (
        shared.ask("POST", "/api/runs", b"{}", Origin=own, **MARK).status == 422
    )  # heard, and makes no sense


def test_with_a_token_nothing_is_told_without_it(serve):
    token = "a-token-of-twenty-and-more"
    with serve(token=token) as served:
        for path in ("/", "/page/page.js", "/api/presets", "/api/events", "/runs/0001/video.mp4", "/nothing"):
            answer = served.ask("GET", path)
            assert answer.status == 401, path
            assert token not in answer.text
        assert served.ask("GET", f"/api/presets?token={token}").status == 401
        assert served.ask("GET", "/?token=wrong").status == 401
        assert served.ask("GET", "/?token=%C3%A9").status == 401
        assert served.ask("GET", "/", Cookie=f"{COOKIE}=wrong").status == 401
        assert served.ask("POST", "/api/runs", b"{}", **MARK).status == 401
        told = served.ask("GET", f"/?token={token}")
        assert (told.status, told.headers["location"]) == (303, "/")
        cookie = told.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert served.ask("GET", "/", Cookie=cookie.partition(";")[0]).status == 200


def test_every_answer_says_what_a_browser_may_do_with_it(shared):
    for answer in (
        shared.ask("GET", "/"),
        shared.ask("GET", "/nothing"),
        shared.ask("GET", "/", Host="evil"),
    ):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_loopback_is_told_from_the_rest():
    assert [h for h in ("127.0.0.1", "127.8.0.1", "::1", "localhost") if not is_loopback(h)] == []
    assert [h for h in ("0.0.0.0", "::", "10.0.0.1", "box", "") if is_loopback(h)] == []


def test_the_token_is_not_a_prefix(serve):
    guard = Guard(None, [], False, "abcdefgh")
    assert guard is not None
    with serve(token="abcdefghabcdefgh") as served:
        assert served.ask("GET", "/", Cookie=f"{COOKIE}=abcdefgh").status == 401
        assert served.ask("GET", "/", Cookie=f"{COOKIE}=").status == 401
