"""A judge behind an OpenAI-compatible endpoint, and the rating in its judgment."""

import http.client
import json
import re
import threading
import urllib.error
import urllib.request

from lisa_dist.errors import UserError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
# As in FastChat, but for which match counts: single brackets only where there are no double ones.
_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))


class JudgeError(UserError):
    """The judge gives no verdict: the message names the endpoint and the reason."""


class Judge:
    """Asks for judgments, with retries where they may help; several threads may ask at a time."""

    def __init__(self, url: str, model: str, timeout: float, max_tokens: int, key: str | None = None):
        self.model, self._max_tokens = model, max_tokens
        self._name = f"--judge_url {url}"
        self._url, self._timeout = f"{url.rstrip('/')}/chat/completions", timeout
        if not re.match(r"https?://[^/]", url):
            raise UserError(f"{self._name}: must begin with http:// or https://, such as http://localhost:8000/v1.")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # A redirect would take the key and the questions elsewhere.
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._given_up = threading.Event()

    def ask(self, system: str, user: str) -> str:
        """The judgment at temperature 0, which may be empty.

        Retries time-outs, lost connections, HTTP 429 and 5xx, and responses that are no chat completion. Raises
        JudgeError after the last try, and at once for errors that a retry cannot change.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self._max_tokens}
        body["stream"] = False
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers, method="POST")
        cause: Exception
        for wait in (*WAITS, None):
            try:
                with self._opener.open(request, timeout=self._timeout) as response:
                    return _content_of(response.read())
            except urllib.error.HTTPError as error:
                text = error.read(300).decode(errors="replace").strip()
                reason = f"HTTP {error.code} {error.reason}: {text}"
                if error.code != 429 and error.code < 500:
                    raise JudgeError(
                        f"{self._name}: {reason}; {_HINTS.get(error.code, 'see --judge_model')}."
                    ) from error
                cause = error
            except TimeoutError as error:
                reason, cause = f"timed out after {self._timeout:g} s (--judge_timeout)", error
            except (OSError, http.client.HTTPException, _NoCompletionError) as error:
                reason, cause = str(getattr(error, "reason", error)) or type(error).__name__, error
            if wait is None or self._given_up.wait(wait):
                break
        self._given_up.set()  # other threads need not try
        raise JudgeError(f"{self._name}: no verdict in {len(WAITS) + 1} tries ({reason})") from cause


def parse_rating(judgment: str, which: str = "last") -> float:
    """The last rating, or the first, in [[...]] or, without one, in [...]; -1 where there is none from 1 to 10."""
    found = next((ratings for pattern in _RATINGS if (ratings := pattern.findall(judgment))), ["-1"])
    rating = float(found[0 if which == "first" else -1])
    return rating if 1 <= rating <= 10 else -1.0


_HINTS = {
    401: "export JUDGE_API_KEY",
    403: "export JUDGE_API_KEY",
    404: "the endpoint's address ends with /v1, and --judge_model is one of GET /models there",
}


class _NoCompletionError(ValueError):
    """A response that is no chat completion."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _content_of(body: bytes) -> str:
    try:
        return json.loads(body)["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError) as error:
        raise _NoCompletionError(f"the response is no chat completion: {body[:80]!r}") from error
