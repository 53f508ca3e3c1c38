"""Whatever bytes a parser is given, it reads them or refuses them with one line of the project's own.

`make fuzz` runs ten minutes; inputs that failed belong into tests/data/fuzz.
"""

import os
import warnings

import pytest
from fuzz_targets import TARGETS, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ", "100"))
# Values that tend to be special: ends of integers, brackets, quotes, numbers that are none.
WORDS = [
    b"\x00",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"[",
    b"{",
    b'"',
    b"-",
    b"NaN",
    b"1e999",
    b"null",
    b"9" * 20,
]
EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]),
    st.integers(0, 2**20),
    st.one_of(st.sampled_from(WORDS), st.binary(min_size=1, max_size=8)),
)


def edited(data, edits):
    """`data` with a few changes of some bytes each."""
    for kind, place, word in edits:
        at = place % (len(data) + 1)
        end = at + len(word)
        if kind == "repeat":
            data = data[:at] + data[at:end] * 50 + data[end:]
        else:
            data = {
                "replace": data[:at] + word + data[end:],
                "insert": data[:at] + word + data[at:],
                "delete": data[:at] + data[end:],
                "cut": data[:at],
            }[kind]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_read_or_refused(name):
    assert seeds(name)
    for data in (b"", *seeds(name)):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_edited_inputs_are_read_or_refused(name, data):
    seed = data.draw(st.sampled_from(range(len(seeds(name)))))
    edits = data.draw(st.lists(EDIT, min_size=1, max_size=6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's and NumPy's remarks on their input
        TARGETS[name](edited(seeds(name)[seed], edits))
