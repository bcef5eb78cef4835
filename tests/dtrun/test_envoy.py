"""The envoy of a node waits for the head's name, says so once, and gives up in time."""

from __future__ import annotations

import json
import socket

import pytest

from dtrun import envoy


def test_a_name_that_is_not_known_yet_is_asked_for_again(monkeypatch, capsys):
    answers = iter([False, False, True])

    def look_up(host, port):
        if not next(answers):
            raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(envoy.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(envoy, "ASK_AGAIN_SECONDS", 0.0)
    envoy._await_name("pod-0.job", 60.0)
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["say"] == "notice"
    assert told["why"].startswith("pod-0.job, where the nodes meet, is not known here: Name or")
    assert next(answers, None) is None


def test_a_name_that_stays_unknown_is_an_error(monkeypatch, capsys):
    def look_up(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(envoy.socket, "getaddrinfo", look_up)
    with pytest.raises(OSError, match="not known"):
        envoy._await_name("pod-0.job", 0.0)
    assert capsys.readouterr().out == ""
