import json
import math
from dataclasses import dataclass

import numpy as np

from qinvert.documents import to_document
from qinvert.formats import INT8


@dataclass
class Row:
    value: float
    names: tuple[str, ...]
    inner: object = None


def test_dataclasses_become_objects_and_what_json_lacks_becomes_null():
    rows = {"a": [Row(math.nan, ("x",), Row(-math.inf, (), INT8.name))], 3: (True, 2, 1.5, None)}
    document = to_document(rows)
    assert document == {
        "a": [{"value": None, "names": ["x"], "inner": {"value": None, "names": [], "inner": "int8"}}],
        "3": [True, 2, 1.5, None],
    }
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_foreign_values_become_their_text():
    assert to_document(np.dtype("int8")) == "int8"
    assert to_document({"type": Row})["type"].endswith("Row'>")
