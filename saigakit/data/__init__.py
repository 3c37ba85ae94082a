"""Read, check, split and tokenise records."""

from saigakit.data.conversations import (
    asking_alike,
    common_system_prompt,
    labels,
    read_conversations,
    split_conversations,
    spread,
    write_conversations,
)
from saigakit.data.report import advice, check_records, examples, summary
from saigakit.data.sources import records_files

__all__ = [
    "advice",
    "asking_alike",
    "check_records",
    "common_system_prompt",
    "examples",
    "labels",
    "read_conversations",
    "records_files",
    "split_conversations",
    "spread",
    "summary",
    "write_conversations",
]
