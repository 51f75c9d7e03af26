"""GGUF files whose tables lie."""

import struct

from hypothesis import given, settings, strategies as st

from qwen_analog.gguf import load_gguf

pytest_plugins = ["weights_helpers"]


def test_gguf_counts_versions_and_lengths_that_lie(parts):
    for count in (0, 1, 2**20, 2**60, 2**64 - 1):
        parts.refused(parts.content(n_tensors=count))
        parts.refused(parts.content(n_values=count))
    assert "it does not begin with GGUF" in parts.refused(parts.content(magic=b"FUGG"))
    for version in (0, 1, 4, 3 << 24):
        assert (
            f"version {version} is not supported, or the file is big-endian"
            in parts.refused(parts.content(version=version))
        )
    content = parts.content()
    for end in (
        *range(0, 200, 9),
        *range(200, len(content), len(content) // 30),
        len(content) - 1,
    ):
        parts.refused(content[:end])
    parts.refused(content + b"\0" * 40)
    parts.path.write_bytes(parts.content(version=2))
    load_gguf(parts.path)


def test_gguf_tensors_that_lie(parts):
    name, kind, shape, offset = parts.table[1]
    wrong = [[name, k, shape, offset] for k in (1, 2, 4, 8, 26, 28, 30, 99, 2**32 - 1)]
    wrong += [
        [name, kind, s, offset]
        for s in (
            [],
            [0],
            [0, 96],
            [2**63],
            [2**40, 2**40],
            [2**64 - 1] * 4,
            [1] * 5,
            [1] * 999,
        )
    ]
    wrong += [
        [name, kind, shape, o]
        for o in (0, offset + 1, offset + 32, 2**20, 2**63, 2**64 - 1)
    ]
    wrong += [
        [n, kind, shape, offset]
        for n in (parts.table[0][0], "", "a\nb", b"\xff", "x" * 99_999)
    ]
    for entry in wrong:
        parts.refused(parts.content(table=[parts.table[0], entry, *parts.table[2:]]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_gguf_with_a_changed_byte_is_read_or_refused(parts, data):
    content = bytearray(parts.content())
    content[data.draw(st.integers(0, len(content) - len(parts.data) - 1))] = data.draw(
        st.integers(0, 255)
    )
    parts.path.write_bytes(content)
    try:
        load_gguf(parts.path)
    except ValueError as error:
        assert "\n" not in str(error) and str(parts.path) in str(error)
