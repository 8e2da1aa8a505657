"""Write the configuration's JSON schema, generated from the package's types.

Example: python -m workflow.scripts.write_schema
"""

from __future__ import annotations

import json
from pathlib import Path

from spalf.config import SweepConfig

SCHEMA = Path(__file__).parents[1] / "schemas" / "config.schema.json"


def schema_text() -> str:
    """The schema of `SweepConfig` as it is kept in the repository."""
    return json.dumps(SweepConfig.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
