"""Questions with passages written for the tests, and the file that holds them."""

import gzip
import json
from pathlib import Path
from typing import Any

VILLAGES = (
    *("Orrin", "Tavell", "Bresk", "Umberley", "Quaith", "Lindmoor", "Sarn"),
    *("Pellow", "Dunver", "Ister", "Wexholt", "Cray", "Noll", "Fenby"),
)
BUILDERS = (
    *("Tessa Vale", "Odo Marsh", "Ilka Brand", "Piet Rowan"),
    *("Sunniva Holt", "Bram Ash", "Yda Finch", "Corin Lake"),
)
DETAILS = (
    "It ground barley for the whole valley.",
    "A flood took its wheel in the following spring, and it was raised again in oak.",
    "Travellers slept in its loft, and the miller kept a book of their names.",
)


def records() -> list[dict[str, object]]:
    """One question for each village; no passage answers another's question, for the years differ."""
    return [
        {
            "question": f"in which year was the mill of {village} built",
            "answers": [str(1700 + 3 * number)],
            "ctxs": [
                {"title": "An inn", "text": "It has nothing to do with it.", "isgold": False, "hasanswer": False},
                {
                    "title": f"Mill of {village}",
                    "text": f"The mill of {village} was built in {1700 + 3 * number} by {BUILDERS[number % 8]}. "
                    + " ".join(DETAILS[: 1 + number % 3]),
                    "isgold": True,
                    "hasanswer": True,
                },
            ],
        }
        for number, village in enumerate(VILLAGES)
    ]


def write(path: Path, lines: list[object] | None = None) -> Path:
    """A file with these records, or with all of them, one in each line."""
    text = "".join(json.dumps(record) + "\n" for record in lines or records())
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_long(path: Path) -> Path:
    """The same with passages of which not two fit into the window of the small models."""
    lines: list[Any] = records()
    for record in lines:
        record["ctxs"][1]["text"] += " The wheel turned for the whole winter." * 40
    return write(path, lines)
