"""Make a CSV file of short messages, each labelled ham or spam, from templates. The same seed gives the same file.

    python examples/data/make_spam.py spam.csv

Single words do not tell the two apart: both speak of prizes, free tickets, money and calls, with faults of typing. In
4 % of the messages nothing does, so that no classifier is always right. Of 5,572 messages 747 are spam, as many as in
the SMS Spam Collection.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

OPENINGS = ("", "", "{Hi} {name},", "{Hi},", "{Hi} {name}!", "By the way,", "One more thing:")
CLOSINGS = ("", "", "", "Love, {name}", "Thanks!", "Let me know.", "Ok?", "{name}", "See you!", "Please reply.")
SHARED = 0.04  # of the messages
HAM = (
    "shall we {meet} {when}?",
    "I won a {prize} at the fair {when}, can you believe it?",
    "my {ticket} is free {when}, so come with us.",
    "please call {name} {when}, he has a question on the {thing}.",
    "sorry, I missed your call. Is {when} good for you?",
    "did you see who won the {prize}? It was {name}.",
    "the {thing} cost me {money} {when}. Is that not too much?",
    "my number is now {number}.",
    "{name} says that the offer for the {thing} ends {when}. Do we want it?",
    "thank you for the {prize}! We will {meet} {when}.",
    "call me {now}, the {thing} is broken.",
    "do not answer the text on a {prize}: it is a fraud.",
    "I owe you {money} for the {ticket}. I bring it {when}.",
    "your {thing} is still here. Can you take it {when}?",
)
SPAM = (
    "you have won a {prize}! Call {number} {now}.",
    "your number was chosen for {money}. Reply {code} {now}.",
    "a free {ticket} for you and a friend: text {code} to {number}.",
    "we tried to call you on a {prize}. Call {number} {when}.",
    "the offer of a {prize} ends {when}. Text {code} to {number}.",
    "{name} wants to {meet} you {when}. To see who it is, call {number}.",
    "your {thing} is ready. Claim {money} {now}.",
    "who won the {prize}? Say {code} and win {money} {when}.",
    "you were not there when we brought your {thing}. Call {number} {now}.",
    "thank you for your order of a {prize} at {money}. Not yours? Call {number}.",
    "your {thing} was closed {when}. To open it, reply {code}.",
    "we pay {money} for your old {thing}, {now}.",
)
EITHER = ("please call {number} {when}.", "your {thing} is here, call {now}.", "is the {prize} yours? Reply {when}.")
WORDS = {
    "Hi": ("Hi", "Hello", "Good day", "Dear", "Hey"),
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Tom"),
    "meet": ("meet", "have dinner", "go for a walk", "talk", "play a game"),
    "when": ("tonight", "tomorrow", "this week", "on Monday", "on Friday", "at 7", "at noon", "today", "in May"),
    "now": ("now", "today", "at once", "before midnight", "within 24 hours", "as soon as you can"),
    "prize": ("prize", "holiday", "new phone", "car", "watch", "game", "gold ring", "week in Rome", "gift"),
    "ticket": ("ticket", "concert", "film", "match", "play", "show"),
    "thing": ("phone", "book", "parcel", "house", "bill", "car", "letter", "account", "bike"),
}


def message(cores: tuple[str, ...], draw: random.Random) -> str:
    """Return a message: an opening, a core and a closing, in which each {word} is replaced, with faults of typing."""
    core = draw.choice(EITHER if draw.random() < SHARED else cores)
    text = " ".join(f"{draw.choice(OPENINGS)} {core} {draw.choice(CLOSINGS)}".split())
    while "{" in text:
        name = text[text.index("{") + 1 : text.index("}")]
        text = text.replace(f"{{{name}}}", filling(name, draw), 1)
    text = text[0].upper() + text[1:]
    if draw.random() < 0.3:
        text = text.lower()
    if draw.random() < 0.3:
        text = text.replace(",", "").replace(".", "").replace("!", "")
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        at = draw.randrange(len(text) - 1)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]  # two letters in the wrong order
    return text.replace("you ", "u ") if draw.random() < 0.2 else text


def filling(name: str, draw: random.Random) -> str:
    """Return what replaces a word of a template."""
    if name == "number":
        return "".join(draw.choice("0123456789") for _ in range(draw.choice((5, 6, 11))))
    if name == "money":
        return f"{draw.choice('£$')}{draw.choice((5, 20, 50, 100, 250, 1000, 5000))}"
    if name == "code":
        return draw.choice(("WIN", "YES", "GO", "PLAY", "CLAIM")) + draw.choice(("", "1", "7", "24"))
    return draw.choice(WORDS[name])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("path", type=Path, help="the CSV file to write, with the columns label and text")
    parser.add_argument("--ham", type=int, default=4825, help="messages with the label ham (default: 4825)")
    parser.add_argument("--spam", type=int, default=747, help="messages with the label spam (default: 747)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the messages (default: 0)")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rows = [("ham", message(HAM, draw)) for _ in range(args.ham)]
    rows += [("spam", message(SPAM, draw)) for _ in range(args.spam)]
    draw.shuffle(rows)
    with args.path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("label", "text"), *rows])
    print(f"{args.path}: {args.ham:,} ham, {args.spam:,} spam")


if __name__ == "__main__":
    main()
