"""Key-value pair retrieval (KVPR): find the value of one key in a JSON object of random UUIDs."""

import uuid
from dataclasses import dataclass
from typing import ClassVar

from repflow.monitor.offline.tasks import AbstractTask, generator

PROMPT = """Extract the value corresponding to the specified key in the JSON object below.

JSON data:
{{{pairs}}}

Key: "{key}"
Corresponding value:"""


@dataclass(frozen=True, kw_only=True)
class KeyValueRetrieval(AbstractTask):
    """m pairs of version-4 UUIDs in one JSON object, and the key of one of them (appendix B)."""

    name: ClassVar[str] = "kvpr"
    unit: ClassVar[str] = "pairs"

    def _compose(self, context: int, position: int, attempt: int) -> tuple[str, str, int]:
        draw = generator(self.name, self.seed, context, attempt)
        gold, *pairs = [(_uuid4(draw.getrandbits(128)), _uuid4(draw.getrandbits(128))) for _ in range(self.items)]
        pairs.insert(position, gold)
        lines = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
        return PROMPT.format(pairs=lines, key=gold[0]), gold[1], context


def _uuid4(bits: int) -> str:
    return str(uuid.UUID(int=bits, version=4))
