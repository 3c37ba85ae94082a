"""Read, check, split and tokenise records."""

from saigakit.data.conversations import read_conversations, split_conversations, write_conversations
from saigakit.data.report import advice, check_records, examples, summary
from saigakit.data.sources import records_files

__all__ = [
    "advice",
    "check_records",
    "examples",
    "read_conversations",
    "records_files",
    "split_conversations",
    "summary",
    "write_conversations",
]
