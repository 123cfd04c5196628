"""A judge: a language model behind an OpenAI-compatible address, which scores responses from 0 to 100."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import urllib.error
import urllib.request

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key; it is never shown
TRIES = 2
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses after which a second try may succeed
PROMPT = """\
Here are an instruction, a correct answer to it, and the answer of a model.

Instruction: {instruction}
{input}Correct answer: {output}
Answer of the model: {response}

Score the answer of the model from 0 (wrong or useless) to 100 (as good as the correct answer). Reply with this whole
number only."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge.

    Attributes:
      url: the address up to its version, such as https://api.openai.com/v1, or Ollama's http://localhost:11434/v1.
      model: the name of the model there.
      timeout: seconds to wait for a reply. After an error of the server or of the connection there is a second try.
    """

    url: str
    model: str
    timeout: float = 120.0

    def __post_init__(self):
        if not re.match(r"https?://", self.url):
            raise ValueError(f"the judge's address must begin with http:// or https://, not {self.url!r:.80}")
        if not self.model:
            raise ValueError("the judge needs the name of its model")

    def score(self, instruction: str, input: str, output: str, response: str) -> int | None:
        """Return the score of a response, 0 to 100; None if the reply is no such number.

        Args:
          instruction: what was asked.
          input: what it was about; may be empty.
          output: the correct answer.
          response: the model's answer.

        Raises:
          OSError: the judge does not answer, or refuses.
        """
        more = f"Input: {input}\n" if input else ""
        content = PROMPT.format(instruction=instruction, input=more, output=output, response=response)
        return _score_in(self._reply(content))

    def _reply(self, content: str) -> str:
        """Return the text of a reply; "" if it has another form."""
        fields = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in BUSY or attempt == TRIES - 1:
                    advice = f"; is {KEY} set?" if error.code in (401, 403) else ""
                    raise OSError(
                        f"the judge at {self.url} refused: HTTP {error.code} {error.reason}{advice}"
                    ) from None
            except (ValueError, KeyError, IndexError, TypeError):  # JSON of another form
                return ""
            except (OSError, http.client.HTTPException) as error:  # also timeouts and refused connections
                if attempt == TRIES - 1:
                    reason = getattr(error, "reason", None) or error
                    raise OSError(f"the judge at {self.url} does not answer ({reason}): is it running?") from None
        raise AssertionError("unreachable")


def _score_in(reply: str) -> int | None:
    """Return the only number in a reply, such as "85", "Score: 85" or "85/100"."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"/\s*100\b", "", reply))
    if len(numbers) != 1 or not re.fullmatch(r"\d+(\.0+)?", numbers[0]):
        return None
    score = int(float(numbers[0]))
    return score if score <= 100 else None
