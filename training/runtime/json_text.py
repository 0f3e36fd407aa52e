"""JSON as the standard has it: no NaN and no infinity, which most readers refuse."""

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """Indented JSON with a final line break; a number that is not finite is null."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """One line of JSON with its line break; a number that is not finite is null."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same JSON data with None in place of NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
