"""The records in a log.jsonl."""

import json
import math


def read_record(line):
    """The record in a line of a log, {name: number or None} with an "iter"; None for a damaged line."""
    try:
        record = json.loads(line)
        values = [value for value in record.values() if value is not None]
        whole = type(record["iter"]) is int and all(map(math.isfinite, values)) and bool not in map(type, values)
    except Exception:  # a damaged line may raise anything
        return None
    return record if whole else None


def last_validation(path):
    """The figures of the last validation that a log.jsonl records, {name: number}; empty without one."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = read_record(line) or {}
            values = {name: value for name, value in record.items() if name.startswith("val_")}
            found = values or found
    return found
